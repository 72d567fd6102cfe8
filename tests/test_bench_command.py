"""`python -m fastdni bench`: what it writes, and what it says of arguments that are wrong."""

import json
import sys

import pytest
import torch

from fastdni.__main__ import main
from fastdni.bench import forms

TINY = ["--net", "7-9-6-5", "--batch", "8", "--rounds", "2"]


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Nothing is compiled here, and torch has its threads again afterwards."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(forms, "compiled", lambda function, **options: function)
    yield
    torch.set_num_threads(threads)


def bench(*arguments) -> int:
    return main(["bench", *map(str, arguments)])


def is_png(path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_one_size(tmp_path, capsys):
    picture, results, trace = (tmp_path / name for name in ("a.png", "a.json", "t.json"))
    assert bench(*TINY, "--threads", 1, "--plot", picture, "--json", results, "--trace", trace) == 0
    out = capsys.readouterr().out
    assert "7-9-6-5, batch 8, adam, linear synthesizers with label context, fp32, cpu" in out
    for form in ("fastdni cpu", "fastdni reference", "eager fused", "backprop compiled"):
        assert f"\n{form}  " in out
    assert is_png(picture)

    written = json.loads(results.read_text())
    assert written["hardware"]["threads"] == 1
    (result,) = written["results"]
    assert result["seconds"]["eager"]["count"] in (4, 16)  # 4 where steps take long: a busy machine
    assert result["ratios"]["eager"]["value"] > 0 and "fastdni cpu" not in result["ratios"]

    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"fastdni cpu", "eager", "fastdni::sweep_"} <= names
    phases = {"fastdni::sweep pack weights", "fastdni::sweep weight gradients and updates"}
    assert phases <= names
    launches = out[out.index("operators a step") :].splitlines()
    calls = {line.rsplit(None, 2)[0].strip(): line.rsplit(None, 2)[1] for line in launches[2:-3]}
    assert calls["fastdni cpu"] == "1" and float(calls["eager"]) > 50


@pytest.mark.parametrize(
    "sweep, values",
    [("width=4..10", [4, 8, 10]), ("layers=2..4", [2, 4]), ("batch=3..3", [3])],
)
def test_a_sweep(tmp_path, capsys, sweep, values):
    name = sweep.partition("=")[0]
    picture, results = tmp_path / "a.png", tmp_path / "a.json"
    how = ["--quick", "--sweep", sweep, "--plot", picture, "--json", results]
    assert bench(*TINY, *how) == 0
    written = json.loads(results.read_text())["results"]
    assert [result["case"][name] for result in written] == values
    nets = {
        "width": ["7-4-4-5", "7-8-8-5", "7-10-10-5"],
        "layers": ["7-9-5", "7-9-9-9-5"],
        "batch": ["7-9-6-5"],
    }[name]
    assert [result["case"]["case"].partition(",")[0] for result in written] == nets
    assert all("compiled" not in result["seconds"] for result in written)
    assert is_png(picture)
    lines = capsys.readouterr().out.splitlines()
    for value in values:
        assert any(line.split()[:1] == [str(value)] for line in lines)


def test_drop_in_with_a_peer(tmp_path, capsys, monkeypatch):
    """A library of one's own, of which fastdni itself stands in here."""
    (tmp_path / "own_copy.py").write_text("from fastdni import *\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert bench(*TINY, "--drop-in", "--peer", "own_copy", "--plot", tmp_path / "a.png") == 0
    out = capsys.readouterr().out
    assert out.count("\npeer own_copy  ") == 6 and "complete unlock, 7-9-6-5, 8, Adam" in out
    assert is_png(tmp_path / "a.png")


def test_a_peer_that_computes_something_else_is_not_timed(tmp_path, capsys, monkeypatch):
    (tmp_path / "other.py").write_text(
        "from fastdni import *\n"
        "import torch, fastdni\n"
        "class BackwardInterface(fastdni.BackwardInterface):\n"
        "    def forward(self, h):\n"
        "        return 1.001 * super().forward(h)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert bench(*TINY, "--drop-in", "--peer", "other") == 1
    assert "not the same step, so nothing was timed: other, dni" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--net", "784-0-10"], "three or more widths of at least 1, such as 784-256-256-10, got"),
        (["--batch", "0"], "must be a whole number of at least 1, got '0'"),
        (["--batch", "1", "--batch-norm"], "--batch must be at least 2 with --batch-norm"),
        (["--backends", "tpu"], "there is no 'tpu', only cpu, cuda, triton, reference"),
        (["--backends", "triton"], "triton"),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda: torch sees no CUDA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU"),
        ),
        (["--precision", "tf32"], "--precision tf32 is one of CUDA GPUs"),
        (["--precision", "fp8"], "invalid choice: 'fp8'"),
        (["--synthesizer", "mlp:0"], "a synthesizer is linear, mlp:WIDTH"),
        (["--sweep", "width=64"], "a sweep is width=FROM..TO"),
        (["--sweep", "layers=1..4"], "a sweep is width=FROM..TO, layers=FROM..TO (at least 2)"),
        (["--sweep", "width=64..32"], "a sweep is width=FROM..TO"),
        (["--sweep", "depth=2..4"], "a sweep is width=FROM..TO"),
        (["--seconds", "0"], "--seconds must be positive, got 0"),
        (["--drop-in", "--peer", "no_such_module"], "cannot import 'no_such_module': No module"),
        (["--drop-in", "--peer", "json"], "'json' has no BasicSynthesizer, BackwardInterface"),
        (["--peer", "fastdni"], "--peer goes with --drop-in"),
        (["--drop-in", "--sweep", "width=2..4"], "--drop-in goes without --sweep"),
        (["--drop-in", "--precision", "bf16"], "--drop-in goes without --precision"),
        (["--plot", "no/such/folder/a.png"], "cannot write no/such/folder/a.png: No such file"),
        (["--json", "/"], "cannot write /: Is a directory"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_bad_arguments_get_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as refused:
        bench(*arguments)
    assert refused.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert message in line and line.startswith("python -m fastdni")


def test_a_picture_has_a_format(capsys, tmp_path):
    with pytest.raises(SystemExit) as refused:
        bench("--plot", tmp_path / "a.txt")
    assert refused.value.code == 2
    assert "--plot must be a picture such as speedup.png, got" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_busy_machine_is_pointed_out(capsys, monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 0.0, 0.0))
    assert bench(*TINY, "--quick", "--backends", "cpu") == 0
    assert "others are at work on this machine" in capsys.readouterr().out


def test_a_picture_needs_matplotlib(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    with pytest.raises(SystemExit) as refused:
        bench("--plot", tmp_path / "a.png")
    assert refused.value.code == 2
    assert "--plot needs matplotlib, which is not installed" in capsys.readouterr().err
