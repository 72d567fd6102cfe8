"""What the synthesizer's ops refuse, and how they say so."""

import re

import pytest
import torch
from synthesizer_problem import CONTEXT, PARTS, forward, problem

import fastdni
from fastdni import ops
from fastdni.ops import SynthesizerParameters

RAW = torch.ops.fastdni


def changed(**parts):
    """The forward op's arguments, (trigger, context, *parameters), with other parts."""
    p = problem()
    arguments = {"trigger": p.trigger, "context": p.context, **p.parameters._asdict()}
    return list((arguments | parts).values())


W0, W1 = torch.ones(6, 5), torch.ones(3, 6)
B0, B1 = torch.ones(6), torch.ones(3)
WRONG_FORWARD = {
    "no weights": (dict(weights=[]), "weights must hold at least one matrix, got none"),
    "too few biases": (
        dict(biases=[B0]),
        "biases must be empty or one per weight (2), got 1",
    ),
    "0-d trigger": (
        dict(trigger=torch.ones(())),
        "trigger must be (..., K), got a 0-d tensor",
    ),
    "trigger's width": (
        dict(trigger=torch.ones(4, 7)),
        "trigger must be (..., 5) to meet the first weight (6, 5), got (4, 7)",
    ),
    "weight's dtype": (
        dict(weights=[W0, W1.double()]),
        "weights[1] must have trigger's dtype torch.float32, got torch.float64",
    ),
    "1-d weight": (dict(weights=[B0, W1]), "weights[0] must be (N, K), got (6,)"),
    "second weight's width": (
        dict(weights=[W0, torch.ones(3, 4)]),
        "weights[1] must be (3, 6), got (3, 4)",
    ),
    "bias's dtype": (
        dict(biases=[B0.bfloat16(), B1]),
        "biases[0] must have trigger's dtype torch.float32, got torch.bfloat16",
    ),
    "bias's shape": (
        dict(biases=[B0, B1[:, None]]),
        "biases[1] must be (3,), got (3, 1)",
    ),
    "context alone": (
        dict(context_weight=None, context_bias=None),
        "context and context_weight must be given together",
    ),
    "context's weight alone": (
        dict(context=None),
        "context and context_weight must be given together",
    ),
    "context's bias alone": (
        dict(context=None, context_weight=None),
        "context_bias needs a context_weight",
    ),
    "context's dtype": (
        dict(context=torch.ones(4, CONTEXT, dtype=torch.int64)),
        "context must have trigger's dtype torch.float32, got torch.int64",
    ),
    "context's rows": (
        dict(context=torch.ones(3, CONTEXT)),
        "context must be (4, 10), got (3, 10)",
    ),
    "context's width": (
        dict(context=torch.ones(4, 9)),
        "context must be (4, 10), got (4, 9)",
    ),
    "context weight's dtype": (
        dict(context_weight=torch.ones(6, CONTEXT).double()),
        "context_weight must have trigger's dtype torch.float32, got torch.float64",
    ),
    "context weight's height": (
        dict(context_weight=torch.ones(5, CONTEXT)),
        "context_weight must be (6, C), got (5, 10)",
    ),
    "1-d context weight": (
        dict(context_weight=torch.ones(6)),
        "context_weight must be (6, C), got (6,)",
    ),
    "context bias's dtype": (
        dict(context_bias=B0.half()),
        "context_bias must have trigger's dtype torch.float32, got torch.float16",
    ),
    "context bias's shape": (
        dict(context_bias=torch.ones(5)),
        "context_bias must be (6,), got (5,)",
    ),
}


@pytest.mark.parametrize("case", WRONG_FORWARD)
def test_wrong_forward_arguments(case):
    parts, message = WRONG_FORWARD[case]
    arguments = changed(**parts)
    for op in (RAW.synthesizer_fwd, RAW.synthesizer_check):
        with pytest.raises(RuntimeError, match="synthesizer: " + re.escape(message)):
            op(*arguments)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", [c for c in WRONG_FORWARD if c != "no weights"])
def test_wrong_arguments_of_the_public_forward(case, backend):
    parts, message = WRONG_FORWARD[case]
    trigger, context, *parameters = changed(**parts)
    with fastdni.use_backend(backend), pytest.raises(RuntimeError, match=re.escape(message)):
        ops.synthesizer_fwd(trigger, context, SynthesizerParameters(*parameters))


@pytest.mark.parametrize("part", [x for x in PARTS if x != "target"])
def test_wrong_device(part):
    """Everything else must be where the trigger is."""
    arguments = dict(zip((x for x in PARTS if x != "target"), changed(), strict=True))
    old = arguments[part]
    arguments[part] = [x.to("meta") for x in old] if isinstance(old, list) else old.to("meta")
    trigger, context, *parameters = arguments.values()
    with pytest.raises(RuntimeError, match="synthesizer: .* must be on trigger's device"):
        ops.synthesizer_fwd(trigger, context, SynthesizerParameters(*parameters))


def test_the_raw_ops_name_the_dtypes_they_have():
    p = problem(dtype=torch.float16)
    message = "synthesizer: trigger must be float32, float64 or bfloat16, got torch.float16"
    with pytest.raises(RuntimeError, match=message):
        RAW.synthesizer_fwd(p.trigger, p.context, *p.parameters)


WRONG_BACKWARD = {
    "target's dtype": (
        dict(target=torch.ones(4, 3, dtype=torch.float64)),
        "target must have trigger's dtype torch.float32, got torch.float64",
    ),
    "target's shape": (dict(target=torch.ones(1, 3)), "target must be (4, 3), got (1, 3)"),
    "prediction's dtype": (
        dict(prediction=torch.ones(4, 3, dtype=torch.bfloat16)),
        "prediction must have trigger's dtype torch.float32, got torch.bfloat16",
    ),
    "prediction's shape": (
        dict(prediction=torch.ones(4, 4)),
        "prediction must be (4, 3), got (4, 4)",
    ),
    "hidden's number": (dict(hidden=[]), "hidden must hold 1 activations, got 0"),
    "hidden's shape": (
        dict(hidden=[torch.ones(4, 5)]),
        "hidden[0] must be (4, 6), got (4, 5)",
    ),
    "hidden's dtype": (
        dict(hidden=[torch.ones(4, 6, dtype=torch.float64)]),
        "hidden[0] must have trigger's dtype torch.float32, got torch.float64",
    ),
    "weight's dtype": (
        dict(weights=[W0, W1.double()]),
        "weights[1] must have trigger's dtype torch.float32, got torch.float64",
    ),
    "context's rows": (
        dict(context=torch.ones(3, CONTEXT)),
        "context must be (4, 10), got (3, 10)",
    ),
    "no weights": (dict(weights=[]), "weights must hold at least one matrix, got none"),
    "0-d trigger": (
        dict(trigger=torch.ones(())),
        "trigger must be (..., K), got a 0-d tensor",
    ),
    "reduction": (dict(reduction="sum"), 'reduction must be "batchmean" or "mean", got "sum"'),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", WRONG_BACKWARD)
def test_wrong_backward_arguments(case, backend):
    parts, message = WRONG_BACKWARD[case]
    p = problem()
    prediction, *hidden = forward(ops, p)
    arguments = {
        "target": p.target,
        "prediction": prediction,
        "hidden": hidden,
        "trigger": p.trigger,
        "context": p.context,
        "weights": p.parameters.weights,
        "bias": True,
        "reduction": "mean",
    }
    with fastdni.use_backend(backend), pytest.raises(RuntimeError, match=re.escape(message)):
        ops.synthesizer_bwd(*(arguments | parts).values())


def test_no_unknown_precision_becomes_a_default():
    p = problem()
    message = 'synthesizer: precision must be one of "exact", "tf32", "tf32x3", "bfloat16", got "x"'
    arguments = (p.trigger, p.context, *p.parameters)
    with pytest.raises(ValueError, match=re.escape(message)):
        RAW.synthesizer_fwd(*arguments, "x")
    prediction, hidden = RAW.synthesizer_fwd(*arguments)
    backward = (prediction, prediction, hidden, p.trigger, p.context, p.parameters.weights)
    with pytest.raises(ValueError, match=re.escape(message)):
        RAW.synthesizer_bwd(*backward, True, "batchmean", "x")
