"""A weight's gradient and its optimizer in one kernel; the biases' beside it.

The mathematics of an update is that of `fastdni.reference.optimizer_update`.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastdni.reference import OptimizerSettings, one_hot
from fastdni.triton.op import launched
from fastdni.triton.tile import Precision, add_product, cast, halves, positions, tile_for


@triton.jit
def update(
    grad, of, start, at, inside, numbers,
    RULE: tl.constexpr, DECAYED: tl.constexpr, FLAG: tl.constexpr,
):  # fmt: skip
    """Updates elements start + at of a parameter and of what its rule keeps.

    FLAG: Nesterov's momentum; of the rule "gradient" whether to add. Without DECAYED an infinite
    parameter must not make the gradient NaN. Computed in float32, rounded when it is stored.
    """
    value, first, second, step_at = of
    lr, weight_decay, a, b, rest_a, rest_b, eps, correction_a, correction_b, log_a, log_b = numbers
    if RULE == "gradient":
        first += start
        if FLAG:
            grad += tl.load(first + at, mask=inside, other=0.0)
        tl.store(first + at, cast(grad, first.dtype.element_ty), mask=inside)
    else:
        value += start
        p = tl.load(value + at, mask=inside, other=0.0).to(tl.float32)
        if RULE == "adamw":
            p *= 1.0 - lr * weight_decay
        elif DECAYED:
            grad += weight_decay * p
        if RULE == "sgd":
            p -= lr * grad
        elif RULE == "sgd_momentum":
            first += start
            buffer = tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
            buffer = buffer * a + grad * rest_b
            tl.store(first + at, cast(buffer, first.dtype.element_ty), mask=inside)
            p -= lr * (grad + a * buffer if FLAG else buffer)
        else:
            if step_at is not None:
                n = tl.load(step_at).to(tl.float64)
                correction_a = (1.0 / (1.0 - tl.exp(n * log_a))).to(tl.float32)
                correction_b = (1.0 / tl.sqrt(1.0 - tl.exp(n * log_b))).to(tl.float32)
            first += start
            second += start
            average = tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
            average += rest_a * (grad - average)
            square = tl.load(second + at, mask=inside, other=0.0).to(tl.float32)
            square = square * b + rest_b * (grad * grad)
            tl.store(first + at, cast(average, first.dtype.element_ty), mask=inside)
            tl.store(second + at, cast(square, second.dtype.element_ty), mask=inside)
            p -= lr * correction_a * (average / (tl.sqrt(square) * correction_b + eps))
        tl.store(value + at, cast(p, value.dtype.element_ty), mask=inside)


@triton.jit
def update_columns(
    sums, of, first_output, first_input, outputs, inputs, numbers,
    RULE: tl.constexpr, DECAYED: tl.constexpr, FLAG: tl.constexpr,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """`update` of a weight's tile, a part of its columns after the other: see `layer.finish`."""
    if PARTS > 1:
        left, right = halves(sums, OUTPUTS, INPUTS)
        update_columns(
            left, of, first_output, first_input, outputs, inputs, numbers,
            RULE, DECAYED, FLAG, OUTPUTS, INPUTS // 2, PARTS // 2,
        )  # fmt: skip
        update_columns(
            right, of, first_output, first_input + INPUTS // 2, outputs, inputs, numbers,
            RULE, DECAYED, FLAG, OUTPUTS, INPUTS // 2, PARTS // 2,
        )  # fmt: skip
    else:
        o, i = tl.arange(0, OUTPUTS), tl.arange(0, INPUTS)
        inside = (o < outputs - first_output)[:, None] & (i < inputs - first_input)[None, :]
        start, at = first_output * inputs + first_input, o[:, None] * inputs + i[None, :]
        update(sums, of, start, at, inside, numbers, RULE, DECAYED, FLAG)


@triton.jit
def update_tile(
    number, grad, x, of_weight, bias_sums, of_bias, of_more, rows, sum_rows, outputs, inputs,
    numbers,
    RULE: tl.constexpr, DECAYED: tl.constexpr, FLAG: tl.constexpr, LABELS: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIBED: tl.constexpr,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A tile of `update_kernel`."""
    r = tl.arange(0, ROWS)
    first_output, o, first_input, i = positions(number, OUTPUTS, INPUTS, outputs, inputs)
    own, of_inputs = o < outputs - first_output, i < inputs - first_input
    if x is not None:
        sums = tl.zeros((OUTPUTS, INPUTS), tl.float32)
        if DESCRIBED:
            column, column_of_x = first_output.to(tl.int32), first_input.to(tl.int32)
            for start in range(0, rows, ROWS):
                g, y = grad.load([start, column]), x.load([start, column_of_x])
                sums = add_product(g.T, y, sums, PRECISION)
        else:
            g_at = grad + first_output + r[:, None] * outputs + o[None, :]
            x_at = x
            if not LABELS:
                x_at += first_input + r[:, None] * inputs + i[None, :]
            for start in range(0, rows, ROWS):
                left = r < rows - start
                g = tl.load(g_at, mask=left[:, None] & own[None, :], other=0.0)
                g_at += ROWS * outputs
                if LABELS:
                    label = tl.load(x_at + start + r, mask=left, other=-1)
                    y = (label[:, None] == (first_input + i)[None, :]).to(tl.float32)
                else:
                    y = tl.load(x_at, mask=left[:, None] & of_inputs[None, :], other=0.0)
                    x_at += ROWS * inputs
                sums = add_product(tl.trans(g), y, sums, PRECISION)
        update_columns(
            sums, of_weight, first_output, first_input, outputs, inputs, numbers,
            RULE, DECAYED, FLAG, OUTPUTS, INPUTS, PARTS,
        )  # fmt: skip
    if bias_sums is not None:  # noqa: SIM102  decided when it is compiled, what follows when it runs
        if first_input == 0:  # one of the tiles of these outputs
            total = tl.zeros((OUTPUTS,), tl.float64)  # of rows without end
            at = bias_sums + first_output + r[:, None] * outputs + o[None, :]
            for start in range(0, sum_rows, ROWS):
                left = r < sum_rows - start
                part = tl.load(at, mask=left[:, None] & own[None, :], other=0.0)
                total += tl.sum(part.to(tl.float32), 0).to(tl.float64)
                at += ROWS * outputs
            sum_of_bias = total.to(tl.float32)
            update(sum_of_bias, of_bias, first_output, o, own, numbers, RULE, DECAYED, FLAG)
            if of_more[0] is not None:
                update(sum_of_bias, of_more, first_output, o, own, numbers, RULE, DECAYED, FLAG)


@triton.jit
def update_kernel(
    grad, x, weight, first, second, step_at, bias_sums, bias, bias_first, bias_second,
    bias_step_at, more, more_first, more_second, more_step_at, rows, sum_rows, outputs, inputs,
    lr, lr_at, weight_decay, a, b, rest_a, rest_b, eps, correction_a, correction_b, log_a, log_b,
    RULE: tl.constexpr, DECAYED: tl.constexpr, FLAG: tl.constexpr, LABELS: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIBED: tl.constexpr,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Tiles of the gradient grad^T x, reduced over all rows, and the update of the weight's tile;
    the column sums of bias_sums update up to two biases. Where they are given, the learning rate is
    read at lr_at and the (raised) step counts at step_at. DESCRIBED: grad and x are tensor
    descriptors, and programs stay for several tiles."""
    if lr_at is not None:
        lr = tl.load(lr_at).to(tl.float32)
    numbers = (
        lr, weight_decay, a, b, rest_a, rest_b, eps, correction_a, correction_b, log_a, log_b,
    )  # fmt: skip
    of_weight = (weight, first, second, step_at)
    of_bias = (bias, bias_first, bias_second, bias_step_at)
    of_more = (more, more_first, more_second, more_step_at)
    if DESCRIBED:  # the loop costs registers, which plain tiles want for more programs
        tiles = tl.cdiv(outputs, OUTPUTS) * tl.cdiv(inputs, INPUTS)
        for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
            update_tile(
                number, grad, x, of_weight, bias_sums, of_bias, of_more, rows, sum_rows, outputs,
                inputs, numbers, RULE, DECAYED, FLAG, LABELS, PRECISION, DESCRIBED,
                OUTPUTS, INPUTS, ROWS, PARTS,
            )  # fmt: skip
    else:
        update_tile(
            tl.program_id(0), grad, x, of_weight, bias_sums, of_bias, of_more, rows, sum_rows,
            outputs, inputs, numbers, RULE, DECAYED, FLAG, LABELS, PRECISION, DESCRIBED,
            OUTPUTS, INPUTS, ROWS, PARTS,
        )  # fmt: skip


class Target(NamedTuple):
    """A parameter to be updated: what its rule keeps of its shape, and its numbers in this step."""

    value: Tensor
    kept: list[Tensor]
    settings: OptimizerSettings
    step: float = 1.0  # Adam's, this one included
    step_at: Tensor | None = None  # or where it is on the device
    lr_at: Tensor | None = None  # the learning rate, where it is on the device

    def memory(self) -> list[Tensor | None]:
        """In the kernel's order."""
        return [*[self.value, *self.kept, None, None][:3], self.step_at]

    def has_numbers_of(self, other: "Target") -> bool:
        """Whether both can be updated by one launch."""
        mine, others = (
            (t.settings, None if t.step_at is not None else t.step) for t in (self, other)
        )
        return mine == others and self.lr_at is other.lr_at

    def numbers(self) -> tuple:
        """In the kernel's order."""
        rule, lr, weight_decay, a, b, eps, _ = self.settings
        adam = rule in ("adam", "adamw")
        corrections, logs = (1.0, 1.0), (0.0, 0.0)
        if adam:
            corrections = 1 / (1 - a**self.step), 1 / (1 - b**self.step) ** 0.5
            logs = _log(a), _log(b)
        lr = 0.0 if self.lr_at is not None else lr
        return (lr, self.lr_at, weight_decay, a, b, 1 - a, 1 - b, eps, *corrections, *logs)


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


# Rows from which on torch's library makes a weight's gradient: a tile here sums all rows one after
# the other, which loses digits, and there are few tiles. Estimated, not measured; as in
# csrc/cuda/kernels/sweep_library.h.
_LONG_BATCH = 16384


def _long_gradient(grad: Tensor, x: Tensor, weight: Tensor, precision: Precision) -> Tensor:
    """grad^T x over many rows."""
    if x.dim() == 1:
        x = one_hot(x, weight.shape[1], grad)
    if precision.name != "bfloat16":
        return torch.mm(grad.T, x)
    narrow, narrow_x = precision.rounded(grad), precision.rounded(x)
    if not grad.is_cuda:
        return torch.mm(narrow.T.float(), narrow_x.float())
    return torch.mm(narrow.T, narrow_x, out_dtype=torch.float32)


def apply(
    grad: Tensor | None,
    x: Tensor | None,
    weight: Target | None,
    sums: Tensor | None,
    biases: list[Target],
    precision: Precision,
) -> None:
    """Updates what a gradient trains.

    Args:
        grad: (B, N), of a layer's output.
        x: (B, K), its input, or labels (B,) for their one-hot vectors.
        weight: (N, K), or None, and then there is neither grad nor x.
        sums: (P, N), whose column sums are the gradient of the biases.
        biases: up to two of (N,).
    """
    if weight is not None and weight.value.numel() > 0 and len(grad) >= _LONG_BATCH:
        # Laid out as a bias's gradient, which it is then for the kernel.
        found = _long_gradient(grad, x, weight.value, precision).view(1, -1)
        flat = weight._replace(value=weight.value.view(-1), kept=[k.view(-1) for k in weight.kept])
        _launch(None, None, None, found, [flat], precision)
    elif weight is not None and weight.value.numel() > 0:
        together = [bias for bias in biases if bias.has_numbers_of(weight)]
        _launch(grad, x, weight, sums, together, precision)
        biases = [bias for bias in biases if not bias.has_numbers_of(weight)]
    for bias in biases:
        _launch(None, None, None, sums, [bias], precision)


def _launch(
    grad: Tensor | None,
    x: Tensor | None,
    weight: Target | None,
    sums: Tensor | None,
    biases: list[Target],
    precision: Precision,
) -> None:
    target = weight or biases[0]
    nothing: list[Tensor | None] = [None] * 4
    outputs, inputs, rows = len(target.value), 1, 0
    of_weight, labels = nothing, False
    sum_rows = len(sums) if biases else 0
    if weight is not None:
        inputs, rows = weight.value.shape[1], len(grad)
        of_weight, labels = weight.memory(), x.dim() == 1
    if weight is None or labels:
        tile = tile_for(outputs, inputs, rows, precision.name)
    else:
        tile = precision.tile("update", outputs, inputs, rows, grad)
    of_biases = [tensor for bias in biases for tensor in bias.memory()]
    of_biases = [sums if biases else None, *of_biases, *nothing * (2 - len(biases))]
    settings = target.settings
    flag = settings.a != 0 if settings.rule == "gradient" else settings.nesterov
    operands = grad, x
    if tile.described:
        operands = (
            TensorDescriptor.from_tensor(precision.rounded(grad), [tile.depth, tile.rows]),
            TensorDescriptor.from_tensor(precision.rounded(x), [tile.depth, tile.columns]),
        )
    launched(update_kernel)[(tile.programs(target.value, outputs, inputs),)](
        *operands, *of_weight, *of_biases, rows, sum_rows, outputs, inputs, *target.numbers(),
        settings.rule, settings.weight_decay != 0, bool(flag), labels, precision.name,
        tile.described, tile.rows, tile.columns, tile.depth, tile.parts,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
