"""A property of the whole: whatever the network, and whatever is done between its steps, the steps
are those of local autograd and torch.optim (`plain_step`).

Each case has its seed, and takes 200 examples; --all takes more seeds. A failure is shrunk to a
short example, which is printed, and comes again with the same seed:

    python -m pytest tests/test_property.py -k seed-0
"""

import threading

import pytest

pytest.importorskip("hypothesis", reason="no hypothesis here")

import torch  # noqa: E402
from actions import ACTIONS  # noqa: E402
from conftest import sample  # noqa: E402
from histories import ACTIVATIONS, KINDS, Description, Side  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from network_cases import CONTEXT  # noqa: E402
from plain_step import assert_same, assert_same_state, plain_backward, plain_step  # noqa: E402

SEEDS = sample(range(15), every=15)


@st.composite
def descriptions(draw) -> Description:
    count = draw(st.integers(1, 4))
    double = draw(st.sampled_from([True, True, True, False]))
    # In float32 the gradient of what BatchNorm takes away again is rounding that can be seen.
    norm = st.booleans() if double else st.just(False)
    size = st.integers(1, 6)
    return Description(
        widths=[
            *draw(st.lists(size, min_size=count, max_size=count)),
            draw(st.integers(2, CONTEXT)),
        ],
        norms=draw(st.lists(norm, min_size=count - 1, max_size=count - 1)),
        activations=draw(
            st.lists(st.integers(0, len(ACTIVATIONS) - 1), min_size=count - 1, max_size=count - 1)
        ),
        n_hidden=draw(st.integers(0, 2)),
        context=draw(st.booleans()),
        unlocked=draw(st.booleans()),
        share=draw(st.sampled_from([0.0, 0.0, 0.0, 0.4, 1.0])),
        double=double,
        optimizers=(
            draw(st.integers(0, 3)),
            draw(st.integers(0, len(KINDS) - 1)),
            draw(st.integers(0, len(KINDS) - 1)),
        ),
    )


STEPS = ("step", "step", "step", "masked", "backward", "in a thread")
numbers = st.integers(0, 200)


@st.composite
def histories(draw) -> list[tuple[str, int]]:
    """Steps, and between them a few actions again and again: what makes a step stale is often the
    second time that something is done."""
    actions = draw(st.lists(st.sampled_from(sorted(ACTIONS)), min_size=1, max_size=4))
    names = st.one_of(st.sampled_from(STEPS), st.sampled_from(actions))
    return draw(st.lists(st.tuples(names, numbers), min_size=6, max_size=20))


def arguments(side: Side, number: int) -> dict:
    """Data of a step: the rows, the criterion and a context by a number."""
    generator = torch.Generator().manual_seed(number)
    dtype = next(side.net.parameters()).dtype
    linears = side.linears()
    rows = (4, 4, 4, 7, 12)[number % 5]

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    classes = linears[-1].out_features
    labels = torch.randint(classes, (rows,), generator=generator)
    context = normal(rows, CONTEXT) if number % 3 == 0 else None
    found = {"x": normal(rows, linears[0].in_features), "context": context}
    if number % 4 == 1:
        context = normal(rows, CONTEXT)
        return found | {"target": normal(rows, classes), "criterion": "mse", "context": context}
    if number % 4 == 2:
        labels[0] = -100
    return found | {"target": labels, "criterion": "cross_entropy"}


def in_a_thread(function) -> None:
    raised = []

    def run():
        try:
            function()
        except BaseException as error:  # noqa: BLE001  to be raised below
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def take(side: Side, oracle: Side, name: str, number: int):
    """One step of both; what they return."""
    how, results = arguments(side, number), []
    if name == "masked":
        count = len(side.net.stages)
        how["update_mask"] = [(number >> i) % 2 == 0 for i in range(count)]
    if name == "backward":
        for each, backward in ((side, side.net.backward), (oracle, plain_backward)):
            each.net.zero_grad()
            given_net = () if each is side else (each.net,)
            results.append(backward(*given_net, **how))
            for optimizer in each.optimizers:
                optimizer.step()
            each.net.zero_grad()
        return results

    def step():
        results.append(side.net.step(optimizer=side.given, **how))

    in_a_thread(step) if name == "in a thread" else step()
    results.append(plain_step(oracle.net, optimizer=oracle.given, **how))
    return results


def compare(made: Description, history: list[tuple[str, int]]) -> None:
    """Takes both sides through a history."""
    side, oracle = Side(made), Side(made)
    tolerance = 1e-9 if made.double else 1e-3
    for name, number in [*history, ("step", 0), ("step", 0), ("step", 1)]:
        if name in ACTIONS:
            for each in (side, oracle):
                ACTIONS[name](each, number)
            continue
        for a, b in zip(*take(side, oracle, name, number), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
        assert_same(side.net, oracle.net, tolerance)
        assert all(p.grad is None for p in side.net.parameters())
        for one, two in zip(side.optimizers, oracle.optimizers, strict=True):
            assert_same_state(one, two, tolerance)


@pytest.mark.parametrize("number", SEEDS, ids=lambda number: f"seed-{number}")
def test_steps_are_those_of_autograd_and_torch_optim(number):
    @settings(
        max_examples=200,
        deadline=None,
        database=None,
        print_blob=True,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @seed(number)
    @given(descriptions(), histories())
    def holds(made, history):
        compare(made, history)

    holds()
