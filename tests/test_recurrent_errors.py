"""What DecoupledRNN refuses: each with one clear error, before anything is written."""

import pytest
import torch
from torch import nn

import fastdni

K, H, N, B = 3, 4, 5, 6


def network(rnn=None, **how):
    rnn = fastdni.DecoupledRNN(rnn or nn.LSTM(K, H, 2), **how)
    head = nn.Linear(H, N)
    return rnn, head, torch.optim.SGD([*rnn.parameters(), *head.parameters()], 0.1)


def zeros(*sizes):
    return torch.zeros(*sizes), torch.zeros(*sizes)


X, Y = torch.randn(3, B, K), torch.zeros(3, B, dtype=torch.long)
GIVEN = [
    ({"x": X[:0]}, "x must have at least one step and one row"),
    ({"x": X[:, :0]}, "x must have at least one step and one row"),
    ({"x": X[0]}, r"x must be \(T, B, K\) or a packed sequence, got \(6, 3\)"),
    ({"x": X[..., :2]}, r"x must have 3 features, got \(3, 6, 2\)"),
    ({"x": [1.0]}, "or a packed sequence, got list"),
    ({"state": zeros(2, B - 1, H)}, r"state must be h \(2, 6, 4\), c \(2, 6, 4\), got"),
    ({"state": zeros(1, B, H)}, r"state must be h \(2, 6, 4\), c \(2, 6, 4\), got"),
    ({"state": zeros(2, B, H)[0]}, r"state must be h \(2, 6, 4\), c"),
    ({"state": "zeros"}, "state must be a tensor or a tuple of them, got str"),
    ({"state": tuple(s.double() for s in zeros(2, B, H))}, "h must have the parameters' dtype"),
    ({"state": tuple(s.to("meta") for s in zeros(2, B, H))}, "on the parameters' device cpu, got"),
    ({"done": torch.zeros(3, B - 1)}, r"done must be of shape \(3, 6\) or \(6,\), got \(3, 5\)"),
    ({"done": torch.zeros(B, 3)}, r"done must be of shape \(3, 6\) or \(6,\), got \(6, 3\)"),
    ({"done": True}, "done must be of shape .*, got bool"),
    ({"lengths": torch.tensor([1, 2])}, r"lengths must be 6 integers beside padded rows"),
    ({"lengths": torch.tensor([1.0] * B)}, "lengths must be 6 integers"),
    ({"lengths": torch.tensor([0] * B)}, "lengths must be from 1 to 3, got 0 to 0"),
    ({"lengths": torch.tensor([4] * B)}, "lengths must be from 1 to 3, got 4 to 4"),
    (
        {"lengths": torch.tensor([3] * B), "done": torch.zeros(3, B)},
        r"done must be of shape \(6,\)",
    ),
    ({"context": (X, X, X)}, "context must be a tensor or a pair of them, got 3"),
]
OF_STEP = [
    ({"target": Y[:2]}, r"target must be"),
    ({"target": Y.t()}, r"target must be"),
    ({"target": Y.float()}, "target must be"),
    ({"target": Y + N}, "target must hold labels from 0 to 4|out of bounds"),
    ({"target": Y.numpy()}, "target must be a tensor, got ndarray"),
    ({"criterion": "hinge"}, 'criterion must be "cross_entropy", "mse" or a callable, got'),
    ({"criterion": lambda a, b: a.detach().sum()}, "must return one number that depends on the"),
    ({"criterion": lambda a, b: a}, "must return one number"),
    ({"head": "linear"}, "head must be a module, got str"),
    ({"head": nn.Linear(H + 1, N)}, "head must take 4 features|shapes cannot be multiplied"),
    ({"optimizer": None}, "optimizer must be a torch.optim optimizer"),
    ({"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)},
     "optimizer must hold parameters of the network alone"),
]  # fmt: skip


def written(rnn, head):
    return [*rnn.parameters(), *head.parameters()]


@pytest.mark.parametrize(("given", "message"), GIVEN)
@pytest.mark.parametrize("by", ["forward", "step", "repeated step"])
def test_what_a_window_refuses(given, message, by):
    rnn, head, optimizer = network()
    state = None
    for _ in range(2 * (by == "repeated step")):
        state = rnn.step(X, Y, state, head, optimizer).state
    before = [p.clone() for p in written(rnn, head)]
    arguments = {"x": X, "state": state} | given
    with pytest.raises(RuntimeError, match=message):
        if by == "forward":
            rnn(**arguments)
        else:
            rnn.step(target=Y, head=head, optimizer=optimizer, **arguments)
    assert all(map(torch.equal, written(rnn, head), before))
    assert all(p.grad is None for p in written(rnn, head))
    rnn.step(X, Y, state, head, optimizer)


@pytest.mark.parametrize(("given", "message"), OF_STEP)
@pytest.mark.parametrize("repeated", [False, True])
def test_what_a_step_refuses(given, message, repeated):
    rnn, head, optimizer = network()
    state = None
    for _ in range(2 * repeated):
        state = rnn.step(X, Y, state, head, optimizer).state
    before = [p.clone() for p in written(rnn, head)]
    arguments = {"target": Y, "head": head, "optimizer": optimizer} | given
    if "head" in given and isinstance(given["head"], nn.Module):
        every = [*rnn.parameters(), *given["head"].parameters()]
        arguments["optimizer"] = torch.optim.SGD(every, 0.1)
    with pytest.raises((RuntimeError, TypeError, ValueError, IndexError), match=message):
        rnn.step(X, state=state, **arguments)
    assert all(map(torch.equal, written(rnn, head), before))
    assert all(p.grad is None for p in written(rnn, head))
    rnn.step(X, Y, state, head, optimizer)


def test_modes():
    rnn, head, optimizer = network()
    rnn.eval()
    with pytest.raises(RuntimeError, match="must be in training mode; call rnn.train()"):
        rnn.step(X, Y, None, head, optimizer)
    rnn.train()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        rnn.step(X, Y, None, head, optimizer)
    with pytest.raises(RuntimeError, match="no window is open"):
        rnn.backward()
    with torch.no_grad():
        rnn(X)
    with pytest.raises(RuntimeError, match="no window is open"):
        rnn.backward()


def test_windows_do_not_wait_for_ever():
    rnn, _, _ = network()
    for _ in range(100):
        rnn(X)
    with pytest.raises(RuntimeError, match="100 windows wait for their backward pass"):
        rnn(X)
    rnn.backward()
    rnn(X)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"layout": "stacked"}, "layout must be one of joined, shared, layers, hidden, got"),
        ({"scale": "sum"}, "scale must be one of 'batch', 'layers', 'mean', got 'sum'"),
        ({"first": None}, "first must be one of 'skip', 'train', got None"),
        ({"end": "one"}, "end must be one of None, 'zero', got 'one'"),
        ({"factor": None}, "factor must be a number, got None"),
        ({"factor": float("inf")}, "factor must be finite, got inf"),
        ({"horizon": -1}, "horizon must be an integer from 0 on, got -1"),
        ({"horizon": 1.5}, "horizon must be an integer from 0 on, got 1.5"),
        ({"trace_lambda": 1.5}, "trace_lambda must be from 0 to 1, got 1.5"),
        ({"trace_lambda": 0.5, "trace_windows": 0}, "trace_windows must be a positive integer"),
        ({"trace_windows": 2}, "trace_windows is for a trace_lambda"),
        ({"trace_lambda": 0.5, "trace_view": "both"}, "trace_view must be one of"),
        ({"trace_lambda": 0.5, "trace_view": "online", "trace_windows": 2}, "trace_windows is for"),
        ({"trace_lambda": 0.5, "trace_view": "online", "layout": "shared"}, 'layout="joined", got'),
        ({"target_clip": 0}, "target_clip must be positive, got 0"),
        ({"target_scale": -1.0}, "target_scale must be positive, got -1.0"),
        ({"discount": "half"}, "discount must be a number, got 'half'"),
        ({"n_hidden": -1}, "n_hidden must be an integer from 0 on"),
        ({"layout": "layers", "synthesizer": [nn.Linear(8, 8)]}, "must have 2 synthesizers, got 1"),
    ],
)
def test_what_the_constructor_refuses(how, message):
    with pytest.raises(ValueError, match=message):
        network(**how)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_two_directions(kind):
    with pytest.raises(ValueError, match="it has no future to predict|no future to predict"):
        fastdni.DecoupledRNN(kind(K, H, bidirectional=True))


def test_what_is_no_module():
    with pytest.raises(TypeError, match="rnn must be a module, got function"):
        fastdni.DecoupledRNN(lambda x, state: (x, state))


def test_what_is_no_synthesizer():
    for given in (8, [nn.Linear(8, 8), None]):
        with pytest.raises(TypeError, match=r"synthesizer must be a module M\(s, ctx\), got"):
            fastdni.DecoupledRNN(nn.LSTM(K, H), given)


def test_a_backward_pass_of_the_users_own():
    rnn, head, _ = network()
    output, _ = rnn(X)
    loss = nn.functional.cross_entropy(head(output).flatten(0, 1), Y.flatten())
    loss.backward()
    with pytest.raises(RuntimeError, match=r"call rnn.backward\(loss\) in the place of loss"):
        rnn.backward(loss)


def test_traces_have_their_limits():
    rnn, *_ = network(nn.LSTM(K, 200), trace_lambda=0.5, trace_view="online")
    with pytest.raises(
        RuntimeError, match=r'"online" must keep .* GiB .* may keep 1; the other way'
    ):
        rnn(X)
    rnn, head, optimizer = network(nn.GRU(K, H), trace_lambda=0.5)
    state = None
    for _ in range(1000):
        state = rnn.step(X, Y, state, head, optimizer).state
    with pytest.raises(RuntimeError, match="1000 windows are kept for their lambda-targets; say"):
        rnn.step(X, Y, state, head, optimizer)


def test_a_synthesizer_of_another_width():
    rnn, head, optimizer = network(synthesizer=fastdni.BasicSynthesizer(7))
    with pytest.raises(RuntimeError, match="7"):
        rnn.step(X, Y, None, head, optimizer)
    assert all(p.grad is None for p in written(rnn, head))
