"""Cuts a network into the parts of processes."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fastdni.distributed.stage import Slice
from fastdni.network import DecoupledSequential
from fastdni.synthesizers import BasicSynthesizer, start_at_zero


def balanced(costs: Sequence[float], parts: int) -> list[int]:
    """Where consecutive things are cut so that the dearest part is as cheap as can be: begins, and
    the end."""
    count = len(costs)
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[p][n]: the dearest of p parts of the first n things, and where its last part begins.
    best = [[(sums[n], 0) for n in range(count + 1)]]
    for p in range(1, parts):
        row = [(float("inf"), 0)] * (count + 1)
        for n in range(p + 1, count + 1):
            row[n] = min((max(best[-1][m][0], sums[n] - sums[m]), m) for m in range(p, n))
        best.append(row)
    cuts, end = [count], count
    for p in range(parts - 1, -1, -1):
        end = best[p][end][1]
        cuts.append(end)
    return cuts[::-1]


def split(
    model: nn.Module,
    mesh: DeviceMesh,
    example_input: Tensor | None = None,
    costs: Sequence[float] | None = None,
    seed: int | None = None,
) -> tuple[nn.Module, nn.Module | None]:
    """This process's part of a network, and the synthesizer above it.

    Args:
        model: a `DecoupledSequential` (of `decouple`, say), which is cut between its stages; or an
            nn.Sequential, cut between its layers.
        mesh: of `init`.
        example_input: (B, ...), for an nn.Sequential: a linear synthesizer is made for each cut, of
            the width that the activation has there.
        costs: of each stage or layer; by default the number of its parameters.
        seed: from which all parameters are drawn again: the same ones whatever the mesh. None: they
            are those of `model`.

    Raises:
        TypeError, ValueError: the model is neither, has fewer stages than the mesh, or there is no
            example_input.
    """
    stage, _ = mesh.get_coordinate()
    parts = mesh.size(0)
    if isinstance(model, DecoupledSequential) and (model.input_synthesizers or model.bp_lambda):
        raise ValueError(
            "distributed.split: model must have no input_synthesizers and a bp_lambda of 0: what "
            "they need is in other processes"
        )
    if seed is not None:
        _draw_again(model, seed)
    if isinstance(model, DecoupledSequential):
        things, between = list(model.stages), list(model.synthesizers)
    elif isinstance(model, nn.Sequential):
        things, between = list(model), None
    else:
        raise TypeError(
            "distributed.split: model must be a DecoupledSequential or an nn.Sequential, got "
            f"{type(model).__name__}; cut another one yourself, and give DecoupledStage its part"
        )
    if len(things) < parts:
        raise ValueError(
            f"distributed.split: model must have as many stages as the mesh, {parts}, or more, got "
            f"{len(things)}"
        )
    if costs is None:
        costs = [1 + sum(p.numel() for p in thing.parameters()) for thing in things]
    if len(costs) != len(things):
        raise ValueError(f"distributed.split: costs must be {len(things)}, got {len(costs)}")
    cuts = balanced(costs, parts)
    begin, end = cuts[stage], cuts[stage + 1]
    own, last = things[begin:end], stage == parts - 1
    if between is not None:
        part = own[0] if len(own) == 1 else DecoupledSequential(
            *own, synthesizers=between[begin : end - 1])  # fmt: skip
        return part, None if last else between[end - 1]
    if example_input is None and parts > 1:
        raise ValueError(
            "distributed.split: example_input must be given for an nn.Sequential, to make "
            "synthesizers of the width that activations have where it is cut"
        )
    part = Slice(OrderedDict((str(begin + n), layer) for n, layer in enumerate(own)))
    return part, None if last else _synthesizer(model, end, example_input)


def _synthesizer(model: nn.Sequential, end: int, example_input: Tensor) -> nn.Module:
    training = model.training
    model.eval()
    with torch.no_grad():
        h = model[:end](example_input)
    model.train(training)
    if h.dim() != 2:
        raise ValueError(
            "distributed.split: the activation at a cut must be (B, features) for a linear "
            f"synthesizer, got {tuple(h.shape)}; give DecoupledStage its part and a synthesizer"
        )
    like = next((p for p in model.parameters() if p.is_floating_point()), h)
    return start_at_zero(BasicSynthesizer(h.shape[1])).to(like)


def _draw_again(model: nn.Module, seed: int) -> None:
    """All parameters, each module's as it draws them; synthesizers start at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    for module in model.modules():
        if isinstance(module, BasicSynthesizer):
            start_at_zero(module)
