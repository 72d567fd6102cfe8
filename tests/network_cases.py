"""Decoupled networks and optimizers for the tests, and everything that steps leave behind."""

import copy

import torch
from torch import Tensor, nn

import fastdni
from fastdni import BasicSynthesizer, DecoupledSequential

CONTEXT = 5
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "identity": nn.Identity}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.001),
    "nesterov": lambda p: torch.optim.SGD(
        p, lr=0.0003, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "dampened": lambda p: torch.optim.SGD(p, lr=0.0003, momentum=0.8, dampening=0.3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.003, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.003),
}


def network(
    widths=(7, 9, 6, 5),
    norm=False,
    activation="relu",
    n_hidden=0,
    context=False,
    unlocked=False,
    dtype=torch.float64,
    bias=True,
    **options,
) -> DecoupledSequential:
    """A network all of whose stages can be fused; no parameter starts at zero.

    `bias`: of the layers in front of a BatchNorm. Its gradient is zero but for rounding, and Adam
    makes steps of that noise: with Adam nothing can be compared then.
    """
    stages = []
    for index, (k, n) in enumerate(zip(widths, widths[1:], strict=False)):
        top = index == len(widths) - 2
        layers: list[nn.Module] = [nn.Linear(k, n, bias=bias or not norm or top)]
        if norm and not top:
            layers.append(nn.BatchNorm1d(n))
        if not top:
            layers.append(ACTIVATIONS[activation]())
        stages.append(nn.Sequential(*layers))

    def synthesizer(inputs: int, outputs: int) -> BasicSynthesizer:
        return BasicSynthesizer(
            outputs,
            n_hidden=n_hidden,
            hidden_dim=outputs + 2,
            trigger_dim=inputs,
            context_dim=CONTEXT if context else None,
        )

    net = DecoupledSequential(
        *stages,
        synthesizers=[synthesizer(n, n) for n in widths[1:-1]],
        input_synthesizers=[synthesizer(widths[0], n) for n in widths[1:-1]] if unlocked else None,
        **options,
    ).to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    return net


def local(net: DecoupledSequential) -> DecoupledSequential:
    """A copy whose stages all take local autograd: hooks that do nothing see to it."""
    twin = copy.deepcopy(net)
    for stage in twin.stages:
        stage.register_forward_hook(lambda module, arguments, output: None)
    return twin


def batch(net: DecoupledSequential, rows=6, criterion="cross_entropy", seed=0, order=None) -> dict:
    """Arguments of `net.step`, without the optimizer; `order`: a permutation of the rows."""
    if order is not None:
        given = batch(net, rows, criterion, seed)
        return {k: v[order] if isinstance(v, Tensor) else v for k, v in given.items()}
    generator = torch.Generator().manual_seed(seed)
    dtype = next(net.parameters()).dtype
    inputs = next(m for m in net.stages.modules() if isinstance(m, nn.Linear)).in_features
    outputs = [m for m in net.stages.modules() if isinstance(m, nn.Linear)][-1].out_features

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    arguments = {"x": normal(rows, inputs), "criterion": criterion}
    if criterion == "mse":
        taken = any(getattr(s, "input_context", None) is not None for s in net.synthesizers)
        return arguments | {
            "target": normal(rows, outputs),
            "context": normal(rows, CONTEXT) if taken else None,
        }
    labels = torch.randint(min(outputs, CONTEXT), (rows,), generator=generator)
    return arguments | {"target": labels}


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The optimizer's state, parameter by parameter."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [optimizer.state[p] for p in held if p in optimizer.state]
    return [entry[key] for entry in kept for key in sorted(entry)]


def train(net, optimizer, steps=20, backend="auto", masks=None, **how) -> list[Tensor]:
    """Takes steps on batches of their own.

    Returns:
        The results of every step, then parameters and running statistics, then optimizer state.
    """
    results = []
    with fastdni.use_backend(backend):
        for number in range(steps):
            mask = None if masks is None else masks[number % len(masks)]
            arguments = batch(net, seed=number, **how)
            results += net.step(optimizer=optimizer, update_mask=mask, **arguments)
    return results + list(net.state_dict().values()) + state_of(optimizer)


def snapshot(net, optimizer) -> list[Tensor]:
    """Everything that a step may change, copied."""
    return [t.clone() for t in (*net.state_dict().values(), *state_of(optimizer))]


def structure(net: DecoupledSequential):
    """What the engine knows of the network: `.reasons` why stages are not fused, `.parts`."""
    return net._trainer.structure(net, "test")


# ---- shorter ----


def same(a, b, tolerance=1e-12):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, equal_nan=True)


def optimizer_of(net):
    return OPTIMIZERS["sgd"](net.parameters())


def steps_of(net, optimizer, count=3, **how) -> list[Tensor]:
    """The parameters, statistics and results after some steps."""
    return train(net, optimizer, steps=count, **how)


def reasons(net, optimizer, **how) -> list[str]:
    """Of each stage why it is not fused."""
    return [row["reason"] for row in fastdni.explain(net, batch(net)["x"], optimizer, **how).rows]
