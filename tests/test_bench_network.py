"""The benchmark of decoupled networks: its forms of a step, its check of them, its report."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fastdni import bench

ROOT = Path(__file__).parents[1]
TINY = {
    "sgd": {"optimizer": "sgd", "activation": nn.Sigmoid, "context": False},
    "adam": {},
    "norm": {"norm": True},
}


@pytest.fixture
def network(monkeypatch):
    """The benchmark, which compiles nothing here, and torch's threads afterwards as before."""
    monkeypatch.syspath_prepend(ROOT)
    threads = torch.get_num_threads()
    module = importlib.import_module("benchmarks.network")
    monkeypatch.setattr(module, "compiled", lambda function: function)
    yield module
    torch.set_num_threads(threads)


def tiny(network, **how):
    """A size that no test has to wait for."""
    return network.Size((7, 9, 6, 5), 8, **how)


def checked(network, size) -> None:
    """The benchmark's check of everything that it checks."""
    columns = ("fastdni", *network.COMPILED)
    network.check("tiny", size, {column: network.prepare(column, size) for column in columns})


@pytest.mark.parametrize("update_in_graph", [False, True], ids=["fused update", "update in graph"])
@pytest.mark.parametrize("how", TINY.values(), ids=TINY)
def test_forms_of_a_step_agree(network, how, update_in_graph):
    checked(network, tiny(network, **how, update_in_graph=update_in_graph))


@pytest.mark.parametrize("column", ["fastdni", "compiled", "backprop compiled"])
def test_a_wrong_form_is_noticed(network, monkeypatch, column):
    """The weight of one layer differs by a hundredth."""
    prepare = network.prepare

    def wrong(name, *arguments):
        candidate = prepare(name, *arguments)
        if name == column:
            with torch.no_grad():
                candidate.net.stages[1][0].weight *= 1.01
        return candidate

    monkeypatch.setattr(network, "prepare", wrong)
    with pytest.raises(AssertionError, match=f"^{column}, tiny, float.*: .* off by .*, allowed"):
        checked(network, tiny(network))


def test_a_wrong_scale_is_noticed_under_adam(network, monkeypatch):
    """Adam's first update does not depend on a gradient's scale, its state does."""
    gradients = network.gradients

    def doubled(*arguments):
        *results, found = gradients(*arguments)
        return *results, [*found[:-1], 2 * found[-1]]

    monkeypatch.setattr(network, "gradients", doubled)
    with pytest.raises(AssertionError, match="exp_avg"):
        checked(network, tiny(network))


def test_nan_is_the_largest_error(network):
    zero, one, nan = torch.zeros(2), torch.ones(2), torch.tensor([0.0, float("nan")])
    off, where = network.error({"a": 2 * one, "b": nan, "c": one}, dict.fromkeys("abc", one), {})
    assert where == "b" and off != off
    assert network.error({"a": 3 * one}, {"a": 2 * one}, {"a": one}) == (1.0, "a")
    assert network.error({"a": zero}, {"a": zero}, {"a": zero}) == (0.0, "a")


@pytest.mark.parametrize("product", ["forward", "weight", "input"])
def test_libraries_make_the_same_product(network, product):
    shape = {"forward": (4, 5), "weight": (5, 3), "input": (4, 3)}[product]
    made = {name: f() for name, f in network.product_calls(4, product, inputs=3, outputs=5).items()}
    for library, found in made.items():
        found = found.t() if library == "MKL transposed" else found
        assert found.shape == shape
        torch.testing.assert_close(found, made["MKL"])


@pytest.mark.parametrize("quick", [True, False], ids=["quick", "full"])
def test_network_reports(network, monkeypatch, tmp_path, capsys, quick):
    sizes = {"tiny": tiny(network), "tiny-bn": tiny(network, norm=True, optimizer="sgd")}
    monkeypatch.setattr(network, "SIZES", sizes)
    monkeypatch.setattr(network, "MEMORY_STEPS", 3)
    out = tmp_path / "out.json"
    arguments = ["--rounds", "1", "--sizes", "tiny", "tiny-bn", "--json", str(out)]
    assert network.main(arguments + ["--quick"] * quick) == 0

    written = json.loads(out.read_text())
    assert written["hardware"]["threads"] == 1
    assert [result["case"]["size"] for result in written["results"]] == list(sizes)
    assert written["memory"]["size"] == "tiny" and written["memory"]["workspace_bytes"] > 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for result in written["results"]:
        seconds, ratios = result["seconds"], result["ratios"]
        assert set(network.COLUMNS) - set(seconds) == (set(network.COMPILED) if quick else set())
        assert all(timing["count"] == bench.BURST for timing in seconds.values())
        expected = seconds["eager"]["median"] / seconds["fastdni"]["median"]
        assert ratios["eager/fastdni"] == pytest.approx(expected)
        assert ("compiled/fastdni" in ratios) != quick
        of_ratios, of_times = [line for line in lines if line[:1] == [result["case"]["size"]]]
        assert f"{ratios['eager/fastdni']:.2f}" in of_ratios and (("-" in of_ratios) == quick)
        assert f"{1e6 * seconds['fastdni']['median']:.0f}" == of_times[1]


def test_nothing_is_compiled_once_time_is_up(network, monkeypatch, capsys):
    monkeypatch.setattr(network, "SIZES", {"tiny": tiny(network)})
    monkeypatch.setattr(network, "MEMORY_STEPS", 1)
    monkeypatch.setattr(network, "COMPILE_SECONDS", -1)
    assert network.main(["--rounds", "1"]) == 0
    assert "compiled/fastdni:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sizes", "huge"], "invalid choice: 'huge'"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--threads", "-2"], "--threads must be at least 1, got -2"),
    ],
)
def test_network_refuses(network, capsys, arguments, message):
    with pytest.raises(SystemExit) as refused:
        network.main(arguments)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
