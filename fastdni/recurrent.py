"""DecoupledRNN: truncated backpropagation through time that sees beyond its window."""

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastdni.scopes import in_data_parallel_forward
from fastdni.synthesizers import BasicSynthesizer, start_at_zero
from fastdni.training.recurrent.arguments import as_module, backpropagate, checked, context_pair
from fastdni.training.recurrent.boundaries import Boundaries, Gathered
from fastdni.training.recurrent.engine import Engine, Handed, Passed
from fastdni.training.recurrent.fused import FusedWindows
from fastdni.training.recurrent.horizon import Horizon, branches
from fastdni.training.recurrent.layouts import State, first_of, layout_named, tensors_of, zeroed
from fastdni.training.recurrent.settings import Settings
from fastdni.training.recurrent.steps import Criterion, RecurrentResult, take_step
from fastdni.training.recurrent.traces import Traces, check_online
from fastdni.training.recurrent.unroll import unroller
from fastdni.training.recurrent.window import Window

MOST_WAITING = 100  # windows without a backward pass
# What a network knows while it runs: nobody's to save or copy.
_RUNNING = ("_open", "_passed", "traces", "_engine", "fused")


class DecoupledRNN(nn.Module):
    """A recurrent module trained in windows, with a synthetic gradient at each window's end.

    With s the state at a window's start (all layers' h, for an LSTM c as well), s' that at its end,
    L the loss of its steps and M the synthesizer:

        gradients of all parameters        those of L + factor < M(s'), s' >
        G = d/ds (L + discount < M(s'), s' >)
        M(s) learns                        target_scale clip(u G)

    where u is B for scale="batch": M works in the unit of a row's own loss, when L is the mean over
    the rows, and 1 in the other scales. What is sent and bootstrapped is M / (u target_scale).

    In training mode with gradients enabled each call opens a window and `backward` closes all that
    are open; otherwise the call is the module's own.

    Args:
        rnn: nn.LSTM, nn.GRU, nn.RNN (one direction), their cells (run over x's first dimension), or
            any module with `forward(x, state) -> (output, state)` whose state is one or several
            tensors (L, B, H) or (B, H).
        synthesizer: a module M(s, ctx), or for layout="layers" a list of one for each layer. By
            default a `BasicSynthesizer` that starts at zero, linear or with `n_hidden` layers.
        factor: what the prediction counts that is sent; may be changed at any time. 0: nothing is
            sent, the synthesizer learns.
        layout: "joined": one synthesizer over the state of all layers, (B, S): h_1 .. h_L, then
            c_1 .. c_L; "shared": one over (L, B, 2 H), the same for each layer; "layers": one for
            each layer, over (B, 2 H); "hidden": one over all h alone.
        n_hidden: hidden layers of the default synthesizer, of the width of a layer's h.
        context_dim: width of the context that the default synthesizer takes.
        scale: of the error's gradient: "batch" 2 / B, "layers" 2 / L (dni-pytorch), "mean" 2 over
            the number of elements (DNI-RNN).
        first: whether the synthesizer learns at a state of zeros ("train"), where an episode
            begins, or not ("skip").
        end: "zero": where an episode ends it learns that the future is worth zero (DNI-RNN's
            use_improvement).
        horizon: n; the synthesizer's hidden layers also predict what it will say at the ends of the
            next n windows (linear: maps of their own do), with `horizon_weight`.
        trace_lambda: l; None: targets as above. Otherwise G = dL/ds + J^T ((1 - l) discount M(s') +
            l discount G'), with J = ds'/ds and G' that of the next window.
        trace_view: "forward": windows are kept, and run again after `trace_windows` of them or when
            all rows' episodes have ended, with the gradient of the loss at their outputs as it was;
            "online": by accumulated eligibility, for small states (layout="joined").
        discount: what the prediction counts in the target; None: `factor`.
        target_clip: largest norm of a row of u G.
        target_scale: what targets are multiplied by.

    Attributes:
        rnn, synthesizer: modules; in `state_dict` under these names. `ahead`: those of the horizon.
        settings: the other arguments.

    Raises:
        TypeError, ValueError: an argument is out of its range, rnn is bidirectional, or the
            synthesizer is missing for a module whose state is not known.

    Note:
        What was found to work: a linear synthesizer over the joined state, targets in a row's unit
        times 10 (target_scale=10), target_clip=0.2, factor 0.5, Adam at 1e-3 for the synthesizer
        and 3e-4 for the layers. A factor of 0.1 also discounts the target by 0.1 a window, unless
        `discount` is given. Gains are largest with trace_lambda=0.9, factor and discount 0.7 and no
        clip. In DistributedDataParallel, call this module inside the wrapped module's forward and
        `backward` after it; a synthesizer that learnt nothing in a window then gets zeros.

    Source:
        Jaderberg et al. 2016 (arXiv 1608.05343), section 3.1; the trace: Pemberton and Costa 2024
        (arXiv 2401.07044).

    Example:
        >>> rnn = fastdni.DecoupledRNN(torch.nn.LSTM(8, 256), factor=0.5)
        >>> state = None
        >>> for x, y in windows:
        ...     output, state = rnn(x, state)
        ...     rnn.backward(criterion(head(output), y))
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    def __init__(
        self,
        rnn: nn.Module,
        synthesizer: nn.Module | Sequence[nn.Module] | None = None,
        factor: float = 0.1,
        *,
        layout: str = "joined",
        n_hidden: int = 0,
        context_dim: int | None = None,
        scale: str = "batch",
        first: str = "skip",
        end: str | None = None,
        horizon: int = 0,
        horizon_weight: float = 1.0,
        trace_lambda: float | None = None,
        trace_view: str = "forward",
        trace_windows: int | None = None,
        discount: float | None = None,
        target_clip: float | None = None,
        target_scale: float = 1.0,
    ):
        super().__init__()
        self.settings = Settings(
            factor, scale, first, end, horizon, horizon_weight, trace_lambda, trace_view,
            trace_windows, discount, target_clip, target_scale,
        )  # fmt: skip
        self.layout = layout
        shapes = unroller(rnn).shapes
        widths = None if shapes is None else layout_named(layout).widths(shapes)
        self.rnn = rnn
        if synthesizer is None:
            if widths is None:
                raise ValueError(
                    "DecoupledRNN: synthesizer must be given for a module of your own, whose state "
                    "is not known before it runs"
                )
            synthesizer = self._made(widths, shapes[0][1], n_hidden, context_dim)
        self.synthesizer = as_module(synthesizer)
        each = self._synthesizers()
        wanted = len(widths) if widths is not None else None
        if wanted is not None and len(each) != wanted:
            raise ValueError(
                f"DecoupledRNN: layout={layout!r} must have {wanted} synthesizers, got {len(each)}"
            )
        self.ahead = nn.ModuleList()
        if horizon:
            if widths is None:
                raise ValueError("DecoupledRNN: horizon must be 0 for a module of your own")
            for _ in range(horizon):
                pairs = zip(each, widths, strict=True)
                self.ahead.append(nn.ModuleList(branches(*pair) for pair in pairs))
        if trace_view == "online" and trace_lambda is not None and layout != "joined":
            raise ValueError(
                f'DecoupledRNN: trace_view="online" must have layout="joined", got {layout!r}'
            )
        self._forget()

    def _made(self, widths: list[int], hidden: int, n_hidden: int, context_dim: int | None):
        like = next(self.rnn.parameters())
        made = [
            start_at_zero(BasicSynthesizer(width, n_hidden, hidden, context_dim=context_dim))
            for width in (widths if self.layout == "layers" else widths[:1])
        ]
        made = [synthesizer.to(like) for synthesizer in made]
        return made if self.layout == "layers" else made[0]

    def _synthesizers(self) -> list[nn.Module]:
        own = self._modules["synthesizer"]
        return list(own) if isinstance(own, nn.ModuleList) else [own]

    def _forget(self) -> None:
        """Starts with no window open, and no state handed out."""
        self._open: list[Window] = []
        self._passed = Handed()
        self.traces = Traces()
        self._engine: Engine | None = None
        self.fused: FusedWindows | None = None  # what steps have found out

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _RUNNING}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def extra_repr(self) -> str:
        return f"layout={self.layout!r}, factor={self.factor}"

    @property
    def factor(self) -> float:
        """What a prediction counts that is sent."""
        return self.settings.factor

    @factor.setter
    def factor(self, factor: float) -> None:
        before, self.settings.factor = self.settings.factor, factor
        try:
            self.settings.check("factor")
        except ValueError:
            self.settings.factor = before
            raise

    def engine(self) -> Engine:
        """What runs windows of the modules as they are now."""
        known, rnn = self._engine, self._modules["rnn"]
        synthesizers = self._synthesizers()
        if (
            known is None
            or known.unroller.rnn is not rnn
            or known.layout_name != self.layout
            or len(known.boundaries.synthesizers) != len(synthesizers)
            or not all(map(is_, known.boundaries.synthesizers, synthesizers))
        ):
            layout = layout_named(self.layout)
            heads = [list(each) for each in self.ahead]
            known = self._engine = Engine(
                unroller(rnn),
                Boundaries(layout, synthesizers, self.settings),
                Horizon(heads, layout, self.settings),
                self.settings,
                self.layout,
            )
        return known

    # ---- a window ----

    def forward(
        self,
        x: Any,
        state: State | None = None,
        done: Tensor | None = None,
        context: Any = None,
        lengths: Tensor | None = None,
    ) -> tuple[Any, State]:
        """Runs a window.

        Args:
            x: (T, B, K), (B, T, K) for a module that is batch_first, or a packed sequence; T may
                change from window to window.
            state: what the window before returned; None at the start. Zeros, or a learned start
                (which gets its gradient), may be given again and again.
            done: (T, B): done[t, b] says that step t is the last of row b's episode, after which
                its state is zero; or (B,): after the window's last step. On a GPU, (T, B) is waited
                for.
            context: for synthesizers that take one, (B, C), or a pair: at the window's start, and
                at its end.
            lengths: (B,), where rows are padded to T steps.

        Returns:
            The module's output, and the state at the window's end, in the module's form. In
            training the state is detached, and may be used once.

        Raises:
            RuntimeError: x, state, done or lengths does not fit, a state is used again, or too many
                windows wait for `backward`.
        """
        engine = self.engine()
        ended = checked(engine.unroller, x, state, done, lengths)
        if not (self.training and torch.is_grad_enabled()):
            return self._run_alone(engine, x, state, ended, lengths)
        return self._open_window(engine, x, state, ended, context, lengths)

    def _run_alone(self, engine: Engine, x, state, ended, lengths) -> tuple[Any, State]:
        output, after, _ = engine.unroller.run(x, state, ended, lengths)
        if ended is not None:
            after = zeroed(after, ended[-1].unsqueeze(1))
        return output, after

    def _open_window(self, engine: Engine, x, state, ended, context, lengths) -> tuple[Any, State]:
        contexts = context_pair(context)
        passed = self.passed_at(state)
        if len(self._open) == MOST_WAITING:
            raise RuntimeError(
                f"DecoupledRNN: {MOST_WAITING} windows wait for their backward pass; call "
                "rnn.backward(loss) after each one, or run them in eval() or torch.no_grad()"
            )
        if self.settings.trace_lambda is not None and self.settings.trace_view == "online":
            _, rows = engine.unroller.size(x)
            (width,) = engine.boundaries.layout.widths(engine.unroller.shapes)
            check_online(self._synthesizers()[0], width, rows)
        window = Window(
            engine, x, state, passed, ended, contexts, lengths, in_data_parallel_forward()
        )
        self.hand_on(passed, window.state, window.passed)
        self._open.append(window)
        return window.output, window.state

    def passed_at(self, state: State | None) -> Passed | None:
        """What is known of a state that a window is to start from in training.

        Raises:
            RuntimeError: one has.
        """
        passed = None if state is None else self._passed.at(first_of(state))
        if passed is not None and passed.is_used:
            raise RuntimeError(
                "DecoupledRNN: state must not be used twice in training: the gradient there is that"
                " of the window that started from it; start from state.clone(), or from None"
            )
        return passed

    def carried(self, state: State) -> dict[str, Any]:
        """What training knows of a state besides its numbers: windows that wait for their targets,
        states that the auxiliary task looks back to. Save it beside the state, for `resume`.

        Args:
            state: the last one, as a window returned it.
        """
        passed = self._passed.at(first_of(state))
        if passed is None:
            return {}
        return passed.state_dict() | {"windows": self.traces.state_dict(passed)}

    def resume(self, state: State, carried: dict[str, Any]) -> State:
        """Goes on from a state that was saved with what was `carried`.

        Returns:
            The state, for the next window.
        """
        if carried:
            passed = Passed.from_state_dict(carried)
            self._passed.put(first_of(state), passed)
            self.traces.load_state_dict(carried["windows"], passed)
        return state

    def hand_on(self, before: Passed | None, state: State, passed: Passed) -> None:
        """Remembers what a window has started from, and what it leaves."""
        if before is not None:
            before.is_used = True
        self._passed.put(first_of(state), passed)

    def backward(self, loss: Tensor | None = None, loss_scale: float = 1.0) -> Tensor:
        """Backpropagates through the open windows, and has the synthesizers learn.

        Gradients are added to `p.grad`: the loss's and the synthetic gradient's to the recurrent
        module's and to whatever the loss comes from, the regression's to the synthesizers'.

        Args:
            loss: of the windows' outputs, a scalar; None: they have none.
            loss_scale: what loss was multiplied by (`scaler.get_scale()`): all gradients are.

        Returns:
            The synthesis loss, 0-d, detached; 0 where nothing was learnt.

        Raises:
            RuntimeError: no window is open, or parameters have changed since it ran.
        """
        loss, _ = self.close(loss, loss_scale)
        return loss

    def close(self, loss: Tensor | None, loss_scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """`backward`; also returns the synthesis loss of predictions of zero, for comparison."""
        for window in self._open:
            window.check()
        windows, self._open = self._open, []
        if not windows:
            raise RuntimeError(
                "DecoupledRNN: backward must follow a forward pass in training mode, with gradients"
                " enabled: no window is open"
            )
        variables = [] if loss is None else [loss]
        gradients: list[Tensor | None] = [None] * len(variables)
        for window in windows:
            tensors, sent = window.send(loss_scale)
            variables += tensors
            gradients += sent
        if variables:
            backpropagate(variables, gradients)
        gathered = Gathered() if any(window.gathers for window in windows) else None
        found = [window.learn(gathered) for window in windows]
        for window in windows:
            before, kept = window.before, window.release()
            if kept is not None:
                found.append(
                    self.traces.add(
                        window.engine, kept, before, window.passed, loss_scale, gathered
                    )
                )
        if gathered is not None:
            gathered.hand_over([*self.synthesizer.parameters(), *self.ahead.parameters()])
        zero = tensors_of(windows[0].state)[0].new_zeros(())
        return tuple(sum(parts, zero) for parts in zip(*found, strict=True))

    def abandon(self) -> None:
        """Drops the open windows: their states may be used again."""
        windows, self._open = self._open, []
        for window in windows:
            window.give_back()

    # ---- a whole step ----

    def step(
        self,
        x: Any,
        target: Tensor | None,
        state: State | None,
        head: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        criterion: Criterion = "cross_entropy",
        done: Tensor | None = None,
        context: Any = None,
        lengths: Tensor | None = None,
        loss_weight: float = 1.0,
    ) -> RecurrentResult:
        """A window, its loss, its backward pass and every update.

        Args:
            target: of `head(output)`: labels of its leading dimensions, (T, B) int64, for
                "cross_entropy" (-100: steps that do not count), of its shape for "mse", anything
                for a callable; None: the window has no loss.
            head: makes the output of which the loss is, of the recurrent module's.
            optimizer: of torch.optim, or a sequence of them, over parameters of this module and of
                `head`.
            criterion: "cross_entropy" (mean over all targets), "mse" (mean over all elements), or a
                callable (output, target) -> loss.
            loss_weight: what the loss is multiplied by: the number of steps that count, say, for a
                sum over time.
            Others as `forward`.

        Returns:
            Loss, output, synthesis loss and state; `p.grad` is None afterwards. Without `done` it
            waits for no GPU: torch.cuda.graph captures it, from a state in memory of your own.

        Raises:
            RuntimeError, TypeError, ValueError: an argument does not fit; nothing has been written
                then.
        """
        return RecurrentResult(
            *take_step(
                self,
                x,
                target,
                state,
                head,
                optimizer,
                criterion,
                done,
                context,
                lengths,
                loss_weight,
            )
        )
