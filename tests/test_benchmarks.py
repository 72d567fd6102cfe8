"""The suites under benchmarks/, what compares their results, and the README's tables."""

import importlib
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from fastdni.bench.cases import Case

ROOT = Path(__file__).parents[1]
SUITES = ("network", "dropin", "scaling")
TINY = Case((7, 9, 6, 5), 8)


@pytest.fixture
def benchmark(monkeypatch):
    """Imports `benchmarks.<name>` from the checkout, with tiny cases, nothing compiled."""
    monkeypatch.syspath_prepend(ROOT)
    network, dropin, scaling = (
        importlib.import_module(f"benchmarks.suite_{name}") for name in SUITES
    )
    cases = {"talk": TINY, "paper3": TINY._replace(norm=True)}
    monkeypatch.setattr(network, "CASES", cases)
    monkeypatch.setattr(network, "MEMORY_STEPS", 3)
    monkeypatch.setattr(dropin, "WIDTHS", (12,))
    monkeypatch.setattr(dropin, "BATCHES", (8,))
    runs = {
        network: {name: partial(network.run, name) for name in cases},
        dropin: {
            f"{scheme}-{threads}": partial(dropin.run, scheme, 12, 8, threads)
            for scheme in ("dni", "cdni")
            for threads in (1, 2)
        },
        scaling: {
            "width-7": partial(scaling.run, "width", 7, TINY, 1),
            "width-9": partial(scaling.run, "width", 9, TINY, 1),
            "threads-2": partial(scaling.run, "threads", 2, TINY, 2),
        },
    }
    for module, found in runs.items():
        monkeypatch.setattr(module, "SUITE", module.SUITE._replace(cases=found))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


_made: list[Path] = []


@pytest.fixture
def results(benchmark, tmp_path, tmp_path_factory):
    """A folder of results of all suites: copies of what is measured once."""
    if not _made:
        folder, run = tmp_path_factory.mktemp("results"), benchmark("suite").main
        for name in SUITES:
            how = ["--quick", "--rounds", "2", "--output", str(folder)]
            assert run(benchmark(f"suite_{name}").SUITE, how) == 0
        _made.append(folder)
    return shutil.copytree(_made[0], tmp_path / "a")


def test_suites_write_results_tables_and_pictures(results, capsys):
    for name in SUITES:
        stored = json.loads((results / f"{name}.json").read_text())
        assert stored["hardware"]["torch"] == torch.__version__
        assert (results / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        text = (results / f"{name}.md").read_text()
        for result in stored["results"]:
            of_eager = result["ratios"].get("eager")
            if of_eager is not None:
                assert f"{of_eager['value']:.2f}" in text
    stored = json.loads((results / "network.json").read_text())
    assert stored["memory"]["workspace_bytes"] > 0
    assert [result["case"]["size"] for result in stored["results"]] == ["talk", "paper3"]
    assert all("fastdni bf16" in result["seconds"] for result in stored["results"])


def test_a_suite_gives_torch_its_threads_back(benchmark, capsys):
    threads = torch.get_num_threads()
    benchmark("suite").main(
        benchmark("suite_scaling").SUITE, ["--rounds", "1", "--cases", "width-7"]
    )
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--cases", "huge"], "invalid choice: 'huge'"),
        (["--rounds", "0"], "must be a whole number of at least 1, got '0'"),
    ],
)
def test_suites_refuse(benchmark, capsys, arguments, message):
    with pytest.raises(SystemExit) as refused:
        benchmark("suite").main(benchmark("suite_network").SUITE, arguments)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_compare_marks_what_left_its_band(benchmark, results, capsys):
    stored = json.loads((results / "network.json").read_text())
    ratios = stored["results"][0]["ratios"]
    ratios["eager"] = {key: 3 * value for key, value in ratios["eager"].items()}
    other = results.parent / "b"
    other.mkdir()
    (other / "network.json").write_text(json.dumps(stored))
    capsys.readouterr()
    assert benchmark("compare").main([str(results), str(other)]) == 0
    out = capsys.readouterr().out
    count = sum(len(result["ratios"]) for result in stored["results"])
    assert f"1 of {count} ratios changed by more than their noise bands" in out
    (line,) = [line for line in out.splitlines() if line.startswith("talk")]
    assert "eager" in line and line.split()[-2:] == ["3.00", "*"]
    assert "== dropin" not in out


def test_compare_refuses_folders_without_results(benchmark, tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        benchmark("compare").main([str(tmp_path), str(tmp_path / "none")])
    assert refused.value.code == 2
    assert "holds no results" in capsys.readouterr().err


def test_readme_tables_are_filled_from_results(benchmark, results):
    readme = benchmark("readme")
    text = "before\n<!-- network: a/network.json -->\nold\n<!-- end -->\nbetween\n"
    text += "<!-- dropin: a/dropin.json -->\n<!-- end -->\nafter\n"
    filled = readme.fill(text, results.parent)
    assert filled == readme.fill(filled, results.parent) and "old" not in filled
    assert filled.startswith("before\n") and filled.endswith("\nafter\n")
    stored = json.loads((results / "network.json").read_text())
    value = stored["results"][0]["ratios"]["eager"]["value"]
    assert "| 7-9-6-5, batch 8, BatchNorm | " in filled and f" | {value:.2f} | " in filled
    assert "| cDNI (label context) | 784-12-12-10 | 8 | " in filled
    assert f"commit {stored['hardware']['commit']}; " in filled
    del stored["hardware"]["commit"]
    (results / "network.json").write_text(json.dumps(stored))
    assert "unknown commit; " in readme.fill(text, results.parent)


def test_the_readme_is_as_its_results_are(benchmark, capsys):
    assert benchmark("readme").main(["--check"]) == 0
