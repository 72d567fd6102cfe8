"""What the arguments of a step must be: checked before anything is written.

Rules of the sweep itself are in csrc/ops; here are those that come before it, and those of stages
that take local autograd.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import UninitializedTensorMixin

from fastdni import ops
from fastdni.training import criteria
from fastdni.training.stages import begins, has_norm, plain_head
from fastdni.training.step import Step
from fastdni.training.structure import Network, Structure


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast rounds the operands of products to; None for nothing."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


# ---- what can be told at once ----


def prepared(
    net: Network, caller: str, x, target, criterion, context, update_mask: Iterable | None
) -> Step:
    """The arguments of a step, checked as far as they can be without a look at the stages.

    Raises:
        RuntimeError, ValueError: see `DecoupledSequential.step`.
    """
    if not net.training:
        raise RuntimeError(f"{caller}: the network must be in training mode; call net.train()")
    if torch.is_inference_mode_enabled():
        raise RuntimeError(f"{caller}: training is not possible in torch.inference_mode()")
    if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[0] == 0:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise RuntimeError(f"{caller}: x must be a tensor of at least one row, got {got}")
    named = isinstance(criterion, str)
    if criterion not in criteria.FUNCTIONS if named else not callable(criterion):
        raise ValueError(
            f'{caller}: criterion must be "cross_entropy", "mse" or a callable, got {criterion!r}'
        )
    name = criteria.known(criterion).name
    if named and not isinstance(target, Tensor):
        raise RuntimeError(
            f"{caller}: target must be a tensor for {name}, got {type(target).__name__}"
        )
    if name is not None and not named and not criteria.takes(name, target, x):
        name = None  # what torch makes of such a target
    if context is not None and not isinstance(context, Tensor):
        raise RuntimeError(f"{caller}: context must be a tensor, got {type(context).__name__}")
    active = _active(caller, len(net.stages), update_mask)
    x, context = _dense(x), _dense(context)
    if name is not None:
        target = _dense(target)
    return Step(caller, x, target, criterion, name, context, active)


def _active(caller: str, count: int, update_mask: Iterable | None) -> list[int]:
    """For each stage, and one above, whether (1) or not (0) it is updated."""
    if update_mask is None:
        return [1] * (count + 1)
    try:
        mask = [] if isinstance(update_mask, str) else [*map(bool, update_mask)]
    except (TypeError, RuntimeError):
        mask = []
    if len(mask) != count:
        raise ValueError(
            f"{caller}: update_mask must be one boolean for each of the {count} stages, got "
            f"{len(mask) or type(update_mask).__name__}"
        )
    return [*map(int, mask), 1]


def _dense(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.layout is torch.strided else tensor.to_dense()


def check_initialized(caller: str, parameters: list[Tensor]) -> None:
    """Lazy layers have to have seen an input."""
    if any(isinstance(p, UninitializedTensorMixin) for p in parameters):
        raise RuntimeError(
            f"{caller}: lazy layers must have their shapes before the step: make a dry run, "
            "`net(x)`, and the optimizer after that"
        )


def check_real(caller: str, x: Tensor, parameters: list[Tensor]) -> None:
    """Refuses to train real parameters on data without values."""
    fake = isinstance(x, FakeTensor) or active_fake_mode() is not None
    if fake and not any(isinstance(p, FakeTensor) for p in parameters):
        raise RuntimeError(
            f"{caller}: x must have values, as the parameters have, got a fake tensor (or a "
            "FakeTensorMode, in which nothing is computed)"
        )


def check_devices(step: Step, parameters: list[Tensor]) -> None:
    """Tensors belong on the parameters' device."""
    device = parameters[0].device if parameters else step.x.device
    for name, tensor in (("x", step.x), ("target", step.target), ("context", step.context)):
        if isinstance(tensor, Tensor) and tensor.device != device:
            raise RuntimeError(
                f"{step.caller}: {name} must be on the parameters' device {device}, got "
                f"{tensor.device}"
            )


def keep_apart(step: Step, written: Iterable[Tensor | None]) -> None:
    """Copies data that lies in memory which the step writes, such as a running statistic."""
    places = [t.data_ptr() for t in written if t is not None and t.numel()]
    for name in ("x", "target", "context"):
        given = getattr(step, name)
        if not isinstance(given, Tensor):
            continue
        memory = given.untyped_storage()  # of all that may be a view of the same
        begin = memory.data_ptr()
        end = begin + memory.nbytes()
        if any(begin <= place < end for place in places):
            setattr(step, name, given.clone())


def labels_of(structure: Structure, step: Step) -> criteria.Labels | None:
    """How the labels, and the contexts made of them, are handed to a sweep; None: as they are."""
    known = criteria.known(step.criterion)
    if step.name != "cross_entropy" or not isinstance(step.target, Tensor):
        return None
    if step.target.dtype != torch.uint8 and known.ignored == criteria.IGNORED:
        return None
    modules = (*structure.synthesizers, *structure.input_synthesizers)
    widths = {getattr(module, "context_dim", None) for module in modules} - {None}
    like = next((p for p in structure.parameters if p.is_floating_point()), step.x)
    return criteria.Labels(known.ignored, like, widths.pop() if len(widths) == 1 else None)


def normalize(structure: Structure, step: Step) -> None:
    """Brings what torch's own losses take into the form that the fused ones take, or leaves it to
    torch's."""
    if step.name == "mse" and not isinstance(step.criterion, str):
        head = plain_head(structure.stages[-1])
        if head is None or step.target.shape != (len(step.x), head.weight.shape[0]):
            step.name = None  # torch broadcasts, and warns
    step.labels = labels_of(structure, step)
    if step.labels is not None:
        step.target, step.context = step.labels(step.target, step.context)


# ---- what the stages that take local autograd have to be given ----


def check_inputs(structure: Structure, step: Step) -> None:
    """What a sweep would find out before it writes, for steps that are more than one sweep."""
    caller, x = step.caller, step.x
    flattened, first = begins(structure.stages[0])
    flat = x.flatten(1) if flattened and x.dim() > 2 else x
    if type(first) is nn.Linear:
        inputs, dtype = first.weight.shape[1], first.weight.dtype
        if flat.dim() < 2 or flat.shape[-1] != inputs:
            raise RuntimeError(f"{caller}: x must be (B, {inputs}), got {tuple(x.shape)}")
        if x.dtype != dtype and autocast_dtype(x) is None:
            raise RuntimeError(
                f"{caller}: x must have the parameters' dtype {dtype}, got {x.dtype}"
            )
    if len(x) == 1 and flat.dim() == 2 and any(map(has_norm, structure.stages)):
        raise RuntimeError(
            f"{caller}: x must have at least 2 rows for BatchNorm in training, got 1"
        )
    if step.name is not None:
        _check_target(structure, step, flat)
    every = (*structure.synthesizers, *structure.input_synthesizers)
    takers = [module for module in every if getattr(module, "context_dim", None) is not None]
    if step.context is not None:
        for synthesizer in takers:
            _check_context(step, synthesizer)
    elif takers:
        _check_labels(step, min(module.context_dim for module in takers))


def _check_target(structure: Structure, step: Step, flat: Tensor) -> None:
    caller, x, target = step.caller, step.x, step.target
    if target.dim() == 0 or len(target) != len(x):
        raise RuntimeError(
            f"{caller}: target must have x's {len(x)} rows, got {tuple(target.shape)}"
        )
    floating = next((p.dtype for p in structure.parameters if p.is_floating_point()), None)
    if step.name == "cross_entropy" and target.dtype != torch.int64:
        raise RuntimeError(
            f"{caller}: target must be int64 labels for cross_entropy, got {target.dtype}"
        )
    if step.name == "mse" and floating is not None and target.dtype != floating:
        raise RuntimeError(
            f"{caller}: target must have the parameters' dtype {floating}, got {target.dtype}"
        )
    head = plain_head(structure.stages[-1])
    if head is not None and flat.dim() == 2:
        outputs = head.weight.shape[0]
        ops.sweep_check_target(caller, target, len(x), outputs, step.name)


def _check_context(step: Step, synthesizer: nn.Module) -> None:
    """A context that was given, for a synthesizer that takes one."""
    caller, x, context, width = step.caller, step.x, step.context, synthesizer.context_dim
    fits = context.dim() > 0 and context.shape[-1] == width
    if not fits or (x.dim() == 2 and context.shape != (len(x), width)):
        raise RuntimeError(
            f"{caller}: context must be (B, C) = ({len(x)}, {width}), got {tuple(context.shape)}"
        )
    dtype = next((p.dtype for p in synthesizer.parameters() if p.is_floating_point()), None)
    if dtype not in (None, context.dtype) and autocast_dtype(context) is None:
        raise RuntimeError(
            f"{caller}: context must have the parameters' dtype {dtype}, got {context.dtype}"
        )


def _check_labels(step: Step, width: int) -> None:
    """Labels of which one-hot contexts can be made; `width`: that of the narrowest."""
    caller, target = step.caller, step.target
    if not isinstance(target, Tensor) or target.dtype != torch.int64 or target.dim() != 1:
        raise RuntimeError(
            f"{caller}: context must be (B, C) = ({len(step.x)}, {width}), got None, and target "
            "holds no labels to make it from"
        )
    if target.numel() and target.device.type == "cpu" and target.max() >= width:
        raise RuntimeError(
            f"{caller}: context must be given, because the label {target.max()} has no place in a "
            f"one-hot context of width {width}"
        )
