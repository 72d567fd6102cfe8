"""What a sweep is given, made at random, and what must come of it."""

import torch
from torch import Tensor

from fastdni import ops, use_backend
from fastdni.reference import OptimizerSettings, SweepNorm, SweepStage, SynthesizerParameters

CONTEXT = 5

# Of each optimizer the settings, and how many tensors it keeps beside a parameter.
OPTIMIZERS = {
    "gradient": OptimizerSettings("gradient", a=1.0),
    "sgd": OptimizerSettings("sgd", lr=0.1, weight_decay=0.01),
    "nesterov": OptimizerSettings("sgd_momentum", 0.1, 0.01, 0.9, 0.0, nesterov=True),
    "momentum": OptimizerSettings("sgd_momentum", 0.1, 0.0, 0.8, 0.3),
    "adam": OptimizerSettings("adam", 0.01, 0.02, 0.9, 0.99, 1e-8),
    "adamw": OptimizerSettings("adamw", 0.01, 0.1, 0.8, 0.999, 1e-6),
}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def synthesizer(
    inputs: int, outputs: int, n_hidden: int, context: bool, bias: bool = True
) -> SynthesizerParameters:
    widths = [inputs, *[outputs + 3] * n_hidden, outputs]
    weights = [normal(n, k) / k**0.5 for k, n in zip(widths, widths[1:], strict=False)]
    biases = [normal(n) for n in widths[1:]] if bias else []
    of_context = [normal(widths[1], CONTEXT)] if context else []
    if context and bias:
        of_context.append(normal(widths[1]))
    return SynthesizerParameters(weights, biases, *of_context)


def stages(
    widths=(7, 9, 6, 5),
    norm=False,
    activation="tanh",
    n_hidden=0,
    context=False,
    bias=True,
    unlocked=False,
    top=False,
    affine=True,
    momentum=0.1,
) -> list[SweepStage]:
    """Stages of random parameters; `top` gives the last one a synthesizer, too."""
    made = []
    for index, (k, n) in enumerate(zip(widths, widths[1:], strict=False)):
        last = index + 2 == len(widths)
        of_norm = None
        if norm and (not last or top):
            running = (normal(n), normal(n).abs() + 0.5, torch.tensor(3))
            of_norm = SweepNorm(
                normal(n) + 1 if affine else None, normal(n) if affine else None, running,
                momentum, 1e-5,
            )  # fmt: skip
        has = not last or top
        made.append(
            SweepStage(
                normal(n, k) / k**0.5,
                normal(n) if bias else None,
                of_norm,
                activation if has else "identity",
                synthesizer(n, n, n_hidden, context, bias) if has else None,
                synthesizer(widths[0], n, n_hidden, context, bias) if has and unlocked else None,
            )
        )
    return made


def cast(value, dtype: torch.dtype):
    """A copy of stages, settings, lists, tensors with floating-point tensors in a dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype, copy=True) if value.is_floating_point() else value.clone()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(cast(x, dtype) for x in value))
    if isinstance(value, list | tuple):
        return type(value)(cast(x, dtype) for x in value)
    return value


def fresh_state(settings: OptimizerSettings, parameters: list[Tensor]) -> list[Tensor]:
    """Some state, not zero, in the order of the op."""
    state = []
    for number, parameter in enumerate(parameters):
        generator = torch.Generator().manual_seed(number)
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = values.to(parameter.dtype)
        if settings.rule in ("gradient", "sgd_momentum"):
            state.append(values)
        elif settings.rule in ("adam", "adamw"):
            state += [values, values.square(), torch.tensor(float(number % 3))]
    return state


class Problem:
    """A step and all that it changes.

    Args:
        seed: of the data; by default the number of rows.
        rate: the learning rate, in place of that of the settings.
    """

    def __init__(
        self,
        given: list[SweepStage],
        batch=4,
        criterion="cross_entropy",
        settings="sgd",
        explicit_context=False,
        masked=(),
        dtype=torch.float64,
        seed=None,
        rate=None,
    ):
        classes, inputs = given[-1].weight.shape[0], given[0].weight.shape[1]
        generator = torch.Generator().manual_seed(batch if seed is None else seed)
        self.x = torch.randn(batch, inputs, generator=generator, dtype=torch.float64)
        self.target = torch.randint(min(classes, CONTEXT), (batch,), generator=generator)
        if criterion == "mse":
            self.target = torch.randn(batch, classes, generator=generator, dtype=torch.float64)
            explicit_context = True
        self.context = None
        if explicit_context:
            self.context = torch.randn(batch, CONTEXT, generator=generator, dtype=torch.float64)
        self.given, self.batch, self.criterion, self.dtype = given, batch, criterion, dtype
        self.settings = OPTIMIZERS[settings]
        if rate is not None:
            self.settings = self.settings._replace(lr=rate)
        self.active = [int(s not in masked) for s in range(len(given) + 1)]

    def run(self, backend: str, dtype: torch.dtype | None = None, steps=1, **how) -> list[Tensor]:
        """Everything after some steps: results, parameters, state, statistics."""
        dtype = dtype or self.dtype
        own = cast(cast(self.given, self.dtype), dtype)
        x, target, context = (
            cast(cast(t, self.dtype), dtype) if t is not None else None
            for t in (self.x, self.target, self.context)
        )
        with use_backend(backend):
            plan = ops.SweepPlan(own, self.batch, self.criterion, **how)
        groups = [0 if self.active[s] else -1 for s in plan.parameter_stages]
        updated = [p for p, g in zip(plan.parameters, groups, strict=True) if g == 0]
        state = fresh_state(self.settings, updated)
        for _ in range(steps):
            results = ops.sweep_(
                plan, x, target, context, state, groups, ops.flat([self.settings]), self.active
            )
        return [*results, *plan.parameters, *state, *plan.statistics]


def arguments(backend="cpu", **how) -> tuple:
    """A problem, its plan, and Adam's state, groups and settings for a call of the op."""
    one = Problem(stages(context=True, norm=True), 6, settings="adam", **how)
    with use_backend(backend):
        plan = ops.SweepPlan(one.given, 6, one.criterion)
    state = [
        t for p in plan.parameters for t in (p.clone(), p.square(), torch.tensor(1.0))
    ]  # fmt: skip
    settings = ops.flat([one.settings])
    groups = [0] * len(plan.parameters)
    return one, plan, state, groups, settings


# (stages, problem) by name: every kind of stage, synthesizer and criterion, odd sizes.
CASES = {
    "plain": ({}, {}),
    "wide rows": ({"widths": (70, 130, 65, 5)}, {"batch": 33, "settings": "adam"}),
    "a wide layer": ({"widths": (7, 70, 5)}, {"batch": 17}),
    "one of each": ({"widths": (1, 1, 1)}, {"batch": 1}),
    "one row": ({"context": True, "n_hidden": 1}, {"batch": 1, "settings": "adam"}),
    "more stages than blocks": ({"widths": (3,) * 12}, {"batch": 5, "settings": "momentum"}),
    "mlp": ({"n_hidden": 2, "context": True}, {"settings": "adamw", "batch": 17}),
    "norm": ({"norm": True, "context": True}, {"settings": "nesterov", "batch": 35}),
    "norms in a row": ({"widths": (7, 9, 6, 8, 5), "norm": True, "n_hidden": 1}, {"batch": 20}),
    "norm, many rows": ({"norm": True}, {"batch": 299}),
    "plain averages": ({"norm": True, "affine": False, "momentum": None}, {"batch": 20}),
    "mse": ({"context": True, "activation": "sigmoid"}, {"criterion": "mse", "batch": 18}),
    "given context": ({"context": True, "activation": "relu"}, {"explicit_context": True}),
    "no biases": ({"bias": False, "context": True, "n_hidden": 1}, {"settings": "momentum"}),
    "unlocked": (
        {"unlocked": True, "context": True, "n_hidden": 1},
        {"settings": "adam", "batch": 19},
    ),
    "unlocked, norm": ({"unlocked": True, "norm": True}, {"batch": 34, "settings": "gradient"}),
    "masked": ({"context": True}, {"masked": (1,), "settings": "adam"}),
    "masked, norm": ({"norm": True, "unlocked": True}, {"masked": (0, 2), "batch": 20}),
}


def problem(name, **more):
    torch.manual_seed(len(name))
    given, how = CASES[name]
    return Problem(stages(**given), **how, **more), given
