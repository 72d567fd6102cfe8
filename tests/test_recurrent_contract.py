"""What a user of DecoupledRNN may rely on: states, modes, padding, copies, checkpoints."""

import copy
import gc
import io
import operator
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import fastdni

K, H, N, B = 3, 4, 5, 6


class Simple(nn.Module):
    """A recurrent module of the user's own, with a nested state."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(K, H)

    def forward(self, x, state):
        if state is None:
            state = {}, None
            zeros = x.new_zeros(x.shape[1], H)
            state = (zeros, (zeros,))
        h, (c,) = state
        outputs = []
        for step in x:
            h, c = self.cell(step, (h, c))
            outputs.append(h)
        return torch.stack(outputs), (h, (c,))


def network(rnn=None, **how):
    torch.manual_seed(0)
    made = fastdni.DecoupledRNN(rnn or nn.LSTM(K, H), **({"factor": 0.5} | how)).double()
    for parameter in made.synthesizer.parameters():  # one that says something
        parameter.data.normal_()
    return made, nn.Linear(H, N).double()


def window(steps=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(steps, B, K, generator=generator, dtype=torch.float64)
    return x, torch.randint(N, (steps, B), generator=generator)


def loss_of(head, output, y):
    return F.cross_entropy(head(output).flatten(0, 1), y.flatten())


def gradients(*modules):
    found = [None if p.grad is None else p.grad.clone() for m in modules for p in m.parameters()]
    for m in modules:
        m.zero_grad()
    return found


def assert_all_close(found, expected):
    for one, two in zip(found, expected, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def two_windows(rnn, head, state=None, **how):
    """Gradients of two windows, and the state after them."""
    for seed in (0, 1):
        x, y = window(seed=seed)
        output, state = rnn(x, state, **how)
        rnn.backward(loss_of(head, output, y))
    return gradients(rnn, head), state


# ---- states ----


def test_states_have_the_modules_form_and_are_detached():
    for rnn in (nn.LSTM(K, H, 2), nn.GRU(K, H), nn.LSTMCell(K, H), nn.RNNCell(K, H)):
        made, _ = network(rnn)
        x, _ = window()
        output, state = made(x)
        wanted = rnn(x if not isinstance(rnn, nn.RNNCellBase) else x[0])
        wanted = wanted if isinstance(rnn, nn.RNNCellBase) else wanted[1]
        assert type(state) is type(wanted)
        pairs = zip(*(s if isinstance(s, tuple) else (s,) for s in (state, wanted)), strict=True)
        assert all(a.shape == b.shape and not a.requires_grad for a, b in pairs)
        assert output.requires_grad


def test_a_state_is_used_once():
    rnn, head = network()
    x, y = window()
    output, state = rnn(x)
    rnn.backward(loss_of(head, output, y))
    _, after = rnn(x, state)
    rnn.backward()
    with pytest.raises(RuntimeError, match="state must not be used twice in training"):
        rnn(x, state)
    rnn(x, tuple(s.clone() for s in state))
    rnn.backward()
    rnn.eval()
    rnn(x, state), rnn(x, state)
    rnn.train()
    with torch.no_grad():
        rnn(x, state), rnn(x, after)
    rnn(x, after)


def test_a_step_that_was_refused_has_not_used_its_state():
    rnn, head = network()
    optimizer = torch.optim.SGD([*rnn.parameters(), *head.parameters()], 0.1)
    x, y = window()
    state = rnn.step(x, y, None, head, optimizer).state
    before = [p.clone() for p in (*rnn.parameters(), *head.parameters())]
    for target in (y[:2], y.double(), y + N):
        with pytest.raises((RuntimeError, IndexError)):
            rnn.step(x, target, state, head, optimizer)
    assert_all_close([*rnn.parameters(), *head.parameters()], before)
    rnn.step(x, y, state, head, optimizer)


def test_a_learned_start_gets_its_gradient_and_may_be_used_again():
    rnn, head = network(factor=0.3)
    start = [torch.randn(1, 1, H, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    found = []
    for _ in range(2):
        x, y = window()
        output, _ = rnn(x, tuple(s.expand(1, B, H) for s in start))
        rnn.backward(loss_of(head, output, y))
        found.append([s.grad.clone() for s in start])
        for s in start:
            s.grad = None
    assert_all_close(found[0], found[1])
    output, end = rnn.rnn(x, tuple(s.expand(1, B, H) for s in start))
    joined = torch.cat([e[0] for e in end], 1)
    sent = rnn.synthesizer(joined).detach() / B
    total = loss_of(head, output, y) + 0.3 * (sent * joined).sum()
    assert_all_close(found[0], torch.autograd.grad(total, start))


def test_a_row_of_zeros_begins_an_episode():
    """However it came to be: no state, zeros, or after an episode's end."""
    rnn, head = network(first="skip")
    x, y = window()
    zeros = torch.zeros(1, B, H, dtype=torch.float64)
    output, _ = rnn(x, (zeros, zeros))
    assert rnn.backward(loss_of(head, output, y)) == 0
    mixed = torch.cat((zeros[:, :2], torch.randn(1, B - 2, H, dtype=torch.float64)), 1)
    rnn.zero_grad()
    output, _ = rnn(x, (mixed, zeros))
    whole = rnn.backward(loss_of(head, output, y))
    assert whole > 0
    trained = rnn.synthesizer.input_trigger.bias.grad.clone()
    # As though the last rows were the batch, in the scale of the whole.
    rnn.zero_grad()
    rnn.settings.first = "train"
    output, _ = rnn(x, (mixed, zeros))
    assert rnn.backward(loss_of(head, output, y)) > whole
    assert not torch.equal(trained, rnn.synthesizer.input_trigger.bias.grad)


def test_windows_may_wait_for_one_backward_pass():
    rnn, head = network()
    apart, _ = two_windows(rnn, head)
    total, state = 0.0, None
    for seed in (0, 1):
        x, y = window(seed=seed)
        output, state = rnn(x, state)
        total = total + loss_of(head, output, y)
    rnn.backward(total)
    assert_all_close(gradients(rnn, head), apart)


def test_parameters_stay_until_the_backward_pass():
    rnn, head = network()
    x, y = window()
    output, _ = rnn(x)
    rnn.rnn.weight_hh_l0.data.add_(1)
    torch.autograd.graph.increment_version(rnn.rnn.weight_hh_l0)
    with pytest.raises(RuntimeError, match="must stay as they are between a window's forward pass"):
        rnn.backward(loss_of(head, output, y))


# ---- modes ----


@pytest.mark.parametrize(
    "rnn", [nn.LSTM(K, H, 2, dropout=0.5), nn.GRUCell(K, H)], ids=["lstm", "cell"]
)
def test_eval_is_the_wrapped_module(rnn):
    made, _ = network(rnn)
    made.eval()
    x, _ = window()
    output, state = made(x)
    if isinstance(rnn, nn.GRUCell):
        h = torch.zeros(B, H, dtype=torch.float64)
        outputs = []
        for step in x:
            h = rnn(step, h)
            outputs.append(h)
        torch.testing.assert_close(output, torch.stack(outputs), rtol=1e-12, atol=1e-12)
    else:
        wanted, after = rnn(x)
        torch.testing.assert_close((output, state), (wanted, after), rtol=1e-12, atol=1e-12)
    output.sum().backward()
    assert rnn.weight_hh_l0.grad is not None if hasattr(rnn, "weight_hh_l0") else True


def test_endings_in_eval_mode():
    rnn, _ = network()
    rnn.eval()
    x, _ = window()
    done = torch.zeros(3, B, dtype=torch.bool)
    done[1, :2] = done[2, 3] = True
    output, (h, c) = rnn(x, done=done)
    fresh, _ = rnn(x[2:])
    torch.testing.assert_close(output[2, :2], fresh[0, :2], rtol=1e-12, atol=1e-12)
    assert not h[:, 3].any() and not c[:, 3].any() and h[:, :3].any()


def test_the_factor_may_change():
    rnn, head = network(factor=0.0, discount=0.5)
    learnt, _ = two_windows(rnn, head)
    plain = copy.deepcopy(rnn.rnn)
    state = None
    for seed in (0, 1):
        x, y = window(seed=seed)
        output, state = plain(x, state)
        state = tuple(s.detach() for s in state)
        loss_of(head, output, y).backward()
    assert_all_close(learnt[:4], gradients(plain))  # nothing is sent
    assert all(g is not None and g.any() for g in learnt[4:6])  # and M learns
    rnn.factor = 0.5
    assert not torch.equal(two_windows(rnn, head)[0][0], learnt[0])
    with pytest.raises(ValueError, match="factor must be finite, got nan"):
        rnn.factor = float("nan")
    assert rnn.factor == 0.5


def test_a_frozen_synthesizer_sends_without_learning():
    rnn, head = network()
    learnt, _ = two_windows(rnn, head)
    rnn.synthesizer.requires_grad_(False)
    found, _ = two_windows(rnn, head)
    assert_all_close(found[:4], learnt[:4])
    assert found[4:6] == [None, None]


def test_another_synthesizer_in_the_middle():
    rnn, head = network()
    other = copy.deepcopy(rnn.synthesizer)
    other.input_trigger.weight.data.mul_(2)
    x, y = window()
    for by in ("backward", "step"):
        first = rnn.synthesizer
        optimizer = torch.optim.SGD([*rnn.parameters(), *head.parameters()], 0.0)
        if by == "step":
            state = rnn.step(x, y, None, head, optimizer).state
        else:
            output, state = rnn(x)
            rnn.backward(loss_of(head, output, y))
        gradients(rnn, head)
        rnn.synthesizer = copy.deepcopy(other)
        output, _ = rnn(x, state)
        rnn.backward(loss_of(head, output, y))
        assert all(p.grad is not None for p in rnn.synthesizer.parameters())
        assert all(p.grad is None for p in first.parameters())


@pytest.mark.parametrize(
    "trace", [{}, {"trace_lambda": 0.7, "trace_windows": 2}], ids=["", "trace"]
)
def test_gradients_that_were_there_are_no_part_of_a_step(trace):
    found = []
    for stale in (False, True):
        rnn, head = network(**trace)
        every = [*rnn.parameters(), *head.parameters()]
        optimizer, state = torch.optim.SGD(every, 0.1), None
        for seed in range(4):
            for p in every:
                p.grad = torch.ones_like(p) if stale else None
            state = rnn.step(*window(seed=seed), state, head, optimizer).state
            assert all(p.grad is None for p in every)
        found.append(every)
    assert_all_close(*found)


def step_and_hand(rnn, head, state, seed):
    """`step`, and the same window by hand."""
    other, other_head = copy.deepcopy(rnn), copy.deepcopy(head)
    every = [*other.parameters(), *other_head.parameters()]
    x, y = window(seed=seed)
    torch.manual_seed(seed)  # of dropout
    output, _ = other(x, None if state is None else tuple(s.clone() for s in state))
    other.backward(loss_of(other_head, output, y))
    with torch.no_grad():
        for p in every:
            p.sub_(0.1 * (0 if p.grad is None else p.grad))
    return every


@pytest.mark.parametrize(
    "change",
    [
        lambda rnn, head: head.register_forward_hook(lambda m, a, output: 2 * output),
        lambda rnn, head: rnn.rnn.register_forward_hook(lambda m, a, out: (2 * out[0], out[1])),
        lambda rnn, head: setattr(head, "bias", None),
        lambda rnn, head: setattr(head, "weight", nn.Parameter(head.weight * 2)),
        lambda rnn, head: setattr(rnn.rnn, "weight_hh_l0", nn.Parameter(rnn.rnn.weight_hh_l0 * 2)),
        lambda rnn, head: setattr(head.weight, "data", head.weight.data.t().contiguous().t()),
        lambda rnn, head: setattr(rnn.rnn, "dropout", 0.5),
        lambda rnn, head: rnn.rnn.weight_hh_l0.requires_grad_(False),
        lambda rnn, head: head.requires_grad_(False),
        lambda rnn, head: rnn.synthesizer.requires_grad_(False),
        lambda rnn, head: rnn.synthesizer.load_state_dict(rnn.synthesizer.state_dict()),
        lambda rnn, head: setattr(rnn, "factor", 0.0),
        lambda rnn, head: setattr(rnn, "factor", -2.0),
    ],
    ids=["hook of the head", "hook of the module", "no bias", "another head's weight",
         "another weight", "transposed", "dropout", "frozen weight", "frozen head",
         "frozen synthesizer", "loaded", "nothing sent", "another factor"],
)  # fmt: skip
def test_what_changes_between_steps(change):
    """A repeated step is that of the modules as they are now."""
    rnn, head = network(nn.LSTM(K, H, 2))
    optimizer = torch.optim.SGD([*rnn.parameters(), *head.parameters()], 0.1)
    state = None
    for seed in range(4):
        if seed == 3:
            change(rnn, head)
            params, every = (
                optimizer.param_groups[0]["params"],
                [*rnn.parameters(), *head.parameters()],
            )
            if len(params) != len(every) or not all(map(operator.is_, params, every)):
                optimizer.param_groups[0]["params"] = every
        expected = step_and_hand(rnn, head, state, seed)
        torch.manual_seed(seed)
        state = rnn.step(*window(seed=seed), state, head, optimizer).state
    assert_all_close([*rnn.parameters(), *head.parameters()], expected)


def test_hooks_of_parameters_are_called():
    rnn, head = network()
    optimizer = torch.optim.SGD([*rnn.parameters(), *head.parameters()], 0.1)
    seen = []
    head.weight.register_hook(lambda gradient: seen.append(gradient))
    rnn.rnn.weight_hh_l0.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    state = rnn.step(*window(), None, head, optimizer).state
    rnn.step(*window(seed=1), state, head, optimizer)
    assert len(seen) == 4


def test_shared_parameters_are_updated_once():
    """By the sum of their gradients."""
    found = []
    for by in ("step", "hand"):
        rnn, _ = network()
        head = nn.Linear(H, H).double()
        head.bias = rnn.rnn.bias_hh_l0 = nn.Parameter(torch.zeros(4 * H).double())
        head.weight = nn.Parameter(torch.ones(4 * H, H).double())
        every = [*{id(p): p for p in (*rnn.parameters(), *head.parameters())}.values()]
        optimizer = torch.optim.SGD(every, 0.1, momentum=0.9, nesterov=True)
        for seed in range(3):
            x, y = window(seed=seed)
            if by == "step":
                rnn.step(x, y, None, head, optimizer)
                continue
            output, _ = rnn(x)
            rnn.backward(loss_of(head, output, y))
            optimizer.step()
            optimizer.zero_grad()
        found.append(every)
    assert_all_close(*found)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_of_other_integers(dtype):
    found = []
    for kind in (torch.int64, dtype):
        rnn, head = network()
        optimizer = torch.optim.SGD([*rnn.parameters(), *head.parameters()], 0.1)
        x, y = window()
        rnn.step(x, y.to(kind), None, head, optimizer)
        found.append([*rnn.parameters(), *head.parameters()])
    assert_all_close(*found)


def test_contexts_at_start_and_end():
    rnn, head = network(context_dim=2)
    first, second = (torch.randn(B, 2, dtype=torch.float64) for _ in range(2))
    one, _ = two_windows(rnn, head, context=(first, second))
    again, _ = two_windows(rnn, head, context=[first, second])
    other, _ = two_windows(rnn, head, context=first)
    assert_all_close(one, again)
    assert not torch.equal(one[0], other[0])
    with pytest.raises(RuntimeError, match=r"context must be \(..., 2\), got None"):
        two_windows(rnn, head)


def test_a_context_of_the_window_itself():
    """What was predicted at the end of the window before, by that one's context, does not serve."""
    rnn, head = network(context_dim=2)
    contexts = torch.randn(2, B, 2, dtype=torch.float64)
    (x, y), (next_x, next_y) = window(), window(seed=1)
    found = []
    for known in (True, False):
        output, state = rnn(x, context=contexts[0])
        rnn.backward(loss_of(head, output, y))
        gradients(rnn, head)
        if not known:  # a state of the caller's own, at which nothing was predicted
            state = tuple(s.clone() for s in state)
        output, _ = rnn(next_x, state, context=contexts[1])
        rnn.backward(loss_of(head, output, next_y))
        found.append(gradients(rnn, head))
    assert_all_close(*found)


# ---- traces ----


def test_a_trace_is_cut_where_another_stream_goes_on():
    """Windows that do not follow one another are a trace each, which is over when the next one
    comes; with one window, lambda changes nothing."""
    losses = []
    for how in ({}, {"trace_lambda": 0.7}):
        rnn, head = network(first="train", **how)
        states, found = [None, None], []
        for seed in range(6):
            x, y = window(seed=seed)
            output, states[seed % 2] = rnn(x, states[seed % 2])
            found.append(rnn.backward(loss_of(head, output, y)))
        losses.append(found)
    plain, traced = losses
    assert traced[0] == 0
    assert_all_close(traced[1:], plain[:-1])


@pytest.mark.parametrize("by", ["hand", "step"])
def test_a_trace_keeps_what_the_caller_writes_over(by):
    """The same memory for every window's x, state and context."""
    found = []
    for reuses in (False, True):
        rnn, head = network(trace_lambda=0.7, trace_windows=3, context_dim=2)
        every = [*rnn.parameters(), *head.parameters()]
        optimizer, state = torch.optim.SGD(every, 0.1), None
        buffer, own = torch.empty_like(window()[0]), None
        context = torch.ones(B, 2, dtype=torch.float64)
        for seed in range(6):
            x, y = window(seed=seed)
            context = context.mul_(1.1) if reuses else context * 1.1
            given = buffer.copy_(x) if reuses else x
            if by == "step":
                state = rnn.step(given, y, state, head, optimizer, context=context).state
            else:
                output, state = rnn(given, state, context=context)
                rnn.backward(loss_of(head, output, y))
                optimizer.step()
                optimizer.zero_grad()
            if reuses and own is not None:
                for tensor in own:
                    tensor.fill_(float("nan"))
            own = state
        found.append(every)
    assert_all_close(*found)


@pytest.mark.parametrize("by", ["hand", "step"])
def test_what_is_carried_stays_as_it_was_saved(by):
    """However long training goes on, and how often it goes on from there."""

    def train(rnn, head, optimizer, state, seeds):
        for seed in seeds:
            x, y = window(seed=seed)
            if by == "step":
                state = rnn.step(x, y, state, head, optimizer).state
                continue
            output, state = rnn(x, state)
            rnn.backward(loss_of(head, output, y))
            optimizer.step()
            optimizer.zero_grad()
        return state

    rnn, head = network(trace_lambda=0.7, trace_windows=3)
    optimizer = torch.optim.SGD([*rnn.parameters(), *head.parameters()], 0.1)
    state = train(rnn, head, optimizer, None, range(5))
    saved = copy.deepcopy((rnn.state_dict(), head.state_dict(), state))
    carried = rnn.carried(state)  # as it is: nobody has written it to a file
    train(rnn, head, optimizer, state, range(5, 12))
    expected = [p.detach().clone() for p in (*rnn.parameters(), *head.parameters())]
    for _ in range(2):
        own, weights, start = copy.deepcopy(saved)
        rnn.load_state_dict(own)
        head.load_state_dict(weights)
        train(rnn, head, optimizer, rnn.resume(start, carried), range(5, 12))
        found = [p.detach() for p in (*rnn.parameters(), *head.parameters())]
        assert_all_close(found, expected)


# ---- devices ----


class Waits(TorchDispatchMode):
    """Notices whoever reads a number, for which a GPU would be waited for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if any(word in str(function) for word in ("_local_scalar_dense", "nonzero")):
            self.found.append(str(function))
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(
    "how",
    [{}, {"trace_lambda": 0.9, "trace_windows": 3}, {"horizon": 2}, {"target_clip": 0.2}],
    ids=["", "trace", "horizon", "clip"],
)
def test_a_step_waits_for_no_number(how):
    """On a GPU it can be captured: the way that it goes there is gone here without kernels."""
    rnn, head = network(**how)
    optimizer, state = torch.optim.SGD([*rnn.parameters(), *head.parameters()], 0.1), None
    with fastdni.use_backend("reference"), Waits() as waits:
        for seed in range(5):
            state = rnn.step(*window(seed=seed), state, head, optimizer).state
    assert waits.found == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")
def test_a_captured_step():
    """Its state in memory of the caller's own."""
    found = []
    for captured in (False, True):
        rnn, head = network()
        rnn, head = rnn.float().cuda(), head.float().cuda()
        every = [*rnn.parameters(), *head.parameters()]
        optimizer = torch.optim.Adam(every, torch.tensor(1e-2, device="cuda"), capturable=True)
        x, y = (t.cuda() for t in window())
        x, state = x.float(), tuple(torch.zeros(1, B, H, device="cuda") for _ in range(2))

        def window_from(rnn=rnn, head=head, optimizer=optimizer, x=x, y=y, state=state):
            after = rnn.step(x, y, state, head, optimizer).state
            for own, new in zip(state, after, strict=True):
                own.copy_(new)

        aside = torch.cuda.Stream()
        with torch.cuda.stream(aside):
            for _ in range(3):
                window_from()
        torch.cuda.current_stream().wait_stream(aside)
        again = window_from
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                window_from()
            again = graph.replay
        for _ in range(4):
            again()
        found.append([*every, *state])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


# ---- windows of any form ----


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_batch_first(kind):
    rnn, head = network(kind(K, H, 2))
    first, _ = network(kind(K, H, 2, batch_first=True))
    first.load_state_dict(rnn.state_dict())
    done = torch.zeros(3, B, dtype=torch.bool)
    done[1, :2] = True
    state = its = None
    optimizers = [torch.optim.SGD([*m.parameters(), *head.parameters()], 0.1) for m in (rnn, first)]
    heads = [head, copy.deepcopy(head)]
    optimizers[1] = torch.optim.SGD([*first.parameters(), *heads[1].parameters()], 0.1)
    for seed, ends in ((0, None), (1, done), (2, None)):
        x, y = window(seed=seed)
        one = rnn.step(x, y, state, heads[0], optimizers[0], done=ends)
        two = first.step(x.transpose(0, 1), y.t(), its, heads[1], optimizers[1], done=ends)
        state, its = one.state, two.state
        torch.testing.assert_close(one.output, two.output.transpose(0, 1), rtol=1e-10, atol=1e-12)
    assert_all_close(rnn.parameters(), first.parameters())


def test_windows_of_changing_length():
    rnn, head = network()
    state = None
    for steps in (3, 5, 1, 2):
        x, y = window(steps)
        output, state = rnn(x, state)
        assert rnn.backward(loss_of(head, output, y)) >= 0
        assert len(output) == steps


@pytest.mark.parametrize("rnn", [nn.LSTM(K, H), nn.GRU(K, H, 2), nn.LSTMCell(K, H)],
                         ids=["lstm", "gru", "cell"])  # fmt: skip
def test_padding(rnn):
    """Rows that are padded end where they end."""
    made, head = network(rnn)
    x, y = window(4)
    lengths = torch.tensor([4, 1, 3, 2, 4, 1])
    found = []
    for single in (False, True):
        made.zero_grad()
        head.zero_grad()
        ends = []
        for rows in [[row] for row in range(B)] if single else [list(range(B))]:
            steps = int(lengths[rows].max())
            output, state = made(x[:steps, rows], lengths=None if single else lengths)
            labels = y[:steps, rows].clone()
            labels[torch.arange(steps)[:, None] >= lengths[rows]] = -100
            picked = F.cross_entropy(head(output).flatten(0, 1), labels.flatten(), reduction="sum")
            made.backward(picked)
            ends.append(state)
        found.append((gradients(made, head)[: len(list(rnn.parameters()))], ends))
    (together, (whole,)), (_, apart) = found
    tensors = [[s] if isinstance(s, torch.Tensor) else list(s) for s in (whole, *apart)]
    for number, tensor in enumerate(tensors[0]):
        rows = torch.cat([each[number] for each in tensors[1:]], -2)
        torch.testing.assert_close(tensor, rows, rtol=1e-10, atol=1e-12)
    assert all(g is not None for g in together)


def test_padding_in_a_step():
    found = []
    lengths = torch.tensor([4, 1, 3, 2, 4, 1])
    x, y = window(4)
    y[torch.arange(4)[:, None] >= lengths] = -100
    for by in ("step", "hand"):
        rnn, head = network()
        every = [*rnn.parameters(), *head.parameters()]
        optimizer, state = torch.optim.SGD(every, 0.1), None
        for _ in range(3):
            if by == "step":
                state = rnn.step(x, y, state, head, optimizer, lengths=lengths).state
                continue
            output, state = rnn(x, state, lengths=lengths)
            rnn.backward(loss_of(head, output, y))
            optimizer.step()
            optimizer.zero_grad()
        found.append([*every, *state])
    assert_all_close(*found)


def test_packed_sequences():
    rnn, head = network()
    x, y = window(4)
    lengths = torch.tensor([4, 1, 3, 2, 4, 1])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    output, state = rnn(packed)
    assert isinstance(output, PackedSequence)
    padded, _ = pad_packed_sequence(output)
    labels = y.clone()
    labels[torch.arange(4)[:, None] >= lengths] = -100
    rnn.backward(loss_of(head, padded, labels))
    one = gradients(rnn, head)
    output, its = rnn(x, lengths=lengths)
    rnn.backward(loss_of(head, output, labels))
    assert_all_close(one, gradients(rnn, head))
    torch.testing.assert_close(state, its, rtol=1e-12, atol=1e-12)
    optimizer = torch.optim.SGD([*rnn.parameters(), *head.parameters()], 0.1)
    targets = pack_padded_sequence(y, lengths, enforce_sorted=False)
    result = rnn.step(packed, targets, state, head, optimizer, done=torch.tensor([True] * B))
    assert result.loss > 0 and not any(s.any() for s in result.state)


def test_a_module_of_the_users_own():
    own, lstm = Simple(), nn.LSTMCell(K, H)
    own.cell.load_state_dict(lstm.state_dict())
    synthesizer = fastdni.BasicSynthesizer(2 * H)
    one, head = network(own, synthesizer=copy.deepcopy(synthesizer))
    two, _ = network(lstm, synthesizer=synthesizer)
    two.synthesizer.load_state_dict(one.synthesizer.state_dict())
    (a, state), (b, its) = two_windows(one, head), two_windows(two, head)
    assert_all_close(a, b)
    assert state[1][0].shape == its[1].shape
    with pytest.raises(ValueError, match="synthesizer must be given for a module of your own"):
        fastdni.DecoupledRNN(Simple())


def test_dropout_between_layers():
    rnn, head = network(nn.LSTM(K, H, 2, dropout=0.5))
    torch.manual_seed(3)
    first, _ = two_windows(rnn, head)
    torch.manual_seed(3)
    again, _ = two_windows(rnn, head)
    assert_all_close(first, again)


# ---- training around it ----


def test_gradients_accumulate_over_windows():
    rnn, head = network()
    whole, _ = two_windows(rnn, head)
    state, parts = None, []
    for seed in (0, 1):
        x, y = window(seed=seed)
        output, state = rnn(x, state)
        rnn.backward(loss_of(head, output, y))
        parts.append(gradients(rnn, head))
    sums = [a if b is None else b if a is None else a + b for a, b in zip(*parts, strict=True)]
    assert_all_close(whole, sums)


def test_two_optimizers_and_clipping():
    rnn, head = network()
    twin, its_head = copy.deepcopy(rnn), copy.deepcopy(head)
    pair = [
        torch.optim.Adam([*rnn.rnn.parameters(), *head.parameters()], 1e-2),
        torch.optim.SGD(rnn.synthesizer.parameters(), 1e-3, momentum=0.9),
    ]
    its = [
        torch.optim.Adam([*twin.rnn.parameters(), *its_head.parameters()], 1e-2),
        torch.optim.SGD(twin.synthesizer.parameters(), 1e-3, momentum=0.9),
    ]
    state = other = None
    for seed in range(5):
        x, y = window(seed=seed)
        state = rnn.step(x, y, state, head, pair).state
        output, other = twin(x, other)
        twin.backward(loss_of(its_head, output, y))
        nn.utils.clip_grad_norm_(twin.parameters(), 1e9)
        for optimizer in its:
            optimizer.step()
            optimizer.zero_grad()
    assert_all_close([*rnn.parameters(), *head.parameters()],
                     [*twin.parameters(), *its_head.parameters()])  # fmt: skip


@pytest.mark.parametrize(
    "trace", [{}, {"trace_lambda": 0.7, "trace_windows": 2}], ids=["", "trace"]
)
def test_a_scaled_loss(trace):
    rnn, head = network(**trace)
    plain, _ = two_windows(rnn, head)
    state, losses = None, []
    for seed in (0, 1):
        x, y = window(seed=seed)
        output, state = rnn(x, state)
        losses.append(rnn.backward(1024 * loss_of(head, output, y), loss_scale=1024))
    scaled = [None if g is None else g / 1024 for g in gradients(rnn, head)]
    assert_all_close(scaled, plain)
    assert losses[-1] > 0


def test_autocast_in_a_step():
    """Also in one that would be like the last."""
    rnn, head = network()
    rnn, head = rnn.float(), head.float()
    optimizer = torch.optim.SGD([*rnn.parameters(), *head.parameters()], 0.1)
    state, kinds = None, []
    for seed in range(4):
        x, y = window(seed=seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=seed > 1):
            result = rnn.step(x.float(), y, state, head, optimizer)
        state = result.state
        kinds.append(result.output.dtype == torch.bfloat16)
    assert kinds == [False, False, True, True]


def test_autocast():
    rnn, head = network()
    rnn, head = rnn.float(), head.float()
    state = None
    for seed in (0, 1):
        x, y = window(seed=seed)
        with torch.autocast("cpu", torch.bfloat16):
            output, state = rnn(x.float(), state)
            loss = loss_of(head, output, y)
        rnn.backward(loss)
    assert all(
        g is None or (g.dtype == torch.float32 and g.isfinite().all()) for g in gradients(rnn, head)
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_every_backend(backend):
    wanted, _ = two_windows(*network())
    with fastdni.use_backend(backend):
        found, _ = two_windows(*network())
        rnn, head = network()
        optimizer = torch.optim.SGD([*rnn.parameters(), *head.parameters()], 0.1)
        rnn.step(*window(), None, head, optimizer)
    assert_all_close(found, wanted)


def test_a_compiled_module():
    rnn, head = network()
    compiled = fastdni.DecoupledRNN(
        torch.compile(copy.deepcopy(rnn.rnn), backend="eager"), factor=0.5
    )
    compiled.double().synthesizer.load_state_dict(rnn.synthesizer.state_dict())
    assert_all_close(two_windows(compiled, head)[0], two_windows(rnn, head)[0])


CARRIED = [
    {},
    {"horizon": 2},
    {"horizon": 1, "n_hidden": 1},
    {"trace_lambda": 0.7, "trace_windows": 3},
    {"trace_lambda": 0.7, "trace_view": "online"},
]


@pytest.mark.parametrize("how", CARRIED, ids=lambda how: "-".join(how) or "plain")
def test_training_goes_on_from_a_checkpoint(how):
    """Bit for bit, with the state that is carried and what is known of it."""

    def made():
        rnn, head = network(**how)
        return rnn, head, torch.optim.Adam([*rnn.parameters(), *head.parameters()], 1e-2)

    def train(rnn, head, optimizer, state, windows):
        for seed in windows:
            x, y = window(seed=seed)
            done = torch.arange(B) % 4 == seed % 4
            state = rnn.step(x, y, state, head, optimizer, done=done).state
        return state

    parts = dict(zip(("rnn", "head", "optimizer"), made(), strict=True))
    state, file = train(*parts.values(), None, range(4)), io.BytesIO()
    saved = {name: part.state_dict() for name, part in parts.items()}
    torch.save(saved | {"state": state, "carried": parts["rnn"].carried(state)}, file)
    state = train(*parts.values(), state, range(4, 8))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = dict(zip(("rnn", "head", "optimizer"), made(), strict=True))
    for name, part in again.items():
        part.load_state_dict(saved[name])
    other = again["rnn"].resume(saved["state"], saved["carried"])
    other = train(*again.values(), other, range(4, 8))
    own = [*parts["rnn"].parameters(), *parts["head"].parameters(), *state]
    its = [*again["rnn"].parameters(), *again["head"].parameters(), *other]
    assert all(map(torch.equal, own, its))


def test_copies_and_pickles():
    rnn, head = network()
    x, y = window()
    output, _ = rnn(x)
    rnn.backward(loss_of(head, output, y))
    gradients(rnn, head)
    file = io.BytesIO()
    torch.save(rnn, file)
    file.seek(0)
    for other in (copy.deepcopy(rnn), torch.load(file, weights_only=False)):
        assert_all_close(two_windows(other, head)[0], two_windows(rnn, head)[0])


# ---- what stays alive ----


def test_no_graph_is_kept_from_one_window_to_the_next():
    rnn, head = network(horizon=2)
    optimizer = torch.optim.SGD([*rnn.parameters(), *head.parameters()], 1e-3)
    state, seen = None, []
    for seed in range(6):
        x, y = window(seed=seed)
        output, state = rnn(x, state)
        seen.append(weakref.ref(output.grad_fn))
        rnn.backward(loss_of(head, output, y))
        optimizer.step()
        del output
    gc.collect()
    assert [ref() for ref in seen[:-1]] == [None] * 5
    assert len(rnn._passed._known) == 1


@pytest.mark.parametrize("by", ["step", "backward"])
def test_memory_stays_as_it_is(by):
    rnn, head = network()
    optimizer = torch.optim.SGD([*rnn.parameters(), *head.parameters()], 1e-3)

    def tensors():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    state, counts = None, []
    for number in range(300):
        x, y = window(seed=number % 3)
        if by == "step":
            state = rnn.step(x, y, state, head, optimizer).state
        else:
            output, state = rnn(x, state)
            rnn.backward(loss_of(head, output, y))
            optimizer.step()
            optimizer.zero_grad()
            del output
        if number in (99, 299):
            counts.append(tensors())
    assert counts[0] == counts[1]
