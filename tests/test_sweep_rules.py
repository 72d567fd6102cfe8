"""What plans and the sweep's ops take and refuse, and what torch and a plan's owner may rely on."""

import re

import pytest
import torch
from sweep_problem import CASES as PROBLEMS
from sweep_problem import CONTEXT, Problem, arguments, stages
from torch._subclasses.fake_tensor import FakeTensorMode, UnsupportedOperatorException

from fastdni import _C, ops, use_backend


@pytest.mark.parametrize(
    ("widths", "how", "message"),
    [
        ((7, 9, 5), {"criterion": None}, "stage 1 must have a synthesizer above it"),
        ((7, 9, 5), {"batch": 0}, "at least one stage and one row"),
        ((7, 9, 5), {"separate_input": True}, "a separate input is for complete unlock"),
    ],
)
def test_plans_that_make_no_sense(widths, how, message):
    how = {"batch": 4, "criterion": "mse"} | how
    with pytest.raises(RuntimeError, match=f"sweep: .*{message}"):
        ops.SweepPlan(stages(widths), **how)


def test_plans_of_widths_that_do_not_fit():
    below, top = stages((7, 9, 5))
    cases = {
        "stage 1 must take what the one below gives: 9, got 8": [
            below,
            top._replace(weight=torch.ones(5, 8).double()),
        ],
        "the synthesizer of stage 0 must map its output to its gradient": [
            below._replace(synthesizer=stages((7, 8, 5))[0].synthesizer),
            top,
        ],
        "the input synthesizer of stage 0 must map the network's input": [
            below._replace(input_synthesizer=below.synthesizer),
            top,
        ],
    }
    for message, given in cases.items():
        with pytest.raises(RuntimeError, match=f"sweep: {message}"):
            ops.SweepPlan(given, 4, "mse")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            {"criterion": "mae"},
            'criterion must be one of "none", "cross_entropy", "mse", got "mae"',
        ),
        (
            {"precision": "bf16"},
            'precision must be one of "exact", "tf32", "tf32x3", "bfloat16", got "bf16"',
        ),
        (
            {"activation": "gelu"},
            'activation must be one of "identity", "relu", "tanh", "sigmoid", got "gelu"',
        ),
    ],
)
def test_no_unknown_name_becomes_a_default(how, message):
    below, top = stages((7, 9, 5))
    how = {"criterion": "mse"} | how
    below = below._replace(activation=how.pop("activation", "relu"))
    with use_backend("cpu"), pytest.raises(ValueError, match=re.escape(f"sweep: {message}")):
        ops.SweepPlan([below, top], 4, **how)


def test_a_plan_of_another_dtype():
    how = {"stages": [], "batch": 4, "gpu": None, "criterion": "mse", "input_gradient": False}
    message = 'sweep: dtype must be one of "float32", "float64", got "float16"'
    with pytest.raises(ValueError, match=message):
        _C.SweepPlan(dtype="float16", precision="exact", separate_input=False, runs=True, **how)


@pytest.mark.parametrize("criterion", ["mae", "none"])
def test_a_target_is_checked_for_a_known_criterion(criterion):
    message = f'net.step: criterion must be one of "cross_entropy", "mse", got "{criterion}"'
    with pytest.raises(ValueError, match=message):
        ops.sweep_check_target("net.step", torch.zeros(4, dtype=torch.int64), 4, 5, criterion)


def test_ops_are_registered_as_they_behave():
    one, plan, state, groups, settings = arguments()
    active = [1] * 4
    lists = ([], plan.parameters, plan.statistics)  # no noise
    first = (plan.handle, "test", one.x, one.target, None, *lists)
    names = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.fastdni.sweep_.default,
        (*first, state, groups, settings, active, True),
        test_utils=names,
    )
    ops.sweep_(plan, one.x, one.target, None, state, groups, settings, active, repeatable=True)
    again = (plan.handle, "test", one.x, one.target, None, [], settings)
    repeat = torch.ops.fastdni.sweep_repeat_.default
    torch.library.opcheck(repeat, again, test_utils=("test_schema", "test_autograd_registration"))
    # What it writes no schema says: it is not for those who trace.
    before = [p.clone() for p in plan.parameters]
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(UnsupportedOperatorException):
        repeat(*again)
    assert all(map(torch.equal, before, plan.parameters))
    torch.library.opcheck(
        torch.ops.fastdni.sweep_forward_.default,
        (plan.handle, "test", one.x, one.target, None, None, *lists, active),
        test_utils=names,
    )
    torch.library.opcheck(
        torch.ops.fastdni.sweep_update_.default,
        (plan.handle, "test", None, plan.parameters, state, groups, settings, active),
        test_utils=names,
    )
    torch.library.opcheck(
        torch.ops.fastdni.sweep_check_target.default, ("test", one.target, 6, 5, "cross_entropy")
    )


def test_a_repeated_step_is_the_same_step():
    """On other data; with a parameter whose storage is another one by then."""
    torch.manual_seed(0)
    first, plan, state, groups, settings = arguments()
    torch.manual_seed(0)
    _, twin, its_state, *_ = arguments()
    ops.sweep_(plan, first.x, first.target, None, state, groups, settings, [1] * 4, repeatable=True)
    ops.sweep_(twin, first.x, first.target, None, its_state, groups, settings, [1] * 4)
    plan.parameters[0].data = plan.parameters[0].data.clone()
    x, target = first.x.flip(0), first.target.flip(0)
    found = ops.sweep_repeat_(plan, x, target, None, settings)
    expected = ops.sweep_(twin, x, target, None, its_state, groups, settings, [1] * 4)
    found = (*found, *plan.parameters, *state, *plan.statistics)
    expected = (*expected, *twin.parameters, *its_state, *twin.statistics)
    assert all(map(torch.equal, found, expected))


def test_what_a_repeated_step_refuses():
    one, plan, state, groups, settings = arguments()
    given = (plan, one.x, one.target, None, state, groups, settings, [1] * 4)
    for again in (lambda: None, lambda: ops.sweep_(*given)):
        again()
        with pytest.raises(RuntimeError, match="sweep: plan has no step to repeat"):
            ops.sweep_repeat_(plan, one.x, one.target, None, settings)
        ops.sweep_(*given, repeatable=True)
    before = [t.clone() for t in (*plan.parameters, *state)]
    with pytest.raises(RuntimeError, match=r"sweep: x must be \(B, K\)"):
        ops.sweep_repeat_(plan, one.x[:3], one.target, None, settings)
    plan.parameters[0].data = plan.parameters[0].data[:2]
    with pytest.raises(RuntimeError, match="or its tensors are not such as they were"):
        ops.sweep_repeat_(plan, one.x, one.target, None, settings)
    assert all(map(torch.equal, before[1:], (*plan.parameters[1:], *state)))


def test_autograd_looks_past_the_ops():
    one, plan, state, groups, settings = arguments()
    for parameter in plan.parameters:
        parameter.requires_grad_()
    output, loss, _ = ops.sweep_(plan, one.x, one.target, None, state, groups, settings, [1] * 4)
    assert not output.requires_grad and not loss.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(plan=10**9), "plan must be the handle of a live plan"),
        (lambda a: a.update(groups=[0]), r"groups must hold \d+ numbers, got 1"),
        (lambda a: a["groups"].__setitem__(0, 3), "groups must be below 1, got 3"),
        (lambda a: a["settings"].pop(), "settings must be rows of 7"),
        (lambda a: a["settings"].__setitem__(0, 9.0), "settings must begin with a rule"),
        (lambda a: a["state"].pop(), "state holds too few tensors"),
        (lambda a: a["state"].append(torch.ones(1)), "state holds too many tensors"),
        (lambda a: a["state"].__setitem__(0, torch.ones(2)), "a parameter.s optimizer state"),
        (lambda a: a["state"].__setitem__(2, torch.ones(2)), "an optimizer.s step must be one"),
        (lambda a: a.update(active=[1]), "active must hold 4 values, got 1"),
        (lambda a: a.update(active=[1, 0, 1, 1]), "groups must be -1"),
        (lambda a: a["parameters"].pop(), r"parameters must hold \d+ tensors"),
        (lambda a: a["statistics"].pop(), r"statistics must hold \d+ tensors"),
        (lambda a: a["statistics"].__setitem__(2, torch.ones(())), "a running statistic must be"),
        (lambda a: a.update(x=torch.ones(6, 2)), r"x must be \(B, K\) = \(6, 7\), got \(6, 2\)"),
        (lambda a: a.update(target=None), "target must be given, got None"),
        (lambda a: a.update(context=torch.ones(6, 2)), r"context must be \(B, C\) = \(6, 5\)"),
        (lambda a: a.update(context=torch.ones(6, CONTEXT)), "context must have x's dtype"),
    ],
)  # fmt: skip
def test_raw_ops_refuse_what_does_not_fit(change, message):
    one, plan, state, groups, settings = arguments()
    given = {"plan": plan.handle, "caller": "sweep", "x": one.x, "target": one.target}
    given |= {"context": None, "noise": [], "parameters": list(plan.parameters)}
    given |= {"statistics": list(plan.statistics), "state": state, "groups": groups}
    given |= {"settings": settings, "active": [1] * 4, "repeatable": False}
    before = [t.clone() for t in (*plan.parameters, *plan.statistics, *state)]
    changed = (*plan.parameters, *plan.statistics, *list(state))
    change(given)
    with pytest.raises(RuntimeError, match=f"sweep: {message}"):
        torch.ops.fastdni.sweep_(**given)
    assert all(map(torch.equal, before, changed))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(x=torch.ones(6, 2)), r"x must be \(B, K\) = \(6, 7\), got \(6, 2\)"),
        (lambda a: a.update(x=a["x"].float()), "x must have the parameters' dtype"),
        (lambda a: a.update(target=None), "target must be given, got None"),
        (lambda a: a.update(target=a["target"] + 9), "target must hold labels from 0 to 4"),
        (lambda a: a.update(context=torch.ones(6, 2)), r"context must be \(B, C\) = \(6, 5\)"),
        (lambda a: a.update(groups=[0]), r"groups must hold \d+ numbers, got 1"),
        (lambda a: a.update(active=[1]), "active must hold 4 values, got 1"),
        (lambda a: a["state"].pop(), "state holds too few tensors"),
        (lambda a: a["state"].__setitem__(0, torch.ones(2)), "a parameter.s optimizer state"),
        (lambda a: a["state"].__setitem__(2, torch.ones(2)), "an optimizer.s step must be one"),
    ],
)
def test_every_backend_has_the_same_rules(backend, change, message):
    one, plan, state, groups, settings = arguments(backend)
    given = {"plan": plan, "x": one.x, "target": one.target, "context": None, "state": state}
    given |= {"groups": groups, "settings": settings, "active": [1] * 4, "caller": "net.step"}
    before = [t.clone() for t in plan.parameters]
    change(given)
    with pytest.raises(RuntimeError, match=f"net.step: {message}"):
        ops.sweep_(**given)
    assert all(map(torch.equal, before, plan.parameters))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_update_follows_a_forward_part(backend):
    one, plan, state, groups, settings = arguments(backend)
    with pytest.raises(RuntimeError, match="net.step: plan has no forward pass to go on from"):
        ops.sweep_update_(plan, None, state, groups, settings, [1] * 4, "net.step")
    ops.sweep_forward_(plan, one.x, one.target, None, [1] * 4, "net.step")
    ops.sweep_update_(plan, None, state, groups, settings, [1] * 4, "net.step")


def test_plans_of_rules_alone_run_nothing():
    one, plan, state, groups, settings = arguments("reference")
    lists = (plan.parameters, plan.statistics)
    with pytest.raises(RuntimeError, match="plan must be one that runs steps, got rules alone"):
        torch.ops.fastdni.sweep_forward_(
            plan.handle, "sweep", one.x, one.target, None, None, [], *lists, [1] * 4
        )
    running = arguments()[1]
    with pytest.raises(RuntimeError, match="plan must be one of rules alone, got one that runs"):
        torch.ops.fastdni.sweep_check_forward(
            running.handle, "sweep", one.x, one.target, None, None, [], *lists, [1] * 4
        )


@pytest.mark.parametrize("name", PROBLEMS)
def test_parameters_have_one_order(name):
    """That of the plan, which the kernels go by, is that of Python's lists."""
    torch.manual_seed(0)
    given, _ = PROBLEMS[name]
    plan = ops.SweepPlan(stages(**given), 4, "cross_entropy")
    numbered = 0

    def has(number: int, tensor: torch.Tensor | None, tensors=plan.parameters) -> None:
        nonlocal numbered
        numbered += number >= 0
        assert tensor is None if number < 0 else tensors[number] is tensor

    def check(numbers: dict, synthesizer, above: int) -> None:
        if synthesizer is None:
            assert numbers["weights"] == []
            return
        biases = synthesizer.biases or [None] * len(synthesizer.weights)
        for kind, tensors in (("weights", synthesizer.weights), ("biases", biases)):
            for number, tensor in zip(numbers[kind], tensors, strict=True):
                has(number, tensor)
                assert number < 0 or plan.parameter_stages[number] == above
        has(numbers["context_weight"], synthesizer.context_weight)
        has(numbers["context_bias"], synthesizer.context_bias)

    for index, (stage, numbers) in enumerate(zip(plan.stages, plan.numbers, strict=True)):
        norm = stage.norm
        has(numbers["weight"], stage.weight)
        has(numbers["bias"], stage.bias)
        has(numbers["norm_weight"], None if norm is None else norm.weight)
        has(numbers["norm_bias"], None if norm is None else norm.bias)
        assert plan.parameter_stages[numbers["weight"]] == index
        check(numbers["synthesizer"], stage.synthesizer, index + 1)
        check(numbers["input_synthesizer"], stage.input_synthesizer, index + 1)
    assert numbered == len(plan.parameters)
    for stage, numbers in zip(plan.stages, plan.numbers, strict=True):
        has(numbers["running"], next(iter(stage.statistics()), None), plan.statistics)


# On a GPU the recurrence is torch's own.
CPUS_ALONE = {
    "recurrence_fwd",
    "recurrence_bwd",
    "update_",
    "window_fwd",
    "window_update_",
    "window_step_",
}


@pytest.mark.skipif(
    _C.build_info()["cuda_architectures"] in (None, "host"), reason="built without CUDA kernels"
)
def test_every_op_takes_a_gpus_tensors():
    """As far as that can be seen without one: it is registered for them. Triton's ops, too, ask raw
    ones whether their arguments fit."""
    has = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastdni::")]
    assert "fastdni::sweep_" in names
    lacking = {name.removeprefix("fastdni::") for name in names if not has(name, "CUDA")}
    assert lacking == CPUS_ALONE


def test_a_plan_says_how_a_gpu_divides_the_step():
    """On a GPU (or in the host's build of its kernels); the CPU has no launches."""
    if _C.build_info()["cuda_architectures"] != "host":
        assert ops.SweepPlan(stages(), 4, "cross_entropy").launches == ""
        return
    small = ops.SweepPlan(stages(), 4, "cross_entropy").launches
    large = ops.SweepPlan(stages((300, 600, 5)), 4000, "cross_entropy").launches
    # Of three stages: while one is synthesized the next one goes forward, and while that one is
    # the first synthesizer is regressed.
    assert small == "a cluster of 2 blocks for 16 rows, 5 phases"
    launches = "a launch for each of 4 phases, layers up to 600 wide"
    assert large == f"{launches}; 4 products, from {3 << 26} multiply-adds on, by torch's library"
    long = ops.SweepPlan(stages(), 20_000, "cross_entropy").launches
    assert long.endswith("multiply-adds on or over 16384 rows, by torch's library")


def test_a_plan_lives_as_long_as_its_object():
    one, plan, state, groups, settings = arguments()
    assert plan.workspace_bytes > 0
    lists = [[], plan.parameters, plan.statistics, state, groups]
    handle = plan.handle
    del plan
    with pytest.raises(RuntimeError, match="live plan"):
        torch.ops.fastdni.sweep_(
            handle, "sweep", one.x, one.target, None, *lists, settings, [1] * 4, False
        )


@pytest.mark.parametrize("settings", ["adam", "nesterov"])
def test_in_a_graph_step_counts_must_be_on_the_gpu(monkeypatch, settings):
    """In the build for tests, whose launches can be taken for captured ones."""
    if _C.build_info()["cuda_architectures"] != "host":
        pytest.skip("another build: test_cuda_on_host.py runs it")
    problem = Problem(stages(), settings=settings)
    expected = problem.run("reference", steps=3)
    monkeypatch.setenv("SIMT_CAPTURED", "1")
    if settings == "adam":
        with pytest.raises(RuntimeError, match="in a CUDA graph .* make it with capturable=True"):
            problem.run("cpu")
        return
    for a, b in zip(problem.run("cpu", steps=3), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
