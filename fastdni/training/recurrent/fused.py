"""A window of which everything around the recurrence is two calls: one in front of its backward
pass, the head and what is sent at the window's end, and one behind it, the synthesizer's regression
and every update."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastdni import ops
from fastdni.synthesizers import is_changed, plain_parameters
from fastdni.training import criteria
from fastdni.training.optimizers import Optimizers
from fastdni.training.recurrent.layouts import State, rebuilt, rows_of, tensors_of, zeroed
from fastdni.training.recurrent.traces import Kept
from fastdni.training.recurrent.unroll import kernel_of, why_no_kernel
from fastdni.training.recurrent.window import Engine, Passed, who_learns
from fastdni.training.running import Surroundings
from fastdni.training.updates import updates_of
from fastdni.training.watch import Watch, watch_modules

_DTYPES = (torch.float32, torch.float64)


class Unfused(Exception):
    """Why a window takes autograd."""


class Given(NamedTuple):
    """What one window is given: see `DecoupledRNN.step`; `ended`: (T, B) or (1, B) booleans."""

    x: Any
    target: Any
    state: State | None
    passed: Passed | None
    ended: Tensor | None
    contexts: tuple[Any, Any]
    lengths: Tensor | None


class Found(NamedTuple):
    """What came of it. `kept`: what a trace keeps of the window."""

    loss: Tensor
    output: Tensor
    state: State
    passed: Passed
    synthesis_loss: Tensor
    energy: Tensor


class ModuleRecurrence:
    """The recurrence by the module itself and autograd."""

    def __init__(self, engine: Engine):
        self._unroller = engine.unroller
        self.parameters = [p for p in engine.unroller.rnn.parameters() if p.requires_grad]

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Output and state after the window."""
        self._start = [t.detach().requires_grad_() for t in tensors_of(state)]
        with torch.enable_grad():
            output, end, _ = self._unroller.run(x, rebuilt(state, iter(self._start)))
        self._output, self._end = output, tensors_of(end)
        return output.detach(), rebuilt(end, iter([t.detach() for t in self._end]))

    def backward(
        self, grad_output: Tensor, sent: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of the state before the window, and of the parameters."""
        variables, gradients = [self._output], [grad_output]
        if sent:
            variables += self._end
            gradients += sent
        found = torch.autograd.grad(
            variables, [*self._start, *self.parameters], gradients,
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        count = len(self._start)
        self._output = self._end = self._start = None
        return list(found[:count]), list(found[count:])


class KernelRecurrence:
    """The recurrence by a kernel of ours, without autograd."""

    def __init__(self, engine: Engine):
        self._kernel = kernel_of(engine.unroller.rnn)
        self._first = engine.unroller.batch_first
        self.parameters = self._kernel.weights

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """As ModuleRecurrence."""
        self._x = x.transpose(0, 1) if self._first else x
        self._start = self._kernel.layered(tensors_of(state))
        cell, weights, bias, _ = self._kernel
        self._output, end, self._saved = ops.recurrence_fwd(
            cell, self._x, self._start, weights, bias
        )
        output = self._output.transpose(0, 1) if self._first else self._output
        return output, rebuilt(state, iter(self._kernel.unlayered(end)))

    def backward(
        self, grad_output: Tensor, sent: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As ModuleRecurrence."""
        above = grad_output.transpose(0, 1) if self._first else grad_output
        cell, weights, bias, _ = self._kernel
        _, before, found = ops.recurrence_bwd(
            cell, self._x, self._start, weights, bias, self._output, self._saved, above,
            self._kernel.layered(sent), False,
        )  # fmt: skip
        self._x = self._start = self._output = self._saved = None
        return self._kernel.unlayered(before), found


class FusedWindows:
    """Windows of one network with one head, criterion and optimizer, while these stay as they are.

    Args:
        caller: whom messages name.
        engine: of the network.
        head: the module on the recurrence's output.
        criterion: as given.
        optimizers: who update all of it.

    Raises:
        Unfused: it takes autograd; the message says why.
    """

    def __init__(
        self, caller: str, engine: Engine, head: nn.Module, criterion: Any, optimizers: Optimizers
    ):
        self._caller, self.engine, self.head = caller, engine, head
        self.criterion, self.optimizers = criterion, optimizers
        settings = engine.settings
        if _has_any_global_hook():
            raise Unfused("there are hooks on all modules")
        if type(head) is not nn.Linear or is_changed(head):
            raise Unfused("the head is not a plain Linear")
        self._name, ignored = criteria.known(criterion)
        if self._name not in criteria.FUNCTIONS or ignored != criteria.IGNORED:
            raise Unfused('the criterion is not "cross_entropy" or "mse"')
        if not engine.boundaries.is_joined:
            raise Unfused("the layout has a synthesizer for each layer")
        (self._synthesizer,) = engine.boundaries.synthesizers
        self._m = plain_parameters(self._synthesizer)
        if self._m is None:
            raise Unfused("the synthesizer is not a plain BasicSynthesizer")
        if engine.horizon.length:
            raise Unfused("there is an auxiliary task (horizon)")
        if settings.trace_lambda is not None and settings.trace_view == "online":
            raise Unfused("eligibility is accumulated online")
        if optimizers.reason is not None:
            raise Unfused(optimizers.reason)
        self._head = [p for p in head._parameters.values() if p is not None]
        self._dtype, device = self._head[0].dtype, self._head[0].device
        if not ops.window_is_compiled(self._head[0]):
            raise Unfused(f"there is no kernel for {self._dtype} on {device}")
        self.why_no_kernel = why_no_kernel(engine.unroller.rnn, self._head[0].new_empty(1, 1, 1))
        kernel = self.why_no_kernel is None
        self._recurrence = KernelRecurrence(engine) if kernel else ModuleRecurrence(engine)
        self._of_m = self._m.tensors()
        self._others = [*self._recurrence.parameters, *self._head]
        self._every = [*self._of_m, *self._others]
        for parameter in self._every:
            if type(parameter) is not nn.Parameter or parameter.dtype != self._dtype:
                raise Unfused("parameters are not plain ones of one dtype")
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                raise Unfused("a parameter has hooks")
        shared = len({id(p) for p in self._every}) < len(self._every)
        if shared:
            raise Unfused("parameters are shared")
        self._learning = (None, tuple([False] * len(self._of_m) + [True] * len(self._others)))
        self._surroundings = Surroundings(device)
        if self._surroundings.is_cast:
            raise Unfused("autocast is on")
        self._modules = nn.ModuleList([engine.unroller.rnn, self._synthesizer, head])
        self._no_gradients = Watch()
        self._no_gradients.none(self._every, "grad")
        self._no_gradients.done()
        own = Watch()
        criteria.watch_criterion(own, criterion if isinstance(criterion, nn.Module) else None)
        for parameter in self._every:
            own.tensor(parameter)
        own.done(watch_modules(self._modules, ()))
        self._unchanged = own.unchanged

    def still_serve(self, engine: Engine, head, criterion, optimizer) -> bool:
        """Whether it is these that are given, and they are as they were."""
        return (
            head is self.head
            and engine is self.engine
            and criterion is self.criterion
            and self._surroundings.are_same()
            and self._unchanged()
            and self.optimizers.still_serve(optimizer)
        )

    def takes(self, given: Given) -> bool:
        """Whether a window can be run so."""
        x, state, ended = given.x, given.state, given.ended
        settings = self.engine.settings
        if not isinstance(x, Tensor) or x.dim() != 3 or x.dtype != self._dtype or x.requires_grad:
            return False
        if given.lengths is not None or not isinstance(given.target, Tensor):
            return False
        if settings.trace_lambda is None and settings.bootstrap != settings.factor:
            return False
        if ended is not None and (
            settings.end is not None or (len(ended) > 1 and bool(ended[:-1].any()))
        ):
            return False
        if state is not None and any(t.requires_grad for t in tensors_of(state)):
            return False
        labels = not given.target.is_floating_point()
        return labels if self._name == "cross_entropy" else given.target.dtype == self._dtype

    def run(self, given: Given, trace: Any) -> Found:
        """A window.

        Args:
            trace: what to call with what is kept of it, and its `passed`, for the synthesizers to
                learn where a trace of windows is over; None: they learn at once.
        """
        engine, settings, recurrence = self.engine, self.engine.settings, self._recurrence
        boundaries, state = engine.boundaries, given.state
        learns, rows = who_learns(settings, state, given.passed)
        if state is None:
            state = engine.unroller.zeros(engine.unroller.size(given.x)[1])
        start = [t.detach() for t in tensors_of(state)]
        batch = rows_of(start)
        output, after = recurrence.forward(given.x, rebuilt(state, iter(start)))
        target = self._target(given.target, output)
        last = None if given.ended is None else given.ended[-1]
        unit = boundaries.unit(batch)
        end = tensors_of(after)
        predicted = boundaries.predicted(start)
        prediction, loss, grad_output, grad_head, sent = ops.window_fwd(
            output, target, self._name, self._head, end, predicted, given.contexts[1], self._m,
            settings.factor / unit, last, self._caller,
        )  # fmt: skip
        before, grads = recurrence.backward(grad_output, sent)
        if last is not None:
            after = zeroed(after, last.unsqueeze(1))
        passed = Passed(None if last is None else last.unsqueeze(1))
        others, gradients = self._others, [*grads, *grad_head]
        learnt = None
        if trace is not None:
            kept = Kept()
            kept.fill(
                grad_output, x=given.x, start=start, like=after, end=end, ended=given.ended,
                lengths=None, ctx=given.contexts, rows=rows, learns=learns, loss_scale=1.0,
            )  # fmt: skip
            learnt, learns = trace(kept, passed), False
            found = [(p, p.grad) for p in self._of_m if p.grad is not None]
            updates = self._updates(bool(found))
            if found:  # a trace is over
                others = [*self._of_m, *others]
                gradients = [*(p.grad for p in self._of_m), *gradients]
        else:
            updates = self._updates(learns)
        groups, settings_now = updates.settings()
        if not (learns or len(others) > len(self._others)):
            groups = groups[len(self._of_m) :]
        try:
            updates.put_in_place()
            synthesis, energy = ops.window_update_(
                start, before, predicted, given.contexts[0], self._m, learns,
                boundaries.numbers(start), None if rows is None else rows.view(-1), others,
                gradients, updates.state, groups, settings_now, self._caller,
            )  # fmt: skip
        except (RuntimeError, ValueError):  # refused: nothing was written
            updates.take_back()
            raise
        updates.finish()
        self.optimizers.mark_called()
        if not self._no_gradients.unchanged():
            for parameter in self._every:
                parameter.grad = None
        if learnt is not None:
            synthesis, energy = synthesis + learnt[0], energy + learnt[1]
        output = prediction.view(*output.shape[:-1], -1)
        return Found(loss, output, after, passed, synthesis, energy)

    def _updates(self, learns: bool):
        return updates_of(self.optimizers, self, self._every, self._learning[not learns])

    def _target(self, target: Tensor, output: Tensor) -> Tensor:
        """In the form that the op takes."""
        wanted = tuple(output.shape[:-1])
        if self._name == "mse":
            wanted = (*wanted, self.head.out_features)
        if tuple(target.shape) != wanted:
            raise RuntimeError(
                f"{self._caller}: target must be of shape {wanted}, got {tuple(target.shape)}"
            )
        return target.flatten() if self._name == "cross_entropy" else target.flatten(0, -2)
