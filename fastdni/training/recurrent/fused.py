"""A window of which everything around the recurrence is two calls: one in front of its backward
pass, the head and what is sent at the window's end, and one behind it, the synthesizer's regression
and every update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastdni import ops
from fastdni.synthesizers import is_changed, plain_parameters
from fastdni.training import criteria
from fastdni.training.optimizers import Optimizers
from fastdni.training.recurrent.engine import Engine, Passed, who_learns
from fastdni.training.recurrent.layouts import State, first_of, rebuilt, rows_of, tensors_of, zeroed
from fastdni.training.recurrent.traces import Kept
from fastdni.training.recurrent.unroll import kernel_of, why_no_kernel
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
    weight: float


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
        self, grad_output: Tensor | None, sent: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of the state before the window, and of the parameters."""
        variables, gradients = list(self._end) if sent else [], list(sent)
        if grad_output is not None:
            variables.append(self._output)
            gradients.append(grad_output)
        found = torch.autograd.grad(
            variables, [*self._start, *self.parameters], gradients,
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        count = len(self._start)
        self._output = self._end = self._start = None
        return list(found[:count]), list(found[count:])


class KernelRecurrence:
    """The recurrence by a kernel of ours, without autograd; x is (T, B, K)."""

    def __init__(self, engine: Engine):
        self._kernel = kernel_of(engine.unroller.rnn)
        self.parameters = self._kernel.weights

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """As ModuleRecurrence."""
        self._x, self._start = x, self._kernel.layered(tensors_of(state))
        cell, weights, bias, _ = self._kernel
        self._output, end, self._saved = ops.recurrence_fwd(
            cell, self._x, self._start, weights, bias
        )
        return self._output, rebuilt(state, iter(self._kernel.unlayered(end)))

    def backward(
        self, grad_output: Tensor | None, sent: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As ModuleRecurrence."""
        cell, weights, bias, _ = self._kernel
        _, before, found = ops.recurrence_bwd(
            cell, self._x, self._start, weights, bias, self._output, self._saved, grad_output,
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
        self._kernel = kernel_of(engine.unroller.rnn) if self.why_no_kernel is None else None
        # A kernel has its steps in front.
        self._turns = self._kernel is not None and engine.unroller.batch_first
        own = ModuleRecurrence if self._kernel is None else KernelRecurrence
        self._recurrence = own(engine)
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
        self._watches = watch_modules(self._modules, ()), own
        own.done(self._watches[0])
        self._unchanged = own.unchanged
        self._last: Any = None  # of the last window: shapes, and who is watched with all of it

    def still_serve(self, engine: Engine, head, criterion, optimizer) -> bool:
        """Whether it is these that are given, and they are as they were."""
        return (
            head is self.head
            and engine is self.engine
            and criterion is self.criterion
            and self._surroundings.are_same()
            and (self._serve_once_more(optimizer) or self._still_serve(optimizer))
        )

    def _still_serve(self, optimizer) -> bool:
        self._last = None
        return self._unchanged() and self.optimizers.still_serve(optimizer)

    def _serve_once_more(self, optimizer) -> bool:
        """The same, told at once where optimizers keep what they kept."""
        if self._last is None or not (self.optimizers.are(optimizer) and self._last.unchanged()):
            return False
        self._settings = self.optimizers.settings_if_alike()
        return self._settings is not None

    def is_like_last(self, x: Any, state: State, passed: Passed | None, *others) -> bool:
        """Whether a window has the form of the last one, which was checked: the state is one that
        it left, and there is nothing else."""
        last = self._last
        return (
            last is not None
            and passed is not None
            and others == (None,) * len(others)
            and type(x) is Tensor
            and (x.shape, x.dtype, x.device) == last.x
            and first_of(state).shape == last.state
        )

    def takes(self, given: Given) -> bool:
        """Whether a window can be run so."""
        x, state, ended = given.x, given.state, given.ended
        settings = self.engine.settings
        if not isinstance(x, Tensor) or x.dim() != 3 or x.dtype != self._dtype or x.requires_grad:
            return False
        if given.lengths is not None or not isinstance(given.target, Tensor | None):
            return False
        if given.target is None and settings.factor == 0:  # some parameters have no gradient
            return False
        if settings.trace_lambda is None and settings.bootstrap != settings.factor:
            return False
        if ended is not None and (
            settings.end is not None or (len(ended) > 1 and bool(ended[:-1].any()))
        ):
            return False
        if state is not None and any(t.requires_grad for t in tensors_of(state)):
            return False
        if given.target is None:
            return True
        labels = self._name == "cross_entropy"
        return given.target.dtype == (torch.int64 if labels else self._dtype)

    def run(self, given: Given, trace: Any) -> Found:
        """A window.

        Args:
            trace: what to call with what is kept of it, and its `passed`, for the synthesizers to
                learn where a trace of windows is over; None: they learn at once.
        """
        engine = self.engine
        state = given.state
        learns, rows = who_learns(engine, state, given.passed)
        if state is None:
            state = engine.unroller.zeros(engine.unroller.size(given.x)[1])
        start = [t.detach() for t in tensors_of(state)]
        last = None if given.ended is None else given.ended[-1]
        rows = None if rows is None else rows.view(-1)
        x = given.x.transpose(0, 1) if self._turns else given.x
        about = _About(x, self._target(given), state, start, learns, rows, last)
        passed = Passed(None if last is None else last.unsqueeze(1))
        if trace is None and self._kernel is not None:
            found = self._at_once(given, about)
        else:
            with torch.no_grad():
                found = self._in_pieces(given, about, passed, trace)
        self.optimizers.mark_called()
        self._remember(given.x, start)
        if not self._no_gradients.unchanged():
            for parameter in self._every:
                parameter.grad = None
        prediction, loss, end, synthesis, energy = found
        after = rebuilt(state, iter(end))
        if last is not None:
            after = zeroed(after, last.unsqueeze(1))
        output = prediction.view(len(x), x.shape[1], -1)
        if self._turns:
            output = output.transpose(0, 1)
        return Found(loss, output, after, passed, synthesis, energy)

    def _remember(self, x: Tensor, start: list[Tensor]) -> None:
        form = (x.shape, x.dtype, x.device)
        if self._last is None or self._last.x != form or self._last.state != start[0].shape:
            watches = (*self._watches, self.optimizers.watch, self.optimizers.kept().watch)
            self._last = _Last(form, start[0].shape, Watch().done(*watches).unchanged, {})

    def _at_once(self, given: Given, about: "_About") -> tuple:
        """By a kernel, in one call."""
        kernel, boundaries = self._kernel, self.engine.boundaries
        cell, weights, bias, _ = kernel
        start = kernel.layered(about.start)
        factor = self.engine.settings.factor / boundaries.unit(about.batch)

        def op(state, groups, settings):
            return ops.window_step_(
                cell, about.x, start, weights, bias, about.target, self._name, given.weight,
                self._head, boundaries.predicted(start), given.contexts, self._m, about.learns,
                factor, boundaries.numbers(start), about.rows, about.last, state, groups, settings,
                self._caller,
            )  # fmt: skip

        prediction, loss, end, synthesis, energy = self._update(
            about.learns, about.target is not None, op
        )
        return prediction, loss, kernel.unlayered(end), synthesis, energy

    def _in_pieces(self, given: Given, about: "_About", passed: Passed, trace: Any) -> tuple:
        """In a call in front of the recurrence's backward pass and one behind it."""
        boundaries, recurrence, start = self.engine.boundaries, self._recurrence, about.start
        output, end = recurrence.forward(about.x, rebuilt(about.state, iter(start)))
        end, predicted = tensors_of(end), boundaries.predicted(start)
        factor = self.engine.settings.factor / boundaries.unit(about.batch)
        prediction, loss, grad_output, grad_head, sent = ops.window_fwd(
            output, about.target, self._name, given.weight, self._head, end, predicted,
            given.contexts[1], self._m, factor, about.last, self._caller,
        )  # fmt: skip
        if about.target is None:
            grad_output = None
        before, grads = recurrence.backward(grad_output, sent)
        others, gradients, learns = self._others, [*grads, *grad_head], about.learns
        others = others[: len(gradients)]  # without a loss the head has none
        learnt = None
        if trace is not None:
            kept = Kept.made(self.engine)
            kept.fill(
                about.state, grad_output, x=given.x, start=start, end=end, ended=given.ended,
                lengths=None, ctx=given.contexts, rows=None if about.rows is None
                else about.rows.view(-1, 1), learns=learns, loss_scale=1.0,
            )  # fmt: skip
            for p in self._of_m:
                p.grad = None  # what was there is no part of the step
            learnt = trace(kept, passed)
            learns = any(p.grad is not None for p in self._of_m)  # a trace is over
            if learns:
                others = [*self._of_m, *others]
                gradients = [*(_gradient(p) for p in self._of_m), *gradients]

        def op(state, groups, settings):
            return ops.window_update_(
                start, before, predicted, given.contexts[0], self._m, learns and trace is None,
                boundaries.numbers(start), about.rows, others, gradients, state, groups, settings,
                self._caller,
            )  # fmt: skip

        synthesis, energy = self._update(learns, about.target is not None, op)
        if learnt is not None:
            synthesis, energy = synthesis + learnt[0], energy + learnt[1]
        return prediction, loss, end, synthesis, energy

    def _update(self, learns: bool, differs: bool, op: Callable) -> tuple:
        """What an op returns that makes the update, called with state, groups and settings.

        Args:
            learns: whether M's parameters are updated; `differs`: whether there is a loss, and the
                head's are.
        """
        key = learns, differs
        if self._last is not None and key in self._last.updates:
            return op(*self._last.updates[key], self._settings)
        whole = len(self._every)
        first, end = len(self._of_m) * (not learns), whole - len(self._head) * (not differs)
        flags = tuple(first <= number < end for number in range(whole))
        updates = updates_of(self.optimizers, self, self._every, flags)
        results = updates.run(lambda state, groups, *how: op(state, groups[first:end], *how))
        if not updates.first and self._last is not None:
            self._last.updates[key] = updates.state, updates.groups[first:end]
        return results

    def _target(self, given: Given) -> Tensor | None:
        """In the form that the op takes."""
        x, target = given.x, given.target
        if target is None:
            return None
        wanted = tuple(x.shape[:-1])
        if self._name == "mse":
            wanted = (*wanted, self.head.out_features)
        if tuple(target.shape) != wanted:
            raise RuntimeError(
                f"{self._caller}: target must be of shape {wanted}, got {tuple(target.shape)}"
            )
        if self._turns:
            target = target.transpose(0, 1)
        return target.flatten() if self._name == "cross_entropy" else target.flatten(0, -2)


class _Last(NamedTuple):
    """Of the last window the form of x, and of the state's first tensor; what tells whether
    modules and optimizers are as they were; and, by whether the synthesizer learns and whether
    there is a loss, state and groups of the updates."""

    x: tuple
    state: torch.Size
    unchanged: Callable[[], bool]
    updates: dict[tuple[bool, bool], tuple[list[Tensor], list[int]]]


class _About(NamedTuple):
    """What a window has to know besides what it is given."""

    x: Tensor
    target: Tensor | None
    state: State
    start: list[Tensor]
    learns: bool
    rows: Tensor | None
    last: Tensor | None

    @property
    def batch(self) -> int:
        return rows_of(self.start)


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
