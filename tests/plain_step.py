"""The oracle of `net.step`: one step of a decoupled network by autograd and torch.optim alone.

It calls the modules as they are and the optimizers' own `step`; nothing of fastdni is used. What is
true of modules, hooks, parameters and optimizers in PyTorch is therefore true of it.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

CRITERIA = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}


def _width(synthesizer: nn.Module) -> int | None:
    taken = getattr(synthesizer, "input_context", None)
    return taken.in_features if taken is not None else getattr(synthesizer, "context_dim", None)


def plain_backward(net, x, target, criterion="cross_entropy", context=None, update_mask=None):
    """Adds every gradient of a step to `p.grad`.

    Returns:
        Loss, output, synthesis losses.
    """
    top = len(net.stages) - 1
    active = [True] * (top + 1) if update_mask is None else [*map(bool, update_mask)]
    unlocked = net.input_synthesizers is not None
    context = None if context is None else context.detach()

    def predicted(synthesizer: nn.Module, trigger: Tensor) -> Tensor:
        width, given = _width(synthesizer), context
        if given is None and width is not None:
            given = F.one_hot(target.long().clamp(min=0), width) * (target >= 0)[:, None]
            given = given.to(next(synthesizer.parameters()).dtype)
        return synthesizer(trigger.detach(), given)

    def regress(prediction: Tensor, true: Tensor, learns: bool) -> Tensor:
        if not learns:
            return prediction.new_full((), torch.nan)
        loss = (prediction - true).square().sum() / len(true)
        if loss.requires_grad:
            loss.backward()
        return loss.detach()

    inputs, outputs, sent, regressed, input_losses = [], [], [], [], []
    h = x
    for number, stage in enumerate(net.stages):
        inputs.append(h.detach().requires_grad_(number > 0))
        with torch.set_grad_enabled(active[number]):
            outputs.append(stage(inputs[-1]))
        h = outputs[-1].detach()
        if number == top:
            continue
        with torch.set_grad_enabled(active[number + 1]):
            sent.append(predicted(net.synthesizers[number], h))
            regressed.append(sent[-1])
            if unlocked:
                made = predicted(net.input_synthesizers[number], x)
                input_losses.append(regress(made, h, active[number + 1]))
                h = made.detach()
                regressed[-1] = predicted(net.synthesizers[number], h)

    with torch.set_grad_enabled(active[top]):
        loss = CRITERIA.get(criterion, criterion)(outputs[-1], target)
    losses = [None] * top
    gradient = None
    for number in reversed(range(top + 1)):
        if number < top:
            losses[number] = regress(regressed[number], gradient, active[number + 1])
        gradient, received = None, gradient
        if not active[number]:
            continue
        if number == top:
            loss.backward()
        elif outputs[number].requires_grad:
            mixed = sent[number].detach()
            if net.bp_lambda > 0 and received is not None:
                mixed = (1 - net.bp_lambda) * mixed + net.bp_lambda * received
            outputs[number].backward(mixed)
        gradient = inputs[number].grad
    synthesis_loss = torch.stack(losses) if losses else h.new_empty(0)
    if unlocked:
        synthesis_loss = torch.stack([synthesis_loss, torch.stack(input_losses)])
    return loss.detach(), outputs[-1].detach(), synthesis_loss


def plain_step(net, x, target, optimizer: Optimizer | Sequence[Optimizer], *others, **how):
    """`net.step`, written out: the gradients of a step, then the optimizers' own `step`."""
    net.zero_grad()
    results = plain_backward(net, x, target, *others, **how)
    for each in optimizer if isinstance(optimizer, list | tuple) else [optimizer]:
        each.step()
    net.zero_grad()
    return results


def twin_of(net: nn.Module, *optimizers: Optimizer):
    """A copy of a network, with optimizers of the same kinds in the same state over the copy's
    parameters."""
    twin = copy.deepcopy(net)
    theirs = dict(zip(net.parameters(), twin.parameters(), strict=True))
    made = []
    for optimizer in optimizers:
        groups = [{"params": [theirs[p] for p in g["params"]]} for g in optimizer.param_groups]
        made.append(type(optimizer)(groups))
        made[-1].defaults = dict(optimizer.defaults)
        made[-1].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return twin, *made


def assert_same(net: nn.Module, twin: nn.Module, tolerance: float = 1e-9) -> None:
    """Parameters and buffers of two networks are equal within rounding."""
    names = net.state_dict().keys()
    values = zip(names, net.state_dict().values(), twin.state_dict().values(), strict=True)
    for name, a, b in values:
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same_state(optimizer: Optimizer, other: Optimizer, tolerance: float = 1e-9) -> None:
    """The state of two optimizers, parameter by parameter, is equal within rounding."""
    held = ([p for g in each.param_groups for p in g["params"]] for each in (optimizer, other))
    for number, (p, q) in enumerate(zip(*held, strict=True)):
        one, two = optimizer.state.get(p, {}), other.state.get(q, {})
        assert one.keys() == two.keys(), number
        for key in one:
            if isinstance(one[key], Tensor):
                torch.testing.assert_close(one[key], two[key], rtol=tolerance, atol=tolerance)
            else:
                assert one[key] == two[key], key
