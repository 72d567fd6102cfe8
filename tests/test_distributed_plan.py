"""The plan's command line, the distributed example's, and what keeps late gradients harmless."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdni.distributed import plan
from fastdni.distributed.safety import Diverged, Safety

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "distributed_fcn.py"
LINK = ["--stages", "4", "--stage-ms", "5", "--latency-ms"]


def test_a_slow_link(capsys, tmp_path):
    out = tmp_path / "plan.png"
    assert plan.main([*LINK, "20", "--fail-every", "1h", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "Decoupling pays here" in said and "PipeDream-2BW" in said and "keep 99" in said
    assert out.read_bytes().startswith(b"\x89PNG")


def test_no_link_at_all(capsys):
    assert plan.main([*LINK, "0", "--microbatches", "64", "--frame-mb", "0"]) == 0
    assert "does not pay here: 0.88 times the batches of zero bubble" in capsys.readouterr().out


def test_the_staleness_that_hides_a_link():
    case = plan.Case(4, 0.005, 0.02, 0.0, 0.0, 8, 0.0)
    assert plan.staleness_for(case) == 10
    hidden, short = (plan.decoupled(case, staleness).seconds for staleness in (10, 4))
    assert hidden == pytest.approx(0.005)
    # A round trip and two stages' time for every five messages.
    assert short == pytest.approx((2 * 0.02 + 2 * 0.005) / 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: --stages, --stage-ms, --latency-ms"),
        (["--stages", "1"], "argument --stages: must be an integer from 2 on, got '1'"),
        (["--stage-ms", "0"], "argument --stage-ms: must be a number above 0, got '0'"),
        (["--latency-ms", "fast"], "argument --latency-ms: must be a number from 0, got 'fast'"),
        (["--fail-every", "often"], "must be a time such as 90s, 30m or 1h, got 'often'"),
        ([*LINK, "1", "--out", "plan.txt"], "argument --out: must name a .png file"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        plan.main(arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2 and message in said and said.count("\n") == 1


def example(*arguments, processes=None):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launch if processes else []), str(EXAMPLE), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("RANK", None)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def test_the_example_reports_and_draws(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    out = tmp_path / "stages.png"
    done = example("--epochs", "2", "--width", "32", "--out", str(out), processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "stage 1" in done.stdout and "batches a second" in done.stdout
    assert out.read_bytes().startswith(b"\x89PNG")


def test_the_example_alone():
    done = example()
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "must be started by torchrun" in done.stderr


# ---- what keeps late gradients harmless ----


def optimizer(lr=0.1):
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr)


def test_rates_are_capped_by_staleness(caplog):
    late = optimizer()
    with caplog.at_level(logging.WARNING, "fastdni.distributed"):
        safety = Safety(late, 32, 8, True)
    assert "learning rates count 0.25 times" in caplog.text
    with safety.capped():
        assert late.param_groups[0]["lr"] == pytest.approx(0.025)
    assert late.param_groups[0]["lr"] == 0.1
    for staleness, cap in ((8, 8), (0, 8), (32, None)):
        assert Safety(late, staleness, cap, True).factor == 1
    with pytest.raises(ValueError, match="cap must be positive or None, got 0"):
        Safety(late, 1, 0, True)


def losses(safety, *values):
    for value in values:
        for _ in range(20):
            safety.look_at(torch.tensor(value))


def test_a_loss_that_grows_is_warned_of_once(caplog):
    with caplog.at_level(logging.WARNING, "fastdni.distributed"):
        losses(Safety(optimizer(), 4, 8, True), 1.0, 0.5, 0.4, 0.6, 0.5)
        assert caplog.text == ""
        losses(Safety(optimizer(), 4, 8, True), 0.5, *[3.0] * 20)
        assert caplog.text.count("the loss has grown") == 1
        caplog.clear()
        losses(Safety(optimizer(), 4, 8, False), 0.5, *[3.0] * 20, float("nan"))
        assert caplog.text == ""


def test_a_loss_that_is_not_finite_ends_training():
    with pytest.raises(Diverged, match="the loss is nan after 40 messages"):
        losses(Safety(optimizer(), 4, 8, True), 0.5, float("nan"))
