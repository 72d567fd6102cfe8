"""CUDA graphs of a training step."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastdni.network import Criterion, DecoupledSequential, StepResult
from fastdni.training.trainer import Trainer


def make_graphed_step(
    net: DecoupledSequential,
    optimizer: Optimizer | Sequence[Optimizer],
    x: Tensor,
    target: Tensor,
    warmup: int = 3,
    criterion: Criterion = "cross_entropy",
    context: Tensor | None = None,
    update_mask: Sequence[bool] | None = None,
) -> Callable[[Tensor, Tensor], StepResult]:
    """Captures `net.step` in a CUDA graph; each call of the result is one replay.

    The graph's memory is its own, and lives as long as the result. (That of a `net.step` which you
    capture yourself is the network's, which lets it go when modules change, are moved or loaded, or
    when it meets many batch sizes.)

    The learning rates are read at every call, as a scheduler leaves them; everything else of the
    optimizer, and the modules, are as they were at the capture.

    Args:
        net: the network, on a CUDA device.
        optimizer: as for `net.step`; its groups must be `capturable=True`.
        x, target: a batch of the shapes to come. It is trained on in the warm-up and the capture.
        warmup: steps before the capture, at least one.
        criterion, context, update_mask: as for `net.step`; a context tensor keeps its memory.

    Returns:
        step(x, target) -> StepResult. The result's tensors are the graph's own: the next call
        writes over them. It raises ValueError for a batch of another shape.

    Raises:
        RuntimeError: the network is not on a CUDA device, or an optimizer is not capturable.
        ValueError: no warm-up.
    """
    if x.device.type != "cuda":
        raise RuntimeError(
            f"make_graphed_step: x must be on a CUDA device, got {x.device}; on the CPU net.step "
            "is one call already"
        )
    if warmup < 1:
        raise ValueError(f"make_graphed_step: warmup must be at least 1, got {warmup}")
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
    for each in optimizers:
        if not all(group.get("capturable") for group in each.param_groups):
            raise RuntimeError(
                f"make_graphed_step: {type(each).__name__} must be made with capturable=True, so "
                "that its step count and learning rate live on the device"
            )
    return _GraphedStep(
        net,
        (optimizer, criterion, context, None if update_mask is None else list(update_mask)),
        [_Rate(group, x.device) for each in optimizers for group in each.param_groups],
        (x.clone(), target.clone()),
        warmup,
    )


class _GraphedStep:
    """A captured step, with the memory that its graph uses."""

    def __init__(self, net, how: tuple, rates: "list[_Rate]", data: tuple[Tensor, Tensor], warmup):
        # Plans of its own: ordinary steps of the network leave what the graph reads as it is.
        self._net, self._trainer = net, Trainer()
        self._how, self._rates, self._data = how, rates, data
        for rate in rates:
            rate.take()
        try:
            with torch.cuda.device(data[0].device):
                # The same for both: what the warm-up leaves in its stream's memory need not be
                # made in every replay. (torch's own is one of the first GPU that captured.)
                stream = torch.cuda.Stream()
                self._warm_up(warmup, stream)
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph, stream=stream):
                    self._result = self._run()
        finally:
            for rate in rates:
                rate.give_back()

    def _run(self) -> StepResult:
        return StepResult(*self._trainer.step(self._net, "net.step", *self._data, *self._how))

    def _warm_up(self, steps: int, stream: torch.cuda.Stream) -> None:
        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(steps):
                self._run()
        current.wait_stream(stream)

    def __call__(self, x: Tensor, target: Tensor) -> StepResult:
        for name, ours, given in zip(("x", "target"), self._data, (x, target), strict=True):
            if given.shape != ours.shape:
                raise ValueError(
                    f"make_graphed_step: {name} must be {tuple(ours.shape)} as at the capture, got "
                    f"{tuple(given.shape)}"
                )
        for ours, given in zip(self._data, (x, target), strict=True):
            ours.copy_(given)
        for rate in self._rates:
            rate.refresh()
        self._graph.replay()
        return self._result


class _Rate:
    """A group's learning rate where a graph reads it: a tensor of the group's own, or one that
    follows the group's number."""

    def __init__(self, group: dict, device: torch.device):
        self._group, self._number = group, group["lr"]
        self._followed = not isinstance(self._number, Tensor)
        if self._followed:
            self._tensor = torch.tensor(float(self._number), dtype=torch.float64, device=device)

    def take(self) -> None:
        if self._followed:
            self._group["lr"] = self._tensor

    def give_back(self) -> None:
        if self._followed:
            self._group["lr"] = self._number

    def refresh(self) -> None:
        if self._followed and self._group["lr"] != self._number:
            self._number = self._group["lr"]
            self._tensor.fill_(self._number)
