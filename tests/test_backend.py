"""The choice of a backend, and that ops keep to it."""

import importlib.util
import threading
import types

import pytest
import torch

import fastdni
from fastdni import backend, ops, reference
from fastdni.ops import SynthesizerParameters

NAMES = ["cpu", "cuda", "triton", "reference"]


@pytest.fixture(autouse=True)
def restored():
    yield
    fastdni.set_backend("auto")


class ReferenceCalled(Exception):
    pass


@pytest.fixture
def no_reference(monkeypatch):
    """Every function of the reference raises."""
    for name in ("cuda", "triton"):  # the first look at a GPU is one at the reference, too
        if torch.cuda.is_available() and fastdni.backends()[name] == "available":
            backend.why_unserved(torch.device("cuda"), name)

    def refuse(*arguments, **options):
        raise ReferenceCalled

    for name in ("regression_loss", "synthesizer_fwd", "synthesizer_bwd"):
        monkeypatch.setattr(reference, name, refuse)


def regression_loss(x):
    fastdni.regression_loss(x, x)


def synthesizer_fwd(x):
    ops.synthesizer_fwd(x, None, SynthesizerParameters([x], [x[0]]))


def synthesizer_bwd(x):
    ops.synthesizer_bwd(x, x, [], x, None, [x], True)


OPS = pytest.mark.parametrize("op", [regression_loss, synthesizer_fwd, synthesizer_bwd])


def served_by(op=regression_loss, dtype=torch.float32) -> str:
    """Who serves an op on a CPU tensor; to be called under `no_reference`."""
    try:
        op(torch.ones(3, 3, dtype=dtype))
    except ReferenceCalled:
        return "reference"
    return "kernel"


# ---- which backends there are ----


def test_backends_says_what_there_is_and_why_not():
    found = fastdni.backends()
    assert list(found) == NAMES
    assert found["cpu"] == found["reference"] == "available"
    gpu = torch.cuda.is_available() and fastdni._C.build_info()["cuda"] is not None
    assert (found["cuda"] == "available") == gpu
    there = importlib.util.find_spec("triton") is not None  # in the interpreter, or on the GPU
    assert (found["triton"] == "available") == there


@pytest.mark.parametrize(
    ("cuda", "gpu", "reason"),
    [
        (None, True, "built without CUDA kernels (no nvcc was found, or FASTDNI_CUDA=0)"),
        ("13.0", False, "torch sees no CUDA GPU"),
    ],
)
def test_why_there_is_no_cuda(cuda, gpu, reason, monkeypatch):
    monkeypatch.setattr(fastdni._C, "build_info", lambda: {"cuda": cuda})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert fastdni.backends()["cuda"] == reason


@pytest.mark.parametrize(
    "capability, driver, built, reason",
    [
        ((7, 5), 13000, "80", "the kernels are for GPUs from sm_80 on, this is Some GPU (sm_75)"),
        ((9, 0), 12040, "80 90a", "the driver serves CUDA 12.4, the kernels are built with 13.0"),
        ((8, 0), 13000, "90a 100", "the kernels are built for 90a, 100; this is Some GPU (sm_80)"),
        ((9, 0), 13010, "90a", "available"),
        ((12, 0), 13000, "80 90a 100", "available"),
    ],
)
def test_why_a_gpu_is_not_served(capability, driver, built, reason, monkeypatch):
    info = {"cuda": "13.0", "cuda_architectures": built}
    monkeypatch.setattr(fastdni._C, "build_info", lambda: info)
    monkeypatch.setattr(fastdni._C, "cuda_versions", lambda: (driver, 13000), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert fastdni.backends()["cuda"] == reason


def test_kernel_devices_are_those_registered():
    assert "cpu" in backend.kernel_devices("regression_loss_fwd")
    assert ("cuda" in backend.kernel_devices("regression_loss_fwd")) == (
        fastdni._C.build_info()["cuda"] is not None
    )
    assert "cpu" in backend.kernel_devices("synthesizer_fwd")


# ---- who serves an op ----


@OPS
@pytest.mark.parametrize("dtype", backend.KERNEL_DTYPES)
@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_kernels_serve_the_cpu(name, dtype, op, no_reference):
    with fastdni.use_backend(name):
        assert served_by(op, dtype) == "kernel"


@OPS
def test_the_reference_serves_when_asked(op, no_reference):
    with fastdni.use_backend("reference"):
        assert served_by(op) == "reference"


@OPS
def test_the_reference_serves_other_dtypes(op, no_reference):
    assert served_by(op, torch.float16) == "reference"


@OPS
def test_a_fixed_backend_does_not_fall_back(op):
    message = (
        "fastdni: backend 'cpu' has no kernel for this op on a torch.float16 tensor on cpu; "
        r'set_backend\("auto"\) falls back to the reference'
    )
    with fastdni.use_backend("cpu"), pytest.raises(RuntimeError, match=message):
        op(torch.ones(3, 3, dtype=torch.float16))


def test_a_fixed_backend_serves_no_other_device():
    x = torch.ones(3, device="meta")
    message = "backend 'cpu' has no kernel for this op on a torch.float32 tensor on meta"
    with fastdni.use_backend("cpu"), pytest.raises(RuntimeError, match=message):
        fastdni.regression_loss(x, x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")
def test_kernels_serve_the_gpu(no_reference):
    x = torch.ones(3, device="cuda")
    for name in ("auto", "cuda"):
        with fastdni.use_backend(name):
            fastdni.regression_loss(x, x)


# ---- whether `auto` takes a GPU's kernels ----


@pytest.fixture
def met(monkeypatch):
    """A GPU, number 3, that is met for the first time; the list of times that it was looked at."""
    looks = []

    def look(device, name):
        looks.append((device, name))
        return None

    monkeypatch.setattr(backend, "_unserved", {})
    monkeypatch.setattr(backend, "_unfit", lambda device: None)
    monkeypatch.setattr(backend, "_disagreement", look)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return looks


GPU = torch.device("cuda", 3)


def test_a_gpus_kernels_are_looked_at_once(met):
    assert backend.why_unserved(GPU) is None and backend.why_unserved(GPU) is None
    assert met == [(GPU, "cuda")]


@pytest.mark.parametrize("name", ["_disagreement", "_unfit"])
def test_a_gpu_that_is_not_served_is_one_warning(met, monkeypatch, name):
    """Too old, say, or computing something else."""
    monkeypatch.setattr(backend, name, lambda *given: "the reason")
    with pytest.warns(UserWarning, match="fastdni: cuda does not serve cuda:3: the reason"):
        assert backend.why_unserved(GPU) == "the reason"
    assert backend.why_unserved(GPU) == "the reason"
    assert met == []


def test_kernels_that_fail_do_not_serve(met, monkeypatch):
    def fail(device, name):
        raise RuntimeError("CUDA error: an illegal instruction\nand much more")

    monkeypatch.setattr(backend, "_disagreement", fail)
    with pytest.warns(UserWarning, match="its kernels fail: CUDA error: an illegal instruction$"):
        backend.why_unserved(GPU)


@pytest.mark.parametrize("width, precision, expected, dtype", [
    (4096, "bfloat16", "triton", torch.float32), (2048, "tf32", "triton", torch.float32),
    (256, "bfloat16", "cuda", torch.float32), (4096, "exact", "cuda", torch.float32),
    (4096, "tf32", "cuda", torch.float64),
])  # fmt: skip
def test_auto_takes_triton_for_large_products(met, monkeypatch, width, precision, expected, dtype):
    monkeypatch.setattr(backend, "server", lambda tensor, devices: "cuda")
    monkeypatch.setattr(backend, "why_unserved", lambda device, name: None)
    monkeypatch.setattr(backend, "_is_known", lambda device, name: True)
    monkeypatch.setattr(backend.triton, "unavailable", lambda: None)
    weight = torch.empty(width, width, device="meta", dtype=dtype)
    stages = [reference.SweepStage(weight, None, None, "relu")]
    assert ops.sweep_backend(stages, 256, precision) == expected
    with fastdni.use_backend("reference"):  # fixed, not "auto": nothing is chosen
        assert ops.sweep_backend(stages, 256, precision) == "cuda"


def test_what_was_not_compared_before_a_capture_is_not_taken_in_it(met, monkeypatch):
    """Triton, that is, where the CUDA backend serves."""
    monkeypatch.setattr(backend.triton, "unavailable", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not backend.takes_triton(GPU, 4 * 10**9, "bfloat16")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert met == [] and backend.takes_triton(GPU, 4 * 10**9, "bfloat16")


def test_nothing_is_compared_while_a_graph_is_captured(met, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="take this step once before its capture"):
        backend.why_unserved(GPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert backend.why_unserved(GPU) is None and met == [(GPU, "cuda")]


# ---- set_backend, use_backend ----


def test_set_backend_holds_in_every_thread(no_reference):
    fastdni.set_backend("reference")
    assert served_by() == "reference"
    assert in_thread(served_by) == "reference"
    fastdni.set_backend("auto")
    assert served_by() == "kernel"


def test_use_backend_holds_in_its_thread_alone(no_reference):
    with fastdni.use_backend("reference"):
        assert served_by() == "reference"
        assert in_thread(served_by) == "kernel"
    assert served_by() == "kernel"


def test_use_backend_nests_and_goes_before_set_backend(no_reference):
    fastdni.set_backend("reference")
    with fastdni.use_backend("cpu"):
        assert served_by() == "kernel"
        with fastdni.use_backend("reference"):
            assert served_by() == "reference"
        assert served_by() == "kernel"
        fastdni.set_backend("auto")
        assert served_by() == "kernel"
        with fastdni.use_backend("auto"):
            assert served_by() == "kernel"
    fastdni.set_backend("reference")
    assert served_by() == "reference"


def test_use_backend_is_over_after_an_exception(no_reference):
    with pytest.raises(KeyError), fastdni.use_backend("reference"):
        raise KeyError
    assert served_by() == "kernel"


@pytest.mark.parametrize("choose", [fastdni.set_backend, lambda name: use(name)])
def test_an_unknown_backend_is_refused(choose, no_reference):
    message = "fastdni: backend must be one of auto, cpu, cuda, triton, reference, got 'tpu'"
    with pytest.raises(ValueError, match=message):
        choose("tpu")
    assert served_by() == "kernel"


@pytest.mark.parametrize("choose", [fastdni.set_backend, lambda name: use(name)])
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_an_absent_backend_is_refused_with_the_reason(name, choose, no_reference):
    reason = fastdni.backends()[name]
    if reason == "available":
        pytest.skip(f"{name} is available")
    with pytest.raises(RuntimeError) as raised:
        choose(name)
    assert str(raised.value) == f"fastdni: backend '{name}' is not available: {reason}"
    assert served_by() == "kernel"


def use(name):
    with fastdni.use_backend(name):
        pass


def in_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.parametrize("asked, torchs, expected", [
    ("torch", "none", "exact"), ("torch", "ieee", "exact"), ("torch", "tf32", "tf32"),
    ("tf32x3", "none", "tf32x3"), ("tf32x3", "tf32", "tf32x3"),
])  # fmt: skip
def test_products_on_a_gpu_are_as_torchs_settings_say(monkeypatch, asked, torchs, expected):
    settings = types.SimpleNamespace(fp32_precision=torchs)
    monkeypatch.setattr(torch.backends.cuda, "matmul", settings)
    fastdni.set_fp32_precision(asked)
    try:
        assert backend.precision(torch.device("cuda"), None) == expected
        assert backend.precision(torch.device("cuda"), torch.bfloat16) == "bfloat16"
        assert backend.precision(torch.device("cpu"), None) == "exact"
    finally:
        fastdni.set_fp32_precision("torch")


def test_a_precision_that_there_is_not():
    with pytest.raises(ValueError, match='must be "torch" or "tf32x3", got \'high\''):
        fastdni.set_fp32_precision("high")
