"""The forms of a step that benchmarks compare: that they are the same step; what is reported."""

import math

import pytest
import torch

from fastdni import bench
from fastdni.bench import forms, limits, network, products
from fastdni.bench.cases import OPTIMIZERS, Case, parse_net, parse_synthesizer

TINY = Case((7, 9, 6, 5), 8)
CASES = {
    **{optimizer: TINY._replace(optimizer=optimizer) for optimizer in OPTIMIZERS},
    "sigmoid": TINY._replace(activation="sigmoid", context=False),
    "tanh": TINY._replace(activation="tanh", optimizer="sgd"),
    "norm": TINY._replace(norm=True),
    "mlp": TINY._replace(hidden=(11, 11)),
}


PLAIN = [form for form in network.forms_for("cuda") if not form.startswith("fastdni")]


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    """Nor captured."""

    def graphed(step):
        products.repeat(step, forms.GRAPH_WARMUP)
        return step

    monkeypatch.setattr(forms, "compiled", lambda function, **options: function)
    monkeypatch.setattr(forms, "graphed", graphed)


def check(case: Case, names=("fastdni", "fastdni reference", *PLAIN[:-1])):
    agree = forms.Check(case)
    for name in names:
        agree(name, forms.prepare(name, case))


@pytest.mark.parametrize("small", [0, 10**6], ids=["fused update", "update in graph"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forms_of_a_step_agree(monkeypatch, case, small):
    monkeypatch.setattr(forms, "_SMALL", small)
    check(case)


@pytest.mark.parametrize("norm", [False, True])
def test_forms_agree_in_bfloat16(norm):
    check(TINY._replace(batch=64, precision="bf16", norm=norm))
    check(TINY._replace(batch=64, norm=norm), ["fastdni bf16"])


@pytest.mark.parametrize("form", ["fastdni", "compiled", "backprop compiled"])
def test_a_wrong_form_is_noticed(form):
    """The weight of one layer differs by a hundredth."""
    agree, candidate = forms.Check(TINY), forms.prepare(form, TINY)
    with torch.no_grad():
        candidate.net.stages[1][0].weight *= 1.01
    with pytest.raises(ArithmeticError, match=f"^{form}, 7-9-6-5, .*: .* off by .*, allowed"):
        agree(form, candidate)


def test_a_wrong_scale_is_noticed_under_adam(monkeypatch):
    """Adam's first update does not depend on a gradient's scale, its state does."""
    gradients = forms.gradients

    def doubled(*arguments):
        *results, found = gradients(*arguments)
        return *results, [*found[:-1], 2 * found[-1]]

    monkeypatch.setattr(forms, "gradients", doubled)
    with pytest.raises(ArithmeticError, match="exp_avg"):
        check(TINY, ["compiled"])


def test_nan_is_the_largest_error():
    zero, one, nan = torch.zeros(2), torch.ones(2), torch.tensor([0.0, float("nan")])
    off, where = forms.error({"a": 2 * one, "b": nan, "c": one}, dict.fromkeys("abc", one), {})
    assert where == "b" and math.isnan(off)
    assert forms.error({"a": 3 * one}, {"a": 2 * one}, {"a": one}) == (1.0, "a")
    assert forms.error({"a": zero}, {"a": zero}, {"a": zero}) == (0.0, "a")


@pytest.mark.parametrize("product", products.PRODUCTS)
def test_libraries_make_the_same_product(product):
    shape = {"forward": (4, 5), "weight": (5, 3), "input": (4, 3)}[product]
    made = {name: f() for name, f in products.product_calls(4, product, 3, 5).items()}
    for found in made.values():
        assert found.shape == shape
        torch.testing.assert_close(found, made["MKL"])


def test_work_counts_products_and_state():
    """784-256-256-10 with linear synthesizers, by hand: 5 products of the two hidden layers but
    for the lowest input gradient, 3 of the head."""
    case = Case((784, 256, 256, 10), 256)
    layers = 2 * 784 * 256 + 3 * 256 * 256 + 3 * 256 * 10
    count = 784 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10 + 2 * (256 * 256 + 11 * 256 + 256)
    flop, traffic = limits.work(case)
    assert flop == 2 * 256 * (layers + 2 * 2 * 256 * 256)
    assert traffic == 4 * count * 2 * 3
    assert limits.work(case._replace(optimizer="sgd"))[1] == 4 * count * 2
    hidden = limits.work(case._replace(hidden=(100, 100)))[0]
    of_one = 2 * 256 * 100 + 3 * 100 * 100 + 3 * 100 * 256
    assert hidden == 2 * 256 * (layers + 2 * of_one)


@pytest.mark.parametrize("device, copies", [("cpu", 1), ("cuda", 20)])
def test_rates_are_those_of_one_product_and_of_all_copies(monkeypatch, device, copies):
    monkeypatch.setattr(limits, "work", lambda case: (100, 30))
    second = bench.Timing.of([[1.0]])
    found = limits.limit(
        TINY._replace(device=device), {limits.PRODUCT: second, limits.COPY: second}
    )
    assert found.bytes_per_second == 30 * copies
    assert found.flop_per_second == 2 * {"cpu": 512, "cuda": 4096}[device] ** 3


def test_a_limit_is_the_larger_bound():
    by_arithmetic = limits.Limit(1e6, 1e3, 1e9, 1e9)
    assert by_arithmetic.seconds == by_arithmetic.arithmetic == 1e-3
    assert "1000 us, by arithmetic: 1 MFLOP at 1 GFLOP/s" in str(by_arithmetic)
    assert "by memory" in str(limits.Limit(1e3, 1e6, 1e9, 1e9))


def test_measure_reports():
    names = network.forms_for("cpu", ["cpu", "reference"])
    result = network.measure(TINY, names, with_limit=True, rounds=2)
    assert list(result.seconds) == names and result.limit.flop_per_second > 0
    # In each of two rounds a burst, or two steps where these take long: here on a busy machine.
    assert result.seconds["eager"].count in (2 * 2, 2 * bench.BURST)
    assert result.strongest(forms.BACKPROP).startswith("backprop")
    text = network.report(result)
    for form, ratio in result.ratios.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"{form}  ")]
        assert f"{ratio.value:.2f} [{ratio.low:.2f} {ratio.high:.2f}]" in line
    assert "limit of a decoupled step:" in text and "strongest form of backprop:" in text
    stored = result.stored()
    assert stored["limit"]["seconds"] == result.limit.seconds and "left_out" not in stored


class CompilerError(Exception):
    pass


@pytest.mark.parametrize("kind", [RuntimeError, CompilerError, ArithmeticError])
@pytest.mark.parametrize("form", ["fastdni reference", "compiled", "products"])
def test_a_form_that_fails_is_left_out(monkeypatch, form, kind):
    def fails(*arguments):
        raise kind("there is no compiler\nat all")

    def prepare(name, *given):
        return fails() if name == form else prepared(name, *given)

    prepared = forms.prepare
    monkeypatch.setattr(forms, "prepare", prepare)
    monkeypatch.setattr(network, "products", fails)
    result = network.measure(TINY, ["fastdni", form, "backprop"], rounds=1)
    assert list(result.seconds) == ["fastdni", "backprop"]
    assert result.left_out == {form: "there is no compiler"}
    assert f"{form}: not measured: there is no compiler\n" in network.report(result) + "\n"
    if form == "products":
        return
    with pytest.raises(kind, match="no compiler"):
        network.measure(TINY, [form, "backprop"], rounds=1)
    result = network.measure(TINY, [form, "fastdni", "backprop"], rounds=1)
    assert list(result.ratios) == ["backprop"] and form in result.left_out


def test_the_strongest_baselines_are_compiled_and_graphed_too():
    assert [
        *("eager", "eager fused", "compiled", "graphed", "compiled graphed"),
        *("backprop", "backprop compiled", "backprop graphed", "backprop compiled graphed"),
        "products",
    ] == PLAIN
    quick = network.forms_for("cuda", ["cuda", "reference"], compile=False)
    assert "fastdni cuda graphed" in quick and not any("compiled" in form for form in quick)
    assert not any("graphed" in form for form in network.forms_for("cpu"))


@pytest.mark.parametrize("form", forms.COMPILED)
def test_options_of_the_compiler(monkeypatch, form):
    """Without a wrapper in C++ where a graph's replay calls none."""
    found = []

    def compiled(function, **options):
        found.append(options)
        return function

    monkeypatch.setattr(forms, "compiled", compiled)
    forms.prepare(form, TINY)
    assert found == [{"cpp_wrapper": "graphed" not in form, "max_autotune": False}]


@pytest.mark.parametrize(
    "times, verdict",
    [
        ([2.0, 2.0, 2.0], "fastdni is 2.00 [2.00 2.00] times as fast"),
        ([0.5, 0.5, 0.5], "fastdni takes 2.00 [2.00 2.00] times as long"),
        ([0.5, 1.0, 2.0], "fastdni takes the same time, within the band"),
    ],
)
def test_a_verdict_minds_the_band(times, verdict):
    ours = bench.Timing.of([[1.0]] * 3)
    result = network.Result({}, {"fastdni": ours, "eager": bench.Timing.of([[t] for t in times])})
    assert verdict in network.report(result)


@pytest.mark.parametrize("text", ["", "784", "784-10", "784-0-10", "784--10", "a-b-c", "1.5-2-3"])
def test_parse_net_refuses(text):
    with pytest.raises(ValueError, match="a network is three or more widths"):
        parse_net(text)


def test_parse_synthesizer():
    assert parse_synthesizer("linear") == ()
    assert parse_synthesizer("mlp:1024") == (1024, 1024)
    assert parse_synthesizer("mlp:8x3") == (8, 8, 8)
    for text in ("mlp", "mlp:0", "mlp:8x0", "mlp:-3", "linear:3", "cnn:8"):
        with pytest.raises(ValueError, match="a synthesizer is linear, mlp:WIDTH"):
            parse_synthesizer(text)
