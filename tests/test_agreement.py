"""The comparison of a device's kernels with plain PyTorch, on a device that is there: the CPU."""

import pytest
import torch

import fastdni
from fastdni import agreement, backend

CPU = torch.device("cpu")


def test_kernels_agree_with_plain_pytorch():
    assert agreement.disagreement(CPU, "cpu") is None


def test_it_is_asked_before_a_gpu_is_served():
    assert backend._disagreement is agreement.disagreement


def test_nothing_around_it_matters_or_is_changed():
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert agreement.disagreement(CPU, "cpu") is None
    torch.set_default_dtype(torch.float64)
    try:
        assert agreement.disagreement(CPU, "cpu") is None
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.random.get_rng_state(), state)


def planted(op, change):
    """The op with a fault in what a device's kernels make of it."""

    def faulty(*arguments, **how):
        results = op(*arguments, **how)
        if fastdni.backend.choice() != "reference":
            change(results)
        return results

    return faulty


FAULTS = {
    "an error": ("regression_loss", lambda found: found[1].mul_(1.001)),
    "NaN": ("synthesizer_fwd", lambda found: found[0][3].fill_(torch.nan)),
    "a wrong gradient": ("synthesizer_bwd", lambda found: found[1][1].neg_()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault, monkeypatch):
    name, change = FAULTS[fault]
    monkeypatch.setattr(agreement.ops, name, planted(getattr(agreement.ops, name), change))
    assert agreement.disagreement(CPU, "cpu").startswith("a synthesizer: an error of ")


@pytest.mark.parametrize("precision", agreement._TOLERANCES)
def test_a_fault_of_a_step_is_seen(precision, monkeypatch):
    """In one precision of products, and there in one row of one result."""
    sweep = agreement.ops.sweep_

    def faulty(plan, *arguments):
        results = sweep(plan, *arguments)
        if plan.backend != "reference" and plan.precision == precision:
            results[0][-1].neg_()
        return results

    monkeypatch.setattr(agreement.ops, "sweep_", faulty)
    message = f"a step of 70-36-10 with {precision} products: an error of "
    assert agreement.disagreement(CPU, "cpu").startswith(message)
