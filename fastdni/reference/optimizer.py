"""The updates of torch.optim's SGD, Adam and AdamW, written out."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

RULES = ("none", "gradient", "sgd", "sgd_momentum", "adam", "adamw")


class OptimizerSettings(NamedTuple):
    """How a parameter is updated, in the terms of torch.optim.

    `a`, `b`: momentum and dampening of SGD; beta1 and beta2 of Adam; of the rule "gradient", which
    only hands the gradient out, whether `a` = 1 to add to what is there or 0 to write over it.
    """

    rule: str
    lr: float = 0.0
    weight_decay: float = 0.0
    a: float = 0.0
    b: float = 0.0
    eps: float = 0.0
    nesterov: bool = False


def optimizer_update(
    settings: OptimizerSettings, parameter: Tensor, gradient: Tensor, state: list[Tensor]
) -> None:
    """Updates a parameter and its state in place.

    Args:
        settings: the rule and its numbers.
        parameter, gradient: of one shape.
        state: [] of SGD; [p.grad] of the rule "gradient"; [momentum_buffer] of SGD with momentum;
            [exp_avg, exp_avg_sq, step] of Adam and AdamW. Then the learning rate, 0-d, where that
            of the settings is NaN.
    """
    rule, lr, weight_decay, a, b, eps, nesterov = settings
    if math.isnan(lr):
        *state, lr = state
    if rule == "gradient":
        state[0].copy_(gradient if a == 0 else state[0] + gradient)
    elif rule in ("sgd", "sgd_momentum"):
        gradient = _decayed(gradient, weight_decay, parameter)
        if rule == "sgd_momentum":
            (buffer,) = state
            buffer.mul_(a).add_((1 - b) * gradient)
            gradient = gradient + a * buffer if nesterov else buffer
        parameter.sub_(lr * gradient)
    elif rule in ("adam", "adamw"):
        average, square, step = state
        step += 1
        if rule == "adamw":
            parameter.mul_(1 - lr * weight_decay)
        else:
            gradient = _decayed(gradient, weight_decay, parameter)
        average.lerp_(gradient, 1 - a)
        square.mul_(b).add_((1 - b) * gradient * gradient)
        # A count on a GPU stays there: nobody waits for it.
        count = step.item() if step.device.type == "cpu" else step
        denominator = square.sqrt() / (1 - b**count) ** 0.5 + eps
        parameter.sub_(lr / (1 - a**count) * (average / denominator))


def _decayed(gradient: Tensor, weight_decay: float, parameter: Tensor) -> Tensor:
    # Without decay an infinite parameter must not make the gradient NaN.
    return gradient if weight_decay == 0 else gradient + weight_decay * parameter


# Tensors of a parameter's shape that a rule keeps; those of Adam have a step count besides.
KEPT = {"none": 0, "gradient": 1, "sgd": 0, "sgd_momentum": 1, "adam": 2, "adamw": 2}


def assigned(
    parameters: list[Tensor], state: list[Tensor], groups: list[int], settings: list[float]
) -> Iterator[tuple[Tensor, OptimizerSettings, list[Tensor]]]:
    """Of each parameter that has a group: its settings, and its own of the `state`, as
    `optimizer_update` takes it. `settings` are rows of numbers, a rule's being its place in RULES.
    """
    left, width = list(state), len(OptimizerSettings._fields)
    for parameter, group in zip(parameters, groups, strict=True):
        if group < 0:
            continue
        rule, *numbers = settings[group * width : (group + 1) * width]
        row = OptimizerSettings(RULES[int(rule)], *numbers)
        count = KEPT[row.rule] + row.rule.startswith("adam") + math.isnan(row.lr)
        own, left = left[:count], left[count:]
        yield parameter, row, own
