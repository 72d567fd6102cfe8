"""The timing loop and its tables, and the benchmarks that are built on them."""

import importlib
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import fastdni
from fastdni import bench
from fastdni.bench import dropin, report, timing

ROOT = Path(__file__).parents[1]


class Clock:
    """Stands in for `perf_counter`: time passes only where a step says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def step(self, *durations: float):
        """A callable that takes each duration in turn, the last one from then on."""
        left = list(durations)

        def run():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "perf_counter", clock)
    return clock


@pytest.fixture
def benchmark_module(monkeypatch):
    """Imports `benchmarks.<name>` from the checkout and gives torch its threads back."""
    monkeypatch.syspath_prepend(ROOT)
    threads = torch.get_num_threads()
    yield lambda name: importlib.import_module(f"benchmarks.{name}")
    torch.set_num_threads(threads)


def test_timing_interpolates_between_samples():
    found = bench.Timing.of([[5.0, 1.0, 4.0], [2.0, 3.0, 6.0]])
    assert found == bench.Timing(median=3.5, p20=2.0, p80=5.0, count=6)
    assert found.rounds == (4.0, 3.0)
    assert found.numbers() == {"median": 3.5, "p20": 2.0, "p80": 5.0, "count": 6}
    assert bench.Timing.of([[7.0]]) == bench.Timing(7.0, 7.0, 7.0, 1)


def test_ratio_compares_round_by_round():
    """A machine that slows down tenfold halfway changes no ratio."""
    fast = bench.Timing.of([[1.0], [1.0], [10.0], [10.0], [1.0]])
    slow = bench.Timing.of([[2.0], [2.0], [20.0], [25.0], [3.0]])
    ratio = bench.Ratio.of(slow, fast)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.9))


def test_interleave_rotates_the_order():
    called = []
    steps = {name: lambda name=name: called.append(name) for name in "ABC"}
    timings = bench.interleave(steps, rounds=4, warmup=2)
    assert "".join(called) == "ABCABC" + "ABC" + "BCA" + "CAB" + "ABC"
    assert list(timings) == ["A", "B", "C"]
    assert all(timing.count == 4 for timing in timings.values())


def test_interleave_times_each_step_by_itself(clock):
    steps = {"constant": clock.step(2.0), "warm": clock.step(100.0, 1.0, 2.0, 3.0, 4.0, 5.0)}
    timings = bench.interleave(steps, rounds=5, warmup=1)
    assert timings["constant"] == bench.Timing(2.0, 2.0, 2.0, 5)
    assert timings["warm"].median == 3.0
    assert (timings["warm"].p20, timings["warm"].p80) == pytest.approx((1.8, 4.2))


def test_a_gpus_calls_are_timed_in_a_row(clock, monkeypatch):
    """To launch and to wait takes longer than a short call, and none of it is the call's."""
    waits = []

    def wait(device):
        waits.append(device)
        clock.now += 1e-5

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    steps = {"short": clock.step(1e-6), "long": clock.step(5e-3)}
    timings = bench.interleave(steps, rounds=2, burst=3, device="cuda")
    assert timings["short"].median == pytest.approx(1e-6, rel=0.01)
    assert timings["long"].median == pytest.approx(5e-3, rel=0.01)
    assert timings["short"].count == timings["long"].count == 6
    assert set(waits) == {"cuda"}


def test_interleave_stops_at_its_time(clock):
    timings = bench.interleave({"a": clock.step(1.0), "b": clock.step(2.0)}, seconds=7, warmup=4)
    assert timings["a"].count == timings["b"].count == 3


def test_interleave_runs_one_round_however_long_it_takes(clock):
    assert bench.interleave({"slow": clock.step(60.0)}, seconds=1, warmup=0)["slow"].count == 1


def test_interleave_takes_at_least_so_many_rounds(clock):
    how = {"warmup": 0, "least": 3}
    assert bench.interleave({"a": clock.step(60.0)}, seconds=1, **how)["a"].count == 3
    assert bench.interleave({"a": clock.step(1.0)}, seconds=7, **how)["a"].count == 7
    assert bench.interleave({"a": clock.step(1.0)}, rounds=1, **how)["a"].count == 1


@pytest.mark.parametrize(
    "limits, message",
    [
        ({}, "either rounds or seconds"),
        ({"rounds": 1, "seconds": 1.0}, "either rounds or seconds"),
        ({"rounds": 0}, "must be positive, got 0"),
        ({"seconds": float("nan")}, "must be positive, got nan"),
        ({"rounds": 1, "warmup": -1}, "warmup must not be negative, got -1"),
    ],
)
def test_interleave_refuses(limits, message):
    with pytest.raises(ValueError, match=message):
        bench.interleave({"step": lambda: None}, **limits)


def test_table_aligns():
    rows = [["a", 1, "10.00"], ["long name", 200, "3.14"]]
    assert bench.table(rows, ["name", "B", "us"]).splitlines() == [
        "name         B     us",
        "---------  ---  -----",
        "a            1  10.00",
        "long name  200   3.14",
    ]


def test_table_in_markdown():
    assert bench.table([["a", 1]], ["name", "B"], markdown=True).splitlines() == [
        "| name |  B |",
        "| ---- | -: |",
        "| a    |  1 |",
    ]


def test_header_names_the_machine():
    info = bench.hardware()
    assert info["cores"] >= 1 and info["threads"] == torch.get_num_threads()
    line = bench.header(info)
    assert "\n" not in line
    for key in ("cpu", "isa", "torch", "date"):
        assert str(info[key]) in line


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_commit_is_that_of_the_file(monkeypatch, tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True)

    file = tmp_path / "bench.py"
    file.write_text("1\n")
    monkeypatch.setattr(report, "__file__", str(file))
    monkeypatch.delenv("FASTDNI_COMMIT", raising=False)
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message", "of another project")
    assert "commit" not in bench.hardware(), "an untracked file is of no commit"
    monkeypatch.setenv("FASTDNI_COMMIT", "1234567")
    assert bench.hardware()["commit"] == "1234567", "which may be said"
    git("add", "bench.py")
    git("commit", "--quiet", "--message", "adds the file")
    commit = bench.hardware()["commit"]
    assert len(commit) >= 7 and set(commit) <= set("0123456789abcdef")
    file.write_text("2\n")
    assert bench.hardware()["commit"] == commit + "-dirty"


@pytest.mark.parametrize("scheme", dropin.SCHEMES)
def test_dropin_variants_agree(scheme):
    dropin.check(scheme, (20, 12, 12, 5), batch=16, others=(fastdni,))


def test_dropin_notices_a_wrong_variant(monkeypatch):
    build = dropin.build

    def wrong(variant, *arguments):
        network = build(variant, *arguments)
        if variant == "fastdni":
            network.norms[0].eps = 1e-2
        return network

    monkeypatch.setattr(dropin, "build", wrong)
    with pytest.raises(ArithmeticError, match="^fastdni, dni, 20-12-12-5, batch 16, .*: off by"):
        dropin.check("dni", (20, 12, 12, 5), batch=16)


def test_dropin_measures_under_both_optimizers():
    plain, fused = dropin.measure("cdni", (20, 12, 12, 5), 16, (fastdni,), rounds=2)
    assert list(plain.seconds) == ["fastdni", "eager", "backprop", "peer fastdni"]
    assert list(fused.seconds) == ["fastdni", "easy", "backprop", "peer fastdni"]
    assert fused.case["optimizer"] == "fused Adam"
    assert plain.seconds["eager"].count == 2 * bench.BURST


@pytest.mark.parametrize("onednn", [True, False], ids=["both", "without oneDNN"])
def test_products_reports(benchmark_module, monkeypatch, capsys, onednn):
    products = benchmark_module("suite_products")
    monkeypatch.setattr(products, "SHAPES", ((4, 3, 2),))
    if not onednn:
        for module in (products, fastdni.bench.products):
            monkeypatch.setattr(module, "onednn_linear", lambda: None)
    elif products.onednn_linear() is None:
        pytest.skip("this torch has no oneDNN linear")
    assert products.main(["--quick"]) == 0
    out = capsys.readouterr().out
    assert ("weight oneDNN" in out) == onednn
    assert ("only MKL is measured" in out) != onednn
    (line, *_) = [line for line in out.splitlines() if line.startswith("bf16")]
    times = line.split()[5:]
    assert len(times) == (8 if onednn else 5)
    # Some processors have no bfloat16 product in oneDNN.
    assert all(time == "-" or float(time) > 0 for time in times) and times[0] != "-"


def test_a_burst_times_all_but_its_first_call():
    calls = []
    steps = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    timings = bench.interleave(steps, rounds=2, burst=3, warmup=0)
    assert "".join(calls) == "aaaabbbb" + "bbbbaaaa"
    assert {name: timing.count for name, timing in timings.items()} == {"a": 6, "b": 6}
    with pytest.raises(ValueError, match="burst must be at least 1"):
        bench.interleave(steps, rounds=1, burst=0)
