"""Training through the drop-in modules equals training by the plain formula."""

import copy

import pytest
import torch
from plain_dni import batches, networks, train

CASES = [("backward", False), ("backward", True), ("bidirectional", False), ("bidirectional", True)]
cases = pytest.mark.parametrize(
    "kind, context", CASES, ids=[f"{kind}{'-context' if c else ''}" for kind, c in CASES]
)


def relative_error(network, twin):
    """The largest error of any parameter or buffer, relative to the largest entry beside it."""
    worst = 0.0
    for (name, a), (_, b) in zip(
        network.state_dict().items(), twin.state_dict().items(), strict=True
    ):
        if a.is_floating_point():
            error = (a.double() - b.double()).abs().max() / b.abs().max().clamp(min=1e-30)
            assert torch.isfinite(error), name
            worst = max(worst, error.item())
    return worst


@cases
def test_fifty_steps_in_float64(kind, context):
    network, twin = networks(kind, context)
    start = copy.deepcopy(network)
    losses, plain_losses = train(network, batches(50)), train(twin, batches(50))
    assert relative_error(network, twin) < 1e-9
    torch.testing.assert_close(losses, plain_losses, rtol=1e-9, atol=0)
    # It did train, so the equality means something.
    assert plain_losses[-1] < 0.5 * plain_losses[0]
    assert relative_error(start, twin) > 1e-2


@cases
def test_float32_is_as_close_to_float64_as_eager_float32(kind, context):
    exact, _ = networks(kind, context)
    network = copy.deepcopy(exact).float()
    twin = copy.deepcopy(network)
    twin.plain = True
    first, first_twin = copy.deepcopy(network), copy.deepcopy(twin)
    train(first, batches(1, dtype=torch.float32))
    train(first_twin, batches(1, dtype=torch.float32))
    for p, q in zip(first.parameters(), first_twin.parameters(), strict=True):
        # The gradients show the step at its sharpest: Adam divides an entry by its own size, so
        # that where the gradient is rounding noise the updated parameter is noise (of 1e-3) too.
        assert (p.grad - q.grad).abs().max() <= 1e-5 * q.grad.abs().max()
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)

    # Both start from the float32 parameters, rounded once.
    exact = copy.deepcopy(network).double()
    train(exact, batches(50))
    train(network, batches(50, dtype=torch.float32))
    train(twin, batches(50, dtype=torch.float32))
    # A wide net, by nature: at the start predictions are constant over the batch, BatchNorm makes
    # their gradient zero but for rounding, and Adam makes steps of that. Both float32 runs end as
    # far as 0.5 (relative) from float64. The sharp tests are the first step above and float64.
    assert relative_error(network, exact) < 3 * relative_error(twin, exact)
