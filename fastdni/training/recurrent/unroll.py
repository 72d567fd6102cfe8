"""Runs a recurrent module over a window: torch's modules and cells, and the user's own."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fastdni import ops
from fastdni.synthesizers import is_changed
from fastdni.training.recurrent.layouts import State, rebuilt, tensors_of, zeroed

_BIDIRECTIONAL = (
    "DecoupledRNN: rnn must run in one direction: a bidirectional network has no future to predict"
)


class Unrolled(NamedTuple):
    """What came of a window.

    Attributes:
        output: as the module gives it.
        state: at the window's end, of the module's form.
        endings: of each step inside the window at which episodes ended: which rows' did, (B, 1),
            and the tensors of the state there, before it was set to zero.
    """

    output: Any
    state: State
    endings: list[tuple[Tensor, list[Tensor]]]


class Unroller:
    """Any module with `forward(x, state) -> (output, state)`.

    Args:
        rnn: the module; called, and asked for `batch_first`.

    Attributes:
        rnn: the module.
        shapes: (layers, features) of each tensor of its state; None: not known before it has run.
        inputs: features of x, where they are known.
    """

    shapes: list[tuple[int, int]] | None = None
    inputs: int | None = None

    def __init__(self, rnn: nn.Module):
        self.rnn = rnn
        self.batch_first = bool(getattr(_plain(rnn), "batch_first", False))

    # ---- what is asked about a window ----

    def size(self, x) -> tuple[int, int]:
        """T and B of a window; a packed one has its longest row's T.

        Raises:
            RuntimeError: there is no step, or no row, or x is no sequence.
        """
        if isinstance(x, PackedSequence):
            return len(x.batch_sizes), int(x.batch_sizes[0])
        if not isinstance(x, Tensor) or x.dim() < 2 or (self.shapes is not None and x.dim() != 3):
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            form = "(B, T, K)" if self.batch_first else "(T, B, K)"
            raise RuntimeError(f"DecoupledRNN: x must be {form} or a packed sequence, got {got}")
        steps, rows = x.shape[:2]
        if self.batch_first:
            steps, rows = rows, steps
        if steps == 0 or rows == 0:
            raise RuntimeError(
                f"DecoupledRNN: x must have at least one step and one row, got {tuple(x.shape)}"
            )
        if self.inputs is not None and x.shape[2] != self.inputs:
            raise RuntimeError(
                f"DecoupledRNN: x must have {self.inputs} features, got {tuple(x.shape)}"
            )
        return steps, rows

    def check_state(self, state: State, rows: int) -> None:
        """Refuses a state that the module could not start from.

        Raises:
            RuntimeError: its form, a shape, dtype or device is another one.
        """
        for tensor in _tensors(state):
            if tensor.dim() not in (2, 3) or tensor.shape[-2] != rows:
                raise RuntimeError(
                    f"DecoupledRNN: state must hold tensors ([L,] B, H) of x's {rows} rows, got "
                    f"{tuple(tensor.shape)}"
                )
            _check_kind("state", tensor, self.rnn)

    def zeros(self, rows: int) -> State | None:
        """The state that the module starts from by itself; None where it is not known."""
        return None

    # ---- running ----

    def run(
        self, x, state: State | None, ended: Tensor | None = None, lengths: Tensor | None = None
    ) -> Unrolled:
        """A window, from a state (None: the module's own start).

        Args:
            ended: (T, B), steps after which a row's state is set to zero; the last one's are not.
                (1, B): of the last one alone.
            lengths: (B,), of the rows that are padded.
        """
        if lengths is not None:
            output, state = self._padded(x, state, lengths)
            return Unrolled(output, state, [])
        if ended is None or len(ended) == 1:
            return Unrolled(*self._call(x, state), [])
        outputs, endings, first = [], [], 0
        # To know where windows are cut is to look: `done` on a GPU is waited for.
        cuts = [t for t, any_row in enumerate(ended[:-1].any(1).tolist()) if any_row]
        for cut in (*cuts, len(ended) - 1):
            output, state = self._call(self._steps(x, first, cut + 1), state)
            outputs.append(output)
            first = cut + 1
            if first < len(ended):
                rows, before = ended[cut].unsqueeze(1), tensors_of(state)
                endings.append((rows, [t.detach() for t in before]))
                state = zeroed(state, rows)
        return Unrolled(torch.cat(outputs, int(self.batch_first)), state, endings)

    def why_no_kernel(self, x: Any) -> str | None:
        """Why torch's own module, or the user's, runs and not a kernel; None: it does not."""
        return why_no_kernel(self.rnn, x)

    def pulled_back(
        self, x: Tensor, state: list[Tensor], grad_output: Tensor | None, sent: list[Tensor]
    ) -> list[Tensor]:
        """By a kernel: what gradients at a window's output and end are at its start."""
        cell, weights, bias, _ = kernel = kernel_of(self.rnn)
        if self.batch_first:
            x = x.transpose(0, 1)
            grad_output = None if grad_output is None else grad_output.transpose(0, 1)
        start = kernel.layered(state)
        with torch.no_grad():
            output, _, saved = ops.recurrence_fwd(cell, x, start, weights, bias)
            _, found, _ = ops.recurrence_bwd(
                cell, x, start, weights, bias, output, saved, grad_output, kernel.layered(sent),
                False, False,
            )  # fmt: skip
        return kernel.unlayered(found)

    def _call(self, x, state: State | None) -> tuple[Any, State]:
        return self.rnn(x, state)

    def _steps(self, x: Tensor, first: int, end: int) -> Tensor:
        return x[:, first:end] if self.batch_first else x[first:end]

    def _padded(self, x, state, lengths) -> tuple[Any, State]:
        raise RuntimeError(
            "DecoupledRNN: lengths are for torch's recurrent modules and cells; a module of your "
            "own must take care of padding itself"
        )


class _Torchs(Unroller):
    """nn.LSTM, nn.GRU, nn.RNN."""

    def __init__(self, rnn: nn.Module):
        super().__init__(rnn)
        plain = _plain(rnn)
        if plain.bidirectional:
            raise ValueError(_BIDIRECTIONAL)
        self._is_lstm = plain.mode == "LSTM"
        widths = [plain.proj_size or plain.hidden_size]
        if self._is_lstm:
            widths.append(plain.hidden_size)
        self.shapes = [(plain.num_layers, width) for width in widths]
        self.inputs = plain.input_size

    def check_state(self, state, rows):
        _check_shapes(state, [(layers, rows, width) for layers, width in self.shapes], self.rnn)

    def zeros(self, rows):
        like = next(self.rnn.parameters())
        made = [like.new_zeros(layers, rows, width) for layers, width in self.shapes]
        return tuple(made) if self._is_lstm else made[0]

    def _call(self, x, state):
        if why_no_kernel(self.rnn, x) is not None:
            return self.rnn(x, state)
        given = x.transpose(0, 1) if self.batch_first else x
        before = self.zeros(given.shape[1]) if state is None else state
        output, after = kernel_of(self.rnn).recurrence(given, tensors_of(before))
        return output.transpose(0, 1) if self.batch_first else output, rebuilt(before, iter(after))

    def _padded(self, x, state, lengths):
        packed = pack_padded_sequence(x, lengths.cpu(), self.batch_first, enforce_sorted=False)
        output, state = self.rnn(packed, state)
        steps = x.shape[1] if self.batch_first else len(x)
        return pad_packed_sequence(output, self.batch_first, total_length=steps)[0], state


class _Cell(Unroller):
    """nn.LSTMCell, nn.GRUCell, nn.RNNCell, over the first dimension of x."""

    def __init__(self, rnn: nn.Module):
        super().__init__(rnn)
        plain = _plain(rnn)
        self._is_lstm = isinstance(plain, nn.LSTMCell)
        self.shapes = [(1, plain.hidden_size)] * (1 + self._is_lstm)
        self.inputs = plain.input_size

    def check_state(self, state, rows):
        _check_shapes(state, [(rows, width) for _, width in self.shapes], self.rnn)

    def zeros(self, rows):
        like = next(self.rnn.parameters())
        made = [like.new_zeros(rows, width) for _, width in self.shapes]
        return tuple(made) if self._is_lstm else made[0]

    def _call(self, x, state):
        if why_no_kernel(self.rnn, x) is not None:
            return self._over_time(x, state, lambda t, before, after: after)
        before = self.zeros(x.shape[1]) if state is None else state
        output, after = kernel_of(self.rnn).recurrence(x, tensors_of(before))
        return output, rebuilt(before, iter(after))

    def _padded(self, x, state, lengths):
        lengths = lengths.to(x.device).unsqueeze(1)
        if state is None:
            state = self.zeros(x.shape[1])

        def held(t, before, after):
            pairs = zip(tensors_of(after), tensors_of(before), strict=True)
            return rebuilt(after, iter([torch.where(t < lengths, new, old) for new, old in pairs]))

        output, state = self._over_time(x, state, held)
        steps = torch.arange(len(x), device=x.device).view(-1, 1, 1)
        return output.masked_fill(steps >= lengths, 0), state

    def _over_time(self, x: Tensor, state: State | None, step: Callable) -> tuple[Tensor, State]:
        outputs = []
        for t, now in enumerate(x.unbind(0)):
            state = step(t, state, self.rnn(now, state))
            outputs.append(tensors_of(state)[0])
        return torch.stack(outputs), state


# What torch's modules compute, as long as nobody patches them, and their names as cells.
_KERNELS = {
    nn.LSTM: "lstm", nn.GRU: "gru", nn.RNN: None, nn.LSTMCell: "lstm", nn.GRUCell: "gru",
    nn.RNNCell: None,
}  # fmt: skip
_FORWARDS = {kind: kind.forward for kind in _KERNELS}


class Kernel(NamedTuple):
    """What runs a recurrent module of torch's in one call.

    Attributes:
        cell, weights, bias: see `ops.recurrence`.
        is_layered: whether the module's state has a dimension for layers.
    """

    cell: str
    weights: list[Tensor]
    bias: bool
    is_layered: bool

    def layered(self, tensors: list[Tensor]) -> list[Tensor]:
        """Of the module's state the tensors as the op has them."""
        return tensors if self.is_layered else [t.unsqueeze(0) for t in tensors]

    def unlayered(self, tensors: list[Tensor]) -> list[Tensor]:
        """The reverse."""
        return tensors if self.is_layered else [t.squeeze(0) for t in tensors]

    def recurrence(self, x: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """A window, (T, B, K), by autograd."""
        output, after = ops.recurrence(self.cell, x, self.layered(state), self.weights, self.bias)
        return output, self.unlayered(after)


def kernel_of(rnn: nn.Module) -> Kernel:
    """Of a module for which `why_no_kernel` has no reason."""
    cell = _KERNELS[type(rnn)] or rnn.nonlinearity
    return Kernel(cell, [*rnn._parameters.values()], rnn.bias, isinstance(rnn, nn.RNNBase))


def why_no_kernel(rnn: nn.Module, x: Any) -> str | None:
    """Why torch's own module runs, and not a kernel of ours; None: it does not."""
    kind = type(rnn)
    if kind not in _KERNELS:
        return f"{kind.__name__} is none of torch's recurrent modules"
    if is_changed(rnn) or kind.forward is not _FORWARDS[kind] or _has_any_global_hook():
        return f"{kind.__name__} has hooks or another forward"
    if getattr(rnn, "proj_size", 0):
        return "it has projections"
    if getattr(rnn, "dropout", 0) and rnn.training and rnn.num_layers > 1:
        return "it has dropout"
    if not isinstance(x, Tensor) or torch.compiler.is_compiling():
        return "the window is packed" if not isinstance(x, Tensor) else "torch.compile is at work"
    weights = rnn._parameters.values()
    if any(type(w) is not nn.Parameter or w.dtype != x.dtype for w in weights) or not weights:
        return "its weights are not parameters of x's dtype"
    if torch.is_autocast_enabled(x.device.type) or not ops.recurrence_is_compiled(x):
        return f"there is no kernel for {x.dtype} on {x.device.type}, or autocast is on"
    return None


def _plain(rnn: nn.Module) -> nn.Module:
    """What torch.compile has wrapped."""
    return getattr(rnn, "_orig_mod", rnn)


def _tensors(state: State) -> list[Tensor]:
    def holds_tensors(part) -> bool:
        if isinstance(part, tuple | list):
            return len(part) > 0 and all(map(holds_tensors, part))
        return isinstance(part, Tensor)

    if not holds_tensors(state):
        raise RuntimeError(
            f"DecoupledRNN: state must be a tensor or a tuple of them, got {type(state).__name__}"
        )
    return tensors_of(state)


def _check_shapes(state: State, shapes: list[tuple[int, ...]], rnn: nn.Module) -> None:
    tensors = _tensors(state)
    found = [tuple(tensor.shape) for tensor in tensors]
    if found != shapes or isinstance(state, Tensor) != (len(shapes) == 1):
        names = ("h", "c")[: len(shapes)]
        wanted = ", ".join(f"{n} {shape}" for n, shape in zip(names, shapes, strict=True))
        raise RuntimeError(f"DecoupledRNN: state must be {wanted}, got {found}")
    for name, tensor in zip(("h", "c"), tensors, strict=False):
        _check_kind(f"state's {name}", tensor, rnn)


def _check_kind(name: str, tensor: Tensor, rnn: nn.Module) -> None:
    """Of the parameters' device and dtype; another dtype is for autocast."""
    like = next(rnn.parameters(), tensor)
    if tensor.device != like.device:
        raise RuntimeError(
            f"DecoupledRNN: {name} must be on the parameters' device {like.device}, got "
            f"{tensor.device}"
        )
    if tensor.dtype != like.dtype and not torch.is_autocast_enabled(tensor.device.type):
        raise RuntimeError(
            f"DecoupledRNN: {name} must have the parameters' dtype {like.dtype}, got {tensor.dtype}"
        )


def unroller(rnn: nn.Module) -> Unroller:
    """Who runs a module over windows.

    Raises:
        TypeError: it is no module; ValueError: it is bidirectional.
    """
    if not isinstance(rnn, nn.Module):
        raise TypeError(f"DecoupledRNN: rnn must be a module, got {type(rnn).__name__}")
    plain = _plain(rnn)
    if isinstance(plain, nn.RNNBase):
        return _Torchs(rnn)
    if isinstance(plain, nn.RNNCellBase):
        return _Cell(rnn)
    if getattr(plain, "bidirectional", False):
        raise ValueError(_BIDIRECTIONAL)
    return Unroller(rnn)
