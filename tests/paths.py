"""Which path a step takes, and what it costs in calls of Python functions: never in time."""

import os
import sys

import torch
from plain_step import assert_same, plain_step

import fastdni
from fastdni.ops import sweep

PACKAGE = os.path.dirname(fastdni.__file__)


def assert_fused(net, x, optimizer, criterion="cross_entropy") -> None:
    """Every stage is fused and updated so, with nothing to say against it."""
    rows = fastdni.explain(net, x, optimizer, criterion).rows
    refused = [row["reason"] for row in rows if not row["fused"] or row["reason"]]
    assert not refused, refused


def take(net, optimizer, twin, own, given, tolerance=1e-9) -> None:
    """A step of a network and of the oracle, and whether both are the same."""
    results = net.step(optimizer=optimizer, **given)
    for a, b in zip(results, plain_step(twin, optimizer=own, **given), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert_same(net, twin, tolerance)


def calls_of(function) -> int:
    """How many Python functions run within a call."""
    count = 0

    def seen(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(seen)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def depth_of(function) -> int:
    """How many of the package's own Python functions are nested around the op that a call runs."""
    deepest = 0

    def seen(frame, event, argument):
        nonlocal deepest
        if event == "c_call" and argument is sweep._repeat:
            depth = 0
            while frame is not None:
                depth += frame.f_code.co_filename.startswith(PACKAGE)
                frame = frame.f_back
            deepest = max(deepest, depth)

    sys.setprofile(seen)
    try:
        function()
    finally:
        sys.setprofile(None)
    return deepest
