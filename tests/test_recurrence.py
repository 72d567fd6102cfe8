"""The recurrence op, against its equations in float64 and torch's own modules."""

import pytest
import torch
from conftest import sample
from torch import nn

from fastdni import ops, reference, use_backend

CELLS = ("lstm", "gru", "tanh", "relu")
# T, B, K, H, layers: one of each, odd ones, whole panels, more rows than a block, many inputs.
SIZES = (
    (1, 1, 1, 1, 2),
    (3, 5, 3, 4, 1),
    (4, 30, 7, 33, 3),
    (2, 64, 32, 32, 2),
    (2, 7, 70, 130, 1),
)


def module(cell, sizes, bias, dtype):
    _, _, inputs, hidden, layers = sizes
    kind = {"lstm": nn.LSTM, "gru": nn.GRU}.get(cell)
    if kind is None:
        made = nn.RNN(inputs, hidden, layers, nonlinearity=cell, bias=bias)
    else:
        made = kind(inputs, hidden, layers, bias=bias)
    return made.to(dtype)


def given(cell, sizes, bias, dtype):
    """x, state, weights: leaves that require grad."""
    steps, batch, inputs, hidden, layers = sizes
    rnn = module(cell, sizes, bias, dtype)
    count = 2 if cell == "lstm" else 1
    x = torch.randn(steps, batch, inputs, dtype=dtype, requires_grad=True)
    state = [
        torch.randn(layers, batch, hidden, dtype=dtype, requires_grad=True) for _ in range(count)
    ]
    return rnn, x, state, [weight for layer in rnn.all_weights for weight in layer]


def results(run, x, state, weights, chosen=(True, True)):
    """Output, state, and the gradients of everything, for random gradients of the two."""
    generator = torch.Generator().manual_seed(1)
    output, after = run()
    pairs = [
        (t, torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype))
        for t in (output, *after)
    ]
    pairs = pairs[:1] * chosen[0] + pairs[1:] * chosen[1]
    found = torch.autograd.grad(
        [t for t, _ in pairs], [x, *state, *weights], [g for _, g in pairs],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    return [output.detach(), *(t.detach() for t in after), *found]


CASES = [
    (cell, sizes, bias, dtype)
    for cell in CELLS
    for sizes in SIZES
    for bias in (True, False)
    for dtype in (torch.float64, torch.float32)
]


@pytest.mark.parametrize(("cell", "sizes", "bias", "dtype"), sample(CASES))
def test_it_is_its_equations_and_torchs_module(cell, sizes, bias, dtype):
    rnn, x, state, weights = given(cell, sizes, bias, dtype)
    found = results(lambda: ops.recurrence(cell, x, state, weights, bias), x, state, weights)

    wide = [t.detach().double().requires_grad_() for t in (x, *state, *weights)]
    count = 1 + len(state)
    of_reference = results(
        lambda: reference.recurrence(cell, wide[0], wide[1:count], wide[count:], bias),
        wide[0], wide[1:count], wide[count:],
    )  # fmt: skip

    def by_module():
        output, after = rnn(x, tuple(state) if cell == "lstm" else state[0])
        return output, list(after) if cell == "lstm" else [after]

    of_torch = results(by_module, x, state, weights)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    for ours, exact, torchs in zip(found, of_reference, of_torch, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(ours, torchs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chosen", [(True, False), (False, True)], ids=["output", "state"])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_may_come_to_output_or_state_alone(cell, chosen):
    _, x, state, weights = given(cell, SIZES[1], True, torch.float64)
    ours = results(lambda: ops.recurrence(cell, x, state, weights), x, state, weights, chosen)
    with use_backend("reference"):
        theirs = results(lambda: ops.recurrence(cell, x, state, weights), x, state, weights, chosen)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_a_backend_without_kernels_has_the_equations():
    pytest.importorskip("triton", reason="Triton is not installed")
    _, x, state, weights = given("lstm", SIZES[1], True, torch.float32)
    wanted = ops.recurrence("lstm", x, state, weights)
    with use_backend("triton"):
        found = ops.recurrence("lstm", x, state, weights)
    torch.testing.assert_close(found, wanted)


def test_it_refuses_what_another_windows_forward_pass_saved():
    _, x, state, weights = given("gru", SIZES[1], True, torch.float64)
    x, state, weights = x.detach(), [s.detach() for s in state], [w.detach() for w in weights]
    output, after, saved = ops.recurrence_fwd("gru", x, state, weights, True)
    with pytest.raises(RuntimeError, match="saved must be what the forward pass of this window"):
        ops.recurrence_bwd(
            "gru", x, state, weights, True, output, saved[1:].clone(), output, after, True
        )


def test_what_is_not_wanted_is_not_made():
    _, x, state, weights = given("gru", SIZES[1], True, torch.float64)
    x, state, weights = x.detach(), [s.detach() for s in state], [w.detach() for w in weights]
    output, after, saved = ops.recurrence_fwd("gru", x, state, weights, True)
    arguments = ("gru", x, state, weights, True, output, saved, output, after)
    whole = ops.recurrence_bwd(*arguments, True)
    grad_x, grad_state, grad_weights = ops.recurrence_bwd(*arguments, False, False)
    assert grad_x.numel() == 0 and not grad_weights
    assert torch.equal(grad_state[0], whole[1][0])


@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell):
    _, x, state, weights = given(cell, SIZES[1], True, torch.float64)
    x, state, weights = x.detach(), [s.detach() for s in state], [w.detach() for w in weights]
    names = ("test_schema", "test_autograd_registration")
    arguments = (cell, x, state, weights, True)
    torch.library.opcheck(torch.ops.fastdni.recurrence_fwd.default, arguments, test_utils=names)
    output, after, saved = ops.recurrence_fwd(*arguments)
    back = (*arguments, output, saved, output, after, True)
    torch.library.opcheck(
        torch.ops.fastdni.recurrence_bwd.default, back, test_utils=(*names, "test_faketensor")
    )


def test_same_bits_for_any_number_of_threads():
    sizes = (3, 200, 48, 96, 2)
    _, x, state, weights = given("lstm", sizes, True, torch.float32)
    found = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        run = results(lambda: ops.recurrence("lstm", x, state, weights), x, state, weights)
        found.append(run)
    assert all(map(torch.equal, found[0], found[1])) and all(map(torch.equal, *found[::2]))


def test_data_of_any_layout():
    _, x, state, weights = given("lstm", SIZES[2], True, torch.float64)
    strided = x.detach().transpose(0, 1).contiguous().transpose(0, 1)
    turned = [s.detach().transpose(1, 2).contiguous().transpose(1, 2) for s in state]
    ours, theirs = (
        ops.recurrence("lstm", a, b, weights)
        for a, b in ((strided, turned), (x.detach(), [s.detach() for s in state]))
    )
    assert torch.equal(ours[0], theirs[0]) and all(map(torch.equal, ours[1], theirs[1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.update(cell="peephole"), 'cell must be one of "lstm"'),
        (lambda g: g.update(x=g["x"][0]), r"x must be \(T, B, K\)"),
        (lambda g: g.update(x=g["x"][:0]), "of one step and one row at least"),
        (lambda g: g.update(x=g["x"].half()), "x must be float32 or float64"),
        (lambda g: g.update(x=g["x"][..., :2]), r"W_ih must be \(16, 2\), got \(16, 3\)"),
        (lambda g: g.update(state=g["state"][:1]), "state must hold 2 tensors, got 1"),
        (lambda g: g["state"].__setitem__(1, g["state"][1][:, :4]), r"state must be \(1, 5, 4\)"),
        (lambda g: g["state"].__setitem__(0, g["state"][0].float()), "state must have x's dtype"),
        (lambda g: g.update(weights=g["weights"][:3]), "weights must hold 4 tensors a layer"),
        (lambda g: g["weights"].__setitem__(2, g["weights"][2][:4]), r"a bias must be \(16,\)"),
    ],
)
def test_what_it_refuses(change, message):
    _, x, state, weights = given("lstm", SIZES[1], True, torch.float64)
    arguments = {"cell": "lstm", "x": x.detach(), "state": state, "weights": weights}
    change(arguments)
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.recurrence_fwd(*arguments.values(), True)
