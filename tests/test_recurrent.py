"""DecoupledRNN against loops that are written out, in float64."""

import random

import pytest
import torch
from conftest import sample
from plain_recurrent import PlainRNN, parts
from torch import nn

import fastdni

WINDOWS = 30
K, N, BATCH = 3, 4, 5
CELLS = {
    "lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN, "lstm cell": nn.LSTMCell,
    "gru cell": nn.GRUCell, "rnn cell": nn.RNNCell, "projected": nn.LSTM,
}  # fmt: skip
DONE = ("never", "last step", "anywhere", "all rows")
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.5),
    "adam": lambda p: torch.optim.Adam(p, 3e-3),
}
TRACES = {
    "none": {},
    "zero": {"trace_lambda": 0.0, "trace_windows": 2},
    "forward": {"trace_lambda": 0.7, "trace_windows": 3},
    "episode": {"trace_lambda": 0.7},
    "online": {"trace_lambda": 0.7, "trace_view": "online"},
}


def described(number: int) -> dict:
    """One of many cases: each of its facts is drawn."""
    draw = random.Random(number)
    cell = draw.choice(list(CELLS))
    trace = draw.choice(list(TRACES))
    return {
        "cell": cell,
        "layers": 1 if "cell" in cell else draw.choice([1, 3]),
        "trace": trace,
        "layout": "joined" if trace == "online" else draw.choice(
            ["joined", "shared", "layers", "hidden"]
        ),
        "scale": draw.choice(["batch", "layers", "mean"]),
        "done": "all rows" if trace == "episode" else draw.choice(DONE),
        "horizon": draw.choice([0, 2]),
        "n_hidden": draw.choice([0, 1]),
        "context_dim": draw.choice([None, 2]),
        "first": draw.choice(["skip", "train"]),
        "end": draw.choice([None, "zero"]),
        "discount": draw.choice([None, 0.9]),
        "target_clip": draw.choice([None, 0.05]),
        "target_scale": draw.choice([1.0, 10.0]),
        "factor": draw.choice([0.1, 0.5, 0.0]),
        "optimizer": draw.choice(list(OPTIMIZERS)),
        "criterion": draw.choice(["cross_entropy", "mse"]),
        "by": draw.choice(["step", "backward"]),
    }  # fmt: skip


def module(case: dict) -> nn.Module:
    kind = CELLS[case["cell"]]
    if "cell" in case["cell"]:
        return kind(K, 4)
    more = {"proj_size": 3} if case["cell"] == "projected" else {}
    return kind(K, 4, case["layers"], **more)


def network(case: dict) -> tuple[fastdni.DecoupledRNN, nn.Module]:
    names = (
        "factor", "layout", "n_hidden", "context_dim", "scale", "first", "end", "horizon",
        "discount", "target_clip", "target_scale",
    )  # fmt: skip
    how = {name: case[name] for name in names} | TRACES[case["trace"]]
    rnn = fastdni.DecoupledRNN(module(case), horizon_weight=0.3, **how).double()
    width = 3 if case["cell"] == "projected" else 4
    return rnn, nn.Linear(width, N).double()


def window(case: dict, number: int) -> tuple:
    """x, target or None, done or None, context or None."""
    steps = random.Random(number).choice([1, 2, 3, 3])
    x = torch.randn(steps, BATCH, K, dtype=torch.float64)
    y = torch.randint(N, (steps, BATCH))
    if case["criterion"] == "mse":
        y = torch.randn(steps, BATCH, N, dtype=torch.float64)
    if number % 4 == 2:
        y = None  # a window without a loss
    done = None
    if case["done"] != "never":
        done = torch.zeros(steps, BATCH, dtype=torch.bool)
        if case["done"] == "anywhere":
            done = torch.rand(steps, BATCH) < 0.15
        elif case["done"] == "all rows":
            done[-1] = number % 4 == 3
        else:
            done[-1] = torch.rand(BATCH) < 0.3
    ctx = None
    if case["context_dim"] is not None:
        ctx = torch.randn(BATCH, 2, dtype=torch.float64)
    return x, y, done, ctx


@pytest.mark.parametrize("number", sample(range(600), 11))
def test_windows_are_those_of_a_loop_that_is_written_out(number):
    case = described(number)
    torch.manual_seed(number)
    rnn, head = network(case)
    for parameter in rnn.parameters():  # not at zero: a synthesizer that says something
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    plain = PlainRNN(rnn, head)
    own = [*rnn.parameters(), *head.parameters()]
    optimizer = OPTIMIZERS[case["optimizer"]](own)
    its = OPTIMIZERS[case["optimizer"]](plain.parameters())
    state = expected = None
    for w in range(WINDOWS):
        x, y, done, ctx = window(case, w)
        if case["by"] == "step":
            result = rnn.step(
                x, y, state, head, optimizer, case["criterion"], done=done, context=ctx
            )
            state, synthesis = result.state, result.synthesis_loss
            loss = None if y is None else result.loss
            assert all(p.grad is None for p in own)
        else:
            output, state = rnn(x, state, done, ctx)
            loss = None if y is None else plain.loss_by(head, output, y, case["criterion"])
            synthesis = rnn.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        its_loss, its_synthesis, expected = plain.window(
            x, y, expected, done, ctx, case["criterion"]
        )
        its.step()
        its.zero_grad()
        if loss is not None:
            torch.testing.assert_close(loss.item(), its_loss, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(float(synthesis), its_synthesis, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(parts(state), expected, rtol=1e-9, atol=1e-9)
    named = zip(own, plain.parameters(), strict=True)
    for ours, theirs in named:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
