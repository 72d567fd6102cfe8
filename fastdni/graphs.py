"""CUDA graphs of a training step."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastdni.network import DecoupledSequential, StepResult


def make_graphed_step(
    net: DecoupledSequential,
    optimizer: Optimizer | Sequence[Optimizer],
    x: Tensor,
    target: Tensor,
    warmup: int = 3,
    **arguments,
) -> Callable[[Tensor, Tensor], StepResult]:
    """Captures `net.step` in a CUDA graph; each call of the result is one replay.

    Args:
        net: the network, on a CUDA device.
        optimizer: as for `net.step`; its groups must be `capturable=True`.
        x, target: a batch of the shapes to come. It is trained on in the warm-up and the capture.
        warmup: steps before the capture.
        arguments: further ones of `net.step`; tensors among them keep their memory.

    Returns:
        step(x, target) -> StepResult. The result's tensors are the graph's own: the next call
        writes over them.

    Raises:
        RuntimeError: the network is not on a CUDA device, or an optimizer is not capturable.
    """
    if x.device.type != "cuda":
        raise RuntimeError(
            f"make_graphed_step: x must be on a CUDA device, got {x.device}; on the CPU net.step "
            "is one call already"
        )
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
    for each in optimizers:
        if not all(group.get("capturable") for group in each.param_groups):
            raise RuntimeError(
                f"make_graphed_step: {type(each).__name__} must be made with capturable=True, so "
                "that its step count and learning rate live on the device"
            )
    static_x, static_target = x.clone(), target.clone()

    def run() -> StepResult:
        return net.step(static_x, static_target, optimizer, **arguments)

    side = torch.cuda.Stream(x.device)
    side.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(side):
        for _ in range(warmup):
            run()
    torch.cuda.current_stream(x.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def step(x: Tensor, target: Tensor) -> StepResult:
        static_x.copy_(x)
        static_target.copy_(target)
        graph.replay()
        return result

    return step
