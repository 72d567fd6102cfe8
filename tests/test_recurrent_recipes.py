"""DecoupledRNN against other ways to the same numbers: the public recipes of dni-pytorch and
DNI-RNN, a linear network whose future is known, and lambda-targets in both views."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdni

K, H, N, B = 3, 4, 5, 6


def windows(count, steps=3):
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        x = torch.randn(steps, B, K, generator=generator, dtype=torch.float64)
        yield x, torch.randint(N, (steps, B), generator=generator)


def loss_of(head, output, y):
    return F.cross_entropy(head(output).flatten(0, 1), y.flatten())


def assert_same(found, expected):
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


# ---- public recipes ----


def test_dni_pytorchs_recipe():
    """Its example of a language model: one synthesizer for all layers, joined and split by hand."""
    torch.manual_seed(0)
    lstm, head = nn.LSTM(K, H, 2).double(), nn.Linear(H, N).double()
    synthesizer = fastdni.BasicSynthesizer(2 * H, n_hidden=1).double()
    rnn = fastdni.DecoupledRNN(
        copy.deepcopy(lstm), copy.deepcopy(synthesizer), factor=0.1, layout="shared",
        scale="layers", first="train",
    )  # fmt: skip
    its_head = copy.deepcopy(head)

    interface = fastdni.BackwardInterface(synthesizer)
    every = [*lstm.parameters(), *synthesizer.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(every, 1e-2)
    hidden = tuple(torch.zeros(2, B, H, dtype=torch.float64) for _ in range(2))
    for x, y in windows(30):
        joined = torch.cat([h.detach() for h in hidden], 2).requires_grad_()
        with fastdni.defer_backward():
            h, c = interface.make_trigger(joined).split(H, 2)
            output, hidden = lstm(x, (h.contiguous(), c.contiguous()))
            interface.backward(torch.cat(hidden, 2), factor=0.1)
            fastdni.backward(loss_of(head, output, y))
        optimizer.step()
        optimizer.zero_grad()

    own = [*rnn.parameters(), *its_head.parameters()]
    optimizer, state = torch.optim.Adam(own, 1e-2), None
    for x, y in windows(30):
        state = rnn.step(x, y, state, its_head, optimizer).state
    assert_same(own, every)


def test_dni_rnns_recipe():
    """A synthesizer whose own optimizer steps once a sequence, which learns by the mean over its
    elements, and at the end of a sequence that the future is worth zero."""
    torch.manual_seed(0)
    lstm, head = nn.LSTM(K, H).double(), nn.Linear(H, N).double()
    synthesizer = nn.Sequential(nn.Linear(2 * H, H), nn.Tanh(), nn.Linear(H, 2 * H)).double()

    class WithoutContext(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = layers

        def forward(self, trigger, context):
            return self.layers(trigger)

    rnn = fastdni.DecoupledRNN(
        copy.deepcopy(lstm), WithoutContext(copy.deepcopy(synthesizer)), factor=0.5,
        layout="shared", scale="mean", end="zero",
    )  # fmt: skip
    its_head = copy.deepcopy(head)

    layers = torch.optim.SGD([*lstm.parameters(), *head.parameters()], 0.1)
    of_synthesizer = torch.optim.Adam(synthesizer.parameters(), 1e-2)
    for sequence in range(6):
        hidden, start = None, None
        for number, (x, y) in enumerate(list(windows(30))[5 * sequence : 5 * sequence + 5]):
            if hidden is not None:
                start = tuple(h.detach().requires_grad_() for h in hidden)
            output, hidden = lstm(x, start)
            loss_of(head, output, y).backward(retain_graph=True)
            joined = torch.cat(hidden, 2)
            if number < 4:
                joined.backward(0.5 * synthesizer(joined.detach()).detach())
            else:
                said = synthesizer(joined.detach())
                F.mse_loss(said, torch.zeros_like(said)).backward()
            if start is not None:
                found = torch.cat([s.grad for s in start], 2)
                before = torch.cat([s.detach() for s in start], 2)
                F.mse_loss(synthesizer(before), found).backward()
            layers.step()
            layers.zero_grad()
        of_synthesizer.step()
        of_synthesizer.zero_grad()

    its_layers = torch.optim.SGD([*rnn.rnn.parameters(), *its_head.parameters()], 0.1)
    its_synthesizer = torch.optim.Adam(rnn.synthesizer.parameters(), 1e-2)
    for sequence in range(6):
        state = None
        for number, (x, y) in enumerate(list(windows(30))[5 * sequence : 5 * sequence + 5]):
            done = torch.ones(B, dtype=torch.bool) if number == 4 else None
            output, state = rnn(x, state, done)
            rnn.backward(loss_of(its_head, output, y))
            its_layers.step()
            its_layers.zero_grad()
        its_synthesizer.step()
        its_synthesizer.zero_grad()
    every = [*lstm.parameters(), *head.parameters(), *synthesizer.parameters()]
    assert_same(
        [*rnn.rnn.parameters(), *its_head.parameters(), *rnn.synthesizer.parameters()], every
    )


# ---- a future that is known ----


class Linear(nn.Module):
    """s' = A s + x, which is its output, too."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, x, state):
        outputs = []
        for step in x:
            state = state @ self.matrix.t() + step
            outputs.append(state)
        return torch.stack(outputs), state


def test_a_synthesizer_learns_the_analytic_gradient_which_is_full_backpropagation():
    """L = sum of |s'|^2 / 2: what comes is P s with P = A^T (I + P) A, for factor 1."""
    torch.manual_seed(0)
    size = 3
    matrix = torch.randn(size, size, dtype=torch.float64)
    matrix = 0.7 * matrix / torch.linalg.matrix_norm(matrix, 2)
    rnn = fastdni.DecoupledRNN(Linear(matrix), fastdni.BasicSynthesizer(size).double(), factor=1.0)
    P = torch.zeros(size, size, dtype=torch.float64)
    for _ in range(200):
        P = matrix.t() @ (torch.eye(size, dtype=torch.float64) + P) @ matrix
    optimizer = torch.optim.SGD(rnn.synthesizer.parameters(), 0.2)
    for _ in range(400):
        start = torch.randn(64, size, dtype=torch.float64)
        output, _ = rnn(torch.zeros(1, 64, size, dtype=torch.float64), start)
        rnn.backward(output.square().sum() / 2 / 64)
        optimizer.step()
        optimizer.zero_grad()
    learnt = rnn.synthesizer.input_trigger
    torch.testing.assert_close(learnt.weight.detach(), P, rtol=0, atol=1e-6)
    torch.testing.assert_close(learnt.bias.detach(), torch.zeros(size).double(), rtol=0, atol=1e-6)

    # With it windows of one step find the gradient of the whole sequence.
    rnn.zero_grad()
    start = torch.randn(8, size, dtype=torch.float64)
    x = torch.zeros(80, 8, size, dtype=torch.float64)
    state = start
    for t in range(len(x)):
        output, state = rnn(x[t : t + 1], state)
        rnn.backward(output.square().sum() / 2 / 8)
    output, _ = rnn.rnn(x, start)
    (whole,) = torch.autograd.grad(output.square().sum() / 2 / 8, rnn.rnn.matrix)
    torch.testing.assert_close(rnn.rnn.matrix.grad, whole, rtol=1e-4, atol=1e-4 * whole.abs().max())


# ---- lambda-targets ----


def of_an_episode(view, lam, kind=nn.LSTM, **how):
    """The synthesizer's gradients of an episode of five windows, parameters fixed."""
    torch.manual_seed(0)
    rnn = fastdni.DecoupledRNN(
        kind(K, H), trace_lambda=lam, trace_view=view, factor=0.5, discount=0.9, **how
    ).double()
    head = nn.Linear(H, N).double()
    for parameter in rnn.synthesizer.parameters():
        parameter.data.normal_()
    done, state = torch.zeros(3, B, dtype=torch.bool), None
    for number, (x, y) in enumerate(windows(5)):
        done[-1] = number == 4
        if number == 2:
            done[1, :2] = True  # some rows' episodes end before
        output, state = rnn(x, state, done)
        rnn.backward(loss_of(head, output, y))
        done[1] = False
    return rnn, [p.grad for p in rnn.synthesizer.parameters()]


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("how", [{}, {"n_hidden": 1, "first": "train"}], ids=["linear", "mlp"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_both_views_agree_where_parameters_stay(lam, how, kind):
    _, forward = of_an_episode("forward", lam, kind, **how)
    _, online = of_an_episode("online", lam, kind, **how)
    assert_same(forward, online)


def test_without_lambda_targets_are_those_of_plain_windows():
    _, found = of_an_episode("forward", 0.0)
    _, plain = of_an_episode("forward", None)
    assert_same(found, plain)


def test_a_target_of_the_whole_episode_is_unbiased():
    """lambda = 1 and discount = 1: the gradient of the whole episode's loss, whatever M says."""
    torch.manual_seed(0)
    rnn = fastdni.DecoupledRNN(
        nn.GRU(K, H), trace_lambda=1.0, discount=1.0, factor=0.0, first="train"
    ).double()
    head = nn.Linear(H, N).double()
    rnn.synthesizer.input_trigger.weight.data.normal_()
    state, starts = None, []
    for number, (x, y) in enumerate(windows(4)):
        starts.append(torch.zeros(1, B, H, dtype=torch.float64) if state is None else state)
        output, state = rnn(x, state, torch.full((B,), number == 3))
        loss = rnn.backward(loss_of(head, output, y))
    wanted = 0.0
    given = list(windows(4))
    for number, start in enumerate(starts):
        s = start.clone().requires_grad_()
        now, total = s, 0.0
        for x, y in given[number:]:
            output, now = rnn.rnn(x, now)
            total = total + loss_of(head, output, y)
        (gradient,) = torch.autograd.grad(total, s)
        error = rnn.synthesizer(start[0]) - B * gradient[0]
        wanted += error.square().sum().item() / B
    assert loss.item() == pytest.approx(wanted, rel=1e-9)
