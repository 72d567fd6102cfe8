"""Synthesizers, and how an interface evaluates and trains one.

Any `nn.Module` taking `(trigger, context)` is a synthesizer. `BasicSynthesizer` is evaluated by the
fused op, once a step; another module is called as it is, once for the prediction and once for the
regression, because it may hold dropout or batch statistics.
"""

from numbers import Integral

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from fastdni import ops, reference
from fastdni.ops import SynthesizerParameters


class BasicSynthesizer(nn.Module):
    """A perceptron that predicts a message from a trigger: linear, or with hidden ReLU layers.

        a_0 = h W_0^T + b_0 + ctx Q^T + q;   a_i = relu(a_{i-1}) W_i^T + b_i;   message = a_n

    It starts by predicting little: the last layer's weight is zero (without hidden layers also the
    context's), its bias is not. Parameters are drawn in the order input_trigger, input_context,
    layers.

    Args:
        output_dim: size N of the message's last dimension.
        n_hidden: number n of hidden layers.
        hidden_dim: their width H; `output_dim` by default.
        trigger_dim: size K of the trigger's last dimension; `output_dim` by default.
        context_dim: size C of the context's last dimension; None for no context.
        bias: whether the layers have biases.

    Raises:
        ValueError: a size is not a positive integer, or n_hidden is negative.

    Source:
        Jaderberg et al. 2016 (arXiv 1608.05343), section 2 and appendix; the label-conditioned form
        (cDNI) takes one-hot labels as context.

    Example:
        >>> synthesizer = fastdni.BasicSynthesizer(256, n_hidden=1, context_dim=10)
        >>> synthesizer(torch.randn(64, 256), torch.randn(64, 10)).shape
        torch.Size([64, 256])
    """

    def __init__(
        self,
        output_dim: int,
        n_hidden: int = 0,
        hidden_dim: int | None = None,
        trigger_dim: int | None = None,
        context_dim: int | None = None,
        bias: bool = True,
    ):
        super().__init__()
        hidden_dim = output_dim if hidden_dim is None else hidden_dim
        trigger_dim = output_dim if trigger_dim is None else trigger_dim
        sizes = {"output_dim": output_dim, "hidden_dim": hidden_dim, "trigger_dim": trigger_dim}
        if context_dim is not None:
            sizes["context_dim"] = context_dim
        for name, size in sizes.items():
            if not isinstance(size, Integral) or size < 1:
                raise ValueError(
                    f"BasicSynthesizer: {name} must be a positive integer, got {size!r}"
                )
        if not isinstance(n_hidden, Integral) or n_hidden < 0:
            raise ValueError(
                f"BasicSynthesizer: n_hidden must be an integer from 0 on, got {n_hidden!r}"
            )

        first_dim = output_dim if n_hidden == 0 else hidden_dim
        self.input_trigger = nn.Linear(trigger_dim, first_dim, bias=bias)
        self.input_context = (
            None if context_dim is None else nn.Linear(context_dim, first_dim, bias=bias)
        )
        widths = [hidden_dim] * n_hidden + [output_dim]
        self.layers = nn.ModuleList(
            nn.Linear(widths[i], widths[i + 1], bias=bias) for i in range(n_hidden)
        )

        last = self.layers[-1] if n_hidden else self.input_trigger
        nn.init.zeros_(last.weight)
        if n_hidden == 0 and self.input_context is not None:
            nn.init.zeros_(self.input_context.weight)

    @property
    def context_dim(self) -> int | None:
        """The width of the context that it takes; None: it takes none."""
        return None if self.input_context is None else self.input_context.in_features

    def forward(self, trigger: Tensor, context: Tensor | None = None) -> Tensor:
        """Predicts the message.

        Args:
            trigger: h, (..., K).
            context: ctx, (..., C), leading dimensions broadcast to the trigger's; not looked at
                when the synthesizer was made without context_dim.

        Returns:
            The message, (..., N). An ordinary differentiable call, in every argument.

        Raises:
            RuntimeError: the context is missing, or a shape, dtype or device does not fit.
        """
        a = self.input_trigger(trigger)
        if self.input_context is not None:
            a = a + self.input_context(_required(context, self.input_context.weight))
        for layer in self.layers:
            a = layer(F.relu(a))
        return a


def start_at_zero(synthesizer: BasicSynthesizer) -> BasicSynthesizer:
    """Lets a synthesizer predict zero at first, as in the paper: also the last layer's bias is
    zero.

    Args:
        synthesizer: changed in place.

    Returns:
        The same.
    """
    last = synthesizer.layers[-1:] or [synthesizer.input_trigger, synthesizer.input_context]
    for layer in last:
        if layer is not None:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
    return synthesizer


def _required(context: Tensor | None, context_weight: Tensor) -> Tensor:
    if context is None:
        raise RuntimeError(
            f"BasicSynthesizer: context must be (..., {context_weight.shape[1]}), got None; "
            "wrap the call in synthesizer_context(context)"
        )
    return context


def is_changed(module: nn.Module) -> bool:
    """Whether calling the module does more, or something else, than its class says."""
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


_PLAIN_TENSORS = (nn.Parameter, Tensor)
_PLAIN_BIASES = (*_PLAIN_TENSORS, type(None))


def plain_parameters(synthesizer: nn.Module) -> SynthesizerParameters | None:
    """A BasicSynthesizer's parameters, if calling it is no more than its formula: no hook, no other
    class, no parametrization. Otherwise None.

    Runs at every step, so it looks straight into the modules' dictionaries.
    """
    if type(synthesizer) is not BasicSynthesizer or _has_any_global_hook():
        return None
    if is_changed(synthesizer):
        return None
    modules = synthesizer._modules
    linears = [modules["input_trigger"], *modules["layers"]._modules.values()]
    if synthesizer.input_context is not None:
        linears.append(synthesizer.input_context)
    weights, biases = [], []
    for linear in linears:
        if type(linear) is not nn.Linear or is_changed(linear):
            return None
        weight, bias = linear._parameters["weight"], linear._parameters["bias"]
        if type(weight) not in _PLAIN_TENSORS or type(bias) not in _PLAIN_BIASES:
            return None
        weights.append(weight)
        if bias is not None:
            biases.append(bias)
    if biases and len(biases) != len(weights):
        return None
    if synthesizer.input_context is None:
        return SynthesizerParameters(weights, biases)
    context_weight, context_bias = weights.pop(), biases.pop() if biases else None
    return SynthesizerParameters(weights, biases, context_weight, context_bias)


def check_prediction(prediction: Tensor, like: Tensor) -> None:
    """Refuses a prediction that cannot stand for the message, or the trigger's gradient, `like`."""
    if prediction.shape != like.shape:
        raise RuntimeError(
            f"synthesizer: the prediction must have the shape {tuple(like.shape)} of the message "
            f"(or of the trigger, whose gradient it is), got {tuple(prediction.shape)}"
        )


def _autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast would cast the tensor to for a product; None for nothing."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return None if tensor.dtype == torch.float64 else torch.get_autocast_dtype(device)


class _FusedEvaluation:
    """A BasicSynthesizer on one trigger: one forward op, whatever is asked of it."""

    def __init__(self, parameters: SynthesizerParameters, trigger: Tensor, context: Tensor | None):
        if parameters.context_weight is None:
            context = None
        else:
            context = self._fitted(_required(context, parameters.context_weight), trigger)
        self.parameters, self.trigger, self.context = parameters, trigger, context
        self.dtype = _autocast_dtype(trigger)
        self.prediction = None

    @staticmethod
    def _fitted(context: Tensor, trigger: Tensor) -> Tensor:
        """The context with the trigger's leading dimensions, as addition would broadcast it."""
        shape = (*trigger.shape[:-1], *context.shape[-1:])
        if context.shape != shape and context.dim() <= trigger.dim():
            sizes = zip(reversed(context.shape[:-1]), reversed(shape[:-1]), strict=False)
            if all(size in (1, wanted) for size, wanted in sizes):
                context = context.expand(shape)
        return context.detach()

    def predict(self) -> Tensor:
        if self.prediction is None:
            arguments = (self.trigger, self.context, self.parameters)
            with torch.no_grad():
                if self.dtype is not None:
                    arguments = ops.cast(*arguments, self.dtype)
                self.prediction, _ = ops.synthesizer_fwd(*arguments)
        return self.prediction

    def regress(
        self, carrier: Tensor, reduction: str, factor: float | Tensor | None = None
    ) -> Tensor:
        copy, self.prediction = ops.regress_when_gradient_arrives(
            carrier, self.trigger, self.context, self.parameters, reduction, factor, self.dtype
        )
        check_prediction(self.prediction, carrier)
        return copy

    def regress_and_predict(
        self, carrier: Tensor, reduction: str, factor: float | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.regress(carrier, reduction, factor), self.prediction


class _RegressModule(torch.autograd.Function):
    """A copy of carrier; the gradient that comes back to it is the prediction's target."""

    @staticmethod
    def forward(ctx, carrier, prediction, reduction, factor):
        ctx.save_for_backward(prediction)
        ctx.reduction, ctx.factor = reduction, factor
        return carrier.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (prediction,) = ctx.saved_tensors
        error = prediction - gradient
        scale = 2 / reference.reduction_divisor(error, ctx.reduction)
        if ctx.factor is not None:
            gradient = (prediction * ctx.factor).to(gradient.dtype)
        return gradient, scale * error, None, None


class _ModuleEvaluation:
    """Any module on one trigger: a call for each thing that is asked of it."""

    def __init__(self, synthesizer: nn.Module, trigger: Tensor, context: Tensor | None):
        self.synthesizer, self.trigger, self.context = synthesizer, trigger, context

    def predict(self) -> Tensor:
        return self.synthesizer(self.trigger, self.context).detach()

    def regress(
        self, carrier: Tensor, reduction: str, factor: float | Tensor | None = None
    ) -> Tensor:
        prediction = self.synthesizer(self.trigger, self.context)
        if not prediction.requires_grad:
            raise ValueError(ops.FROZEN)
        check_prediction(prediction, carrier)
        return _RegressModule.apply(carrier, prediction, reduction, factor)

    def regress_and_predict(
        self, carrier: Tensor, reduction: str, factor: float | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        # In dni-pytorch's order: a module that draws random numbers draws the same ones.
        prediction = self.predict()
        return self.regress(carrier, reduction, factor), prediction


def evaluate(
    synthesizer: nn.Module, trigger: Tensor, context: Tensor | None
) -> _FusedEvaluation | _ModuleEvaluation:
    """A synthesizer on one trigger (no gradient goes to it), by the fused op where that serves.

    Returns:
        An evaluation. `predict()` gives the detached prediction. `regress(carrier, reduction)`
        gives a copy of carrier that makes the gradient arriving at it the prediction's target and
        passes it on; with a factor, it passes on that many times the prediction instead.
        `regress_and_predict` does both.
    """
    trigger = trigger.detach()
    parameters = plain_parameters(synthesizer)
    if parameters is None:
        return _ModuleEvaluation(synthesizer, trigger, context)
    return _FusedEvaluation(parameters, trigger, context)
