"""A synthesizer at one trigger: what it says, and how it learns from what should have been said.

Two kinds: of a `BasicSynthesizer` by the fused op, of any other module by its own autograd. Both
hold what their regression needs, and whether that still is as it was.
"""

from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from fastdni import ops, reference
from fastdni.checkpoint import is_checkpointed
from fastdni.reference import SynthesizerParameters
from fastdni.synthesizers import plain_parameters, required_context
from fastdni.training.optimizers import Optimizers
from fastdni.training.updates import Gradients, Updates


def synthesize(
    synthesizer: nn.Module, h: Tensor, ctx: Any, learn: bool
) -> "FusedSynthesis | ModuleSynthesis":
    """A synthesizer at a trigger; see `Boundary.predict`."""
    parameters = plain_parameters(synthesizer)
    if parameters is None:
        return ModuleSynthesis(synthesizer, h, ctx, learn)
    return FusedSynthesis(synthesizer, parameters, h, ctx, learn)


class _Stamp:
    """The versions of tensors: whether they still hold what they held.

    Args:
        given: those that must.
        own: those that may change.
    """

    __slots__ = ("_given", "_of_given", "_of_own", "_own")

    def __init__(self, given: list[Tensor], own: list[Tensor]):
        self._given, self._own = given, own
        self._of_given = [tensor._version for tensor in given]
        self._of_own = [tensor._version for tensor in own]

    def is_current(self) -> bool:
        if [tensor._version for tensor in self._given] != self._of_given:
            raise RuntimeError(
                "synthesizer: trigger and context must stay as they are until the prediction made "
                "from them is regressed; one has been modified by an inplace operation"
            )
        return [tensor._version for tensor in self._own] == self._of_own


class _Unchanging:
    """In a compiled graph, where nobody else changes anything."""

    @staticmethod
    def is_current() -> bool:
        return True


class FusedSynthesis:
    """Of a BasicSynthesizer: one op for the prediction, one for the regression."""

    is_fused = True

    def __init__(self, synthesizer, parameters: SynthesizerParameters, h, ctx, learn: bool):
        if parameters.context_weight is None:
            ctx = None
        else:
            ctx = _fitted(required_context(ctx, parameters.context_weight), h)
        self._synthesizer, self._parameters = synthesizer, parameters
        self.trigger, self._ctx, self._dtype = h, ctx, _autocast_dtype(h)
        self.learning = parameters.tensors()
        self.message, self._hidden = self._evaluate()
        self._stamp = None
        if torch.compiler.is_compiling():
            self._stamp = _Unchanging
        elif learn:
            given = [h] if ctx is None else [h, ctx]
            self._stamp = _Stamp(given, [self.message, *self._hidden, *self.learning])

    def _arguments(self) -> tuple[Tensor, Tensor | None, SynthesizerParameters]:
        arguments = (self.trigger, self._ctx, self._parameters)
        return arguments if self._dtype is None else ops.cast(*arguments, self._dtype)

    def _evaluate(self) -> tuple[Tensor, list[Tensor]]:
        return ops.synthesizer_fwd(*self._arguments())

    def _is_current(self) -> bool:
        return self._stamp is not None and self._stamp.is_current()

    def check_learns(self) -> None:
        for tensor in self.learning:
            if tensor.requires_grad:
                return
        raise ValueError(ops.FROZEN)

    def gradients(self, target: Tensor, scale: float | None) -> tuple[Tensor, list[Tensor]]:
        known = (self.message, self._hidden) if self._is_current() else self._evaluate()
        h, ctx, parameters = self._arguments()
        bias = len(parameters.biases) > 0
        return ops.synthesizer_bwd(
            _beside(h, target), *known, h, ctx, parameters.weights, bias, "batchmean", scale
        )

    def learn(self, target: Tensor, scale: float | None, optimizers: Optimizers | None) -> Tensor:
        parameters = plain_parameters(self._synthesizer)
        if parameters is None:  # it has become another one since
            anew = ModuleSynthesis(self._synthesizer, self.trigger, self._ctx, True)
            return anew.learn(target, scale, optimizers)
        tensors = parameters.tensors()
        if len(tensors) != len(self.learning) or not all(map(is_, tensors, self.learning)):
            self._parameters, self.learning, self._stamp = parameters, tensors, None
        # What nothing is added to is handed over as it is made.
        apart = optimizers is None and not all(map(_adds_up, tensors))
        if self._dtype is not None or apart:
            loss, gradients = self.gradients(target, scale)
            _hand_over(tensors, gradients, optimizers)
            return loss
        known = (self.message, self._hidden) if self._is_current() else (None, None)
        updates = Gradients(tensors) if optimizers is None else _fused_updates(optimizers, tensors)
        h, ctx = self.trigger, self._ctx
        loss, _, _ = ops.boundary_(
            parameters,
            h,
            ctx,
            _beside(h, target),
            updates.state,
            *updates.settings(),
            scale,
            *known,
        )
        updates.finish()
        return loss


def _beside(h: Tensor, target: Tensor) -> Tensor:
    """A target in the dtype that errors beside h are formed in: float32, say, under autocast."""
    return target if target.dtype == h.dtype else target.to(reference.accumulate_dtype(h.dtype))


def _fitted(context: Tensor, trigger: Tensor) -> Tensor:
    """The context with the trigger's leading dimensions, as addition would broadcast it."""
    shape = (*trigger.shape[:-1], *context.shape[-1:])
    if context.shape != shape and context.dim() <= trigger.dim():
        sizes = zip(reversed(context.shape[:-1]), reversed(shape[:-1]), strict=False)
        if all(size in (1, wanted) for size, wanted in sizes):
            context = context.expand(shape)
    return context.detach()


def _autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast would cast the tensor to for a product; None for nothing."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return None if tensor.dtype == torch.float64 else torch.get_autocast_dtype(device)


class ModuleSynthesis:
    """Of any module: its own graph from one call."""

    is_fused = False

    def __init__(self, synthesizer: nn.Module, h: Tensor, ctx: Any, learn: bool):
        self._synthesizer, self.trigger, self._ctx = synthesizer, h, ctx
        self._graph, self._stamp, self.learning = None, None, []
        made = self._record() if learn else self._call()
        self.message = made.detach()

    def _call(self) -> Tensor:
        if not is_checkpointed():
            return self._synthesizer(self.trigger, self._ctx)
        # What is saved here is not for the checkpoint to drop.
        with torch.autograd.graph.saved_tensors_hooks(_same, _same):
            return self._synthesizer(self.trigger, self._ctx)

    def _record(self) -> Tensor:
        """The prediction, with the graph that it is differentiated through."""
        h, ctx = self.trigger, self._ctx
        with torch.enable_grad():
            self._graph = self._call()
        if torch.compiler.is_compiling():  # the outer graph goes on where the gradient is handed to
            self.learning = [self._graph] if self._graph.requires_grad else []
        else:
            self.learning = _leaves(self._graph)
            given = [tensor for tensor in (h, ctx) if isinstance(tensor, Tensor)]
            self._stamp = _Stamp(given, [*self.learning, *self._synthesizer.parameters()])
        return self._graph

    def _current(self) -> Tensor:
        if torch.compiler.is_compiling():
            return self._graph
        stays = self._graph is not None and self._stamp.is_current()
        return self._graph if stays else self._record()

    def check_learns(self) -> None:
        if not self._current().requires_grad:
            raise ValueError(ops.FROZEN)

    def gradients(self, target: Tensor, scale: float | None) -> tuple[Tensor, list[Tensor | None]]:
        learning, made = self.learning, self._current()
        loss, error = squared_error(made.detach(), target, scale)
        if torch.compiler.is_compiling():
            return loss, [error]
        kept = graph_is_kept()
        # Hooks of leaves run where the gradients are handed to, and not here besides.
        hooks = [(leaf, leaf._backward_hooks) for leaf in learning if leaf._backward_hooks]
        for leaf, _ in hooks:
            leaf._backward_hooks = None
        try:
            found = torch.autograd.grad(made, learning, error, retain_graph=kept, allow_unused=True)
        finally:
            for leaf, own in hooks:
                leaf._backward_hooks = own
        if not kept:
            self._graph = None
        return loss, list(found)

    def learn(self, target: Tensor, scale: float | None, optimizers: Optimizers | None) -> Tensor:
        made = self._current()
        loss, error = squared_error(made.detach(), target, scale)
        if optimizers is None:
            torch.autograd.backward(made, error)
        else:
            found = torch.autograd.grad(made, self.learning, error, allow_unused=True)
            pairs = [(p, g) for p, g in zip(self.learning, found, strict=True) if g is not None]
            _hand_over(*map(list, zip(*pairs, strict=True)), optimizers)
        self._graph = None
        return loss


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _leaves(tensor: Tensor) -> list[Tensor]:
    """The leaves of a tensor's graph, whose gradients autograd would accumulate."""
    found, seen, left = [], set(), [tensor.grad_fn]
    if tensor.grad_fn is None:
        return [tensor] if tensor.requires_grad else []
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        left += [below for below, _ in node.next_functions]
    return found


# Private, as compiled graphs of torch ask it.
_keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)


def graph_is_kept() -> bool:
    """Whether whoever runs the present backward pass may want another."""
    return torch.compiler.is_compiling() or _keep_graph is None or _keep_graph()


def squared_error(prediction: Tensor, target: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """scale / 2 sum(e^2), and its gradient scale e."""
    dtype = prediction.dtype
    if target.dtype != dtype:
        wide = torch.promote_types(target.dtype, dtype)
        prediction, target = prediction.to(wide), target.to(wide)
    loss, error = ops.regression_loss(prediction, target)
    divisor = reference.reduction_divisor(error, "batchmean")
    if scale is None:
        scale = 2 / divisor
    else:
        loss = loss * (divisor * scale / 2)
    return loss, (scale * error).to(dtype)


def _is_bare(parameter: Tensor) -> bool:
    """Whether a gradient comes to nothing but the parameter's own `grad`."""
    return (
        parameter.is_leaf
        and not parameter._backward_hooks
        and not parameter._post_accumulate_grad_hooks
    )


def _adds_up(parameter: Tensor) -> bool:
    """Whether all there is to do with a gradient is to add it to one that is there."""
    return not parameter.requires_grad or (parameter.grad is not None and _is_bare(parameter))


def _fused_updates(optimizers: Optimizers, parameters: list[Tensor]) -> Updates:
    """Refuses optimizers whose own step would have to be taken."""
    reason = optimizers.reason
    if reason is None:
        updates = Updates(optimizers, parameters)
        reason = updates.reason
    if reason is not None:
        raise ValueError(f"{optimizers.caller}: the update must be one that can be fused: {reason}")
    return updates


def _hand_over(parameters: list[Tensor], gradients, optimizers: Optimizers | None) -> None:
    """Gives parameters their gradients as autograd does, or their update."""
    pairs = [(p, g.to(p.dtype)) for p, g in zip(parameters, gradients, strict=True)]
    if optimizers is None:
        left = []
        for parameter, gradient in pairs:
            if not parameter.requires_grad:
                continue
            if parameter.grad is None and _is_bare(parameter):
                parameter.grad = gradient
            else:
                left.append((parameter, gradient))
        if left:
            torch.autograd.backward(*zip(*left, strict=True))
        return
    updates, found = _fused_updates(optimizers, parameters), [g for _, g in pairs]
    updates.run(lambda *how: ops.update_(parameters, found, *how, optimizers.caller))
