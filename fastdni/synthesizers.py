"""Synthesizers: modules that predict a message from a trigger and a context.

Any `nn.Module` taking `(trigger, context)` is a synthesizer. It may say `context_dim`, the width of
the context it takes (None: it takes none); where labels serve as context, one that names a width
gets them as one-hot vectors.
"""

from numbers import Integral

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

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

    Attributes:
        context_dim: as given.

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
            a = a + self.input_context(required_context(context, self.input_context.weight))
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


def required_context(context: Tensor | None, context_weight: Tensor) -> Tensor:
    """The context, which must be there."""
    if context is None:
        raise RuntimeError(
            f"BasicSynthesizer: context must be (..., {context_weight.shape[1]}), got None; "
            "wrap the call in synthesizer_context(context), in the thread that makes it: contexts "
            "and deferral belong to the thread that entered them"
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


# What the classes compute, as long as nobody patches them.
_FORWARDS = (BasicSynthesizer.forward, nn.Linear.forward)
_PLAIN_TENSORS = (nn.Parameter, Tensor)
_PLAIN_BIASES = (*_PLAIN_TENSORS, type(None))


def plain_parameters(synthesizer: nn.Module) -> SynthesizerParameters | None:
    """A BasicSynthesizer's parameters, if calling it is no more than its formula: no hook, no other
    class, no parametrization, no tensor in a parameter's place. Otherwise None.

    Runs at every step, so it looks straight into the modules' dictionaries.
    """
    if type(synthesizer) is not BasicSynthesizer or _has_any_global_hook():
        return None
    if is_changed(synthesizer) or (BasicSynthesizer.forward, nn.Linear.forward) != _FORWARDS:
        return None
    modules = synthesizer._modules
    linears = [modules["input_trigger"], *modules["layers"]._modules.values()]
    if synthesizer.input_context is not None:
        linears.append(synthesizer.input_context)
    weights, biases = [], []
    for linear in linears:
        if type(linear) is not nn.Linear or is_changed(linear):
            return None
        own = linear._parameters
        if "weight" not in own or "bias" not in own:
            return None
        weight, bias = own["weight"], own["bias"]
        if type(weight) not in _PLAIN_TENSORS or type(bias) not in _PLAIN_BIASES:
            return None
        weights.append(weight)
        if bias is not None:
            if bias.dim() != 1:
                return None
            biases.append(bias)
    if biases and len(biases) != len(weights):
        return None
    if synthesizer.input_context is None:
        return SynthesizerParameters(weights, biases)
    context_weight, context_bias = weights.pop(), biases.pop() if biases else None
    return SynthesizerParameters(weights, biases, context_weight, context_bias)
