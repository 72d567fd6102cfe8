"""For all tests: the option --all, devices, seeds, threads, and memory that is never clean."""

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterable

import pytest

# Read when torch loads OpenMP. Threads that wait by spinning make the small sizes of these tests
# many times slower when other programs want the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Read by torch's CUDA library: without it products are not deterministic, and torch says so.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch  # noqa: E402

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter; read when Triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU"),
    ),
]

_take_all = False


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="every combination, not a sample of them")


def pytest_configure(config):
    global _take_all
    _take_all = config.getoption("--all")
    _fill_malloc()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Long tests first, so that no process waits for another's at the end; last the modules that
    need BUILDS, which are made meanwhile."""
    items.sort(
        key=lambda item: hasattr(item.module, "BUILDS") - getattr(item.module, "LONG", False)
    )


def pytest_collection_finish(session):
    """In a run of the whole suite, compiles what later tests need while earlier ones run."""
    first = getattr(session.config, "workerinput", {}).get("workerid", "gw0") == "gw0"
    modules = dict.fromkeys(item.module for item in session.items)
    builds = [module.BUILDS for module in modules if hasattr(module, "BUILDS")]
    if len(modules) - len(builds) > 20 and first:
        needed = [build for of_module in builds for build in of_module]
        threading.Thread(target=_build_all, args=(needed,), daemon=True).start()


def _build_all(needed: Iterable[Callable]) -> None:
    for build in needed:
        with contextlib.suppress(Exception):  # whoever needs it will see it fail
            build()


def _fill_malloc() -> None:
    """Has glibc fill what it hands out and what it takes back.

    The extension's fresh tensors come from the allocator directly, so that torch's own filling
    (below) does not reach them.
    """
    m_perturb, m_mmap_threshold = -6, -3  # malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(m_mmap_threshold, 32 << 20)  # the greatest allowed: mapped memory would come as zeros
    # Taken back, memory reads 3.0 (float32, bfloat16) or 32.5 (float64); handed out, -1.5 or -0.12:
    # values that a sum or a product cannot hide, as it would hide those near zero.
    mallopt(m_perturb, 0x40)


def values(case) -> tuple:
    """The kinds of a case: each value in each place of a tuple."""
    return tuple(enumerate(map(str, case))) if isinstance(case, tuple) else ()


def sample(cases: Iterable, every: int = 7, kinds: Callable[..., Iterable] = values) -> list:
    """A fixed sample of a table of cases for `parametrize`, or all of it under --all.

    The sample is each n-th case, and of every kind that none of those has the first one: no dtype,
    backend, device, feature or message of the table is left out, only combinations are.

    Args:
        cases: the table, best with its axes' product in the order of `itertools.product`, and
            `every` without a common factor with the axes' sizes.
        every: n.
        kinds: of a case what a sample must not lack.
    """
    cases = list(cases)
    if _take_all:
        return cases
    met = {kind for case in cases[::every] for kind in kinds(case)}
    chosen = []
    for number, case in enumerate(cases):
        lacking = set(kinds(case)) - met
        if number % every == 0 or lacking:
            chosen.append(case)
            met |= lacking
    return chosen


def takes_all() -> bool:
    """Whether this is a run with --all."""
    return _take_all


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def reproducible():
    """The same random numbers and two threads in every test, and `torch.empty` full of NaN."""
    modes = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.get_num_threads(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    enabled, warn_only, fill, threads = modes
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.set_num_threads(threads)
    differentiated = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert differentiated, "the test left autograd off for those that follow"
