"""Triton's driver on the emulated GPU: a kernel is compiled and launched as for sm_90; then a copy
of it runs in Triton's interpreter, on the memory that it was given."""

import dataclasses
import functools
import importlib
import sys
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from emulated.ops import on_host, send

_LANGUAGE = (tl, tl.core, tl.math, tl.standard)
_TYPES = (tl.core.tensor, tl.core.tensor_descriptor_base, tl.core.dtype)


@functools.cache
def _interpreted(module: str):
    """The module once more, its kernels as the interpreter's, its ops not registered again."""
    package = module.rpartition(".")[0]
    inside = f"{package}."
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(inside)}
    attributes = dict(vars(sys.modules[package]))
    register = torch.library.triton_op
    torch.library.triton_op = lambda name, body, mutates_args=(): body
    triton.knobs.runtime.interpret = True
    try:
        return importlib.import_module(module)
    finally:
        triton.knobs.runtime.interpret = False
        torch.library.triton_op = register
        for name in [name for name in sys.modules if name.startswith(inside)]:
            del sys.modules[name]
        sys.modules.update(kept)
        vars(sys.modules[package]).update(attributes)


@functools.cache
def _of_library(function: JITFunction) -> InterpretedFunction:
    return InterpretedFunction(function.fn)


@contextmanager
def _interpreting():
    """Triton's language with the functions of its own library interpreted; afterwards as it was for
    the compiler, which the interpreter does not see to."""
    before = {place: dict(vars(place)) for place in (*_LANGUAGE, *_TYPES)}
    try:
        for place in _LANGUAGE:
            for name, value in before[place].items():
                if isinstance(value, JITFunction):
                    setattr(place, name, _of_library(value))
        yield
    finally:
        for place, names in before.items():
            for name, value in names.items():
                if vars(place)[name] is not value:
                    setattr(place, name, value)
        for place in _TYPES:
            for name in vars(place).keys() - before[place].keys():
                delattr(place, name)


def _argument(value):
    if isinstance(value, TensorDescriptor):
        return dataclasses.replace(value, base=on_host(value.base))
    return on_host(value) if isinstance(value, torch.Tensor) else value


class _Launcher:
    """In the place of the C code that launches a compiled kernel."""

    def __init__(self, source, metadata):
        self._kernel = getattr(_interpreted(source.fn.module), source.fn.__name__)

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
        def work() -> None:
            with _interpreting():
                self._kernel[(x, y, z)](*map(_argument, arguments))

        send(work, stream)


class _Utils:
    """What is asked of a binary and of the device."""

    def load_binary(self, name, kernel, shared, device):
        module, function, registers, spills, threads = 1, 1, 128, 0, 1024
        return module, function, registers, spills, threads

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        properties = torch.cuda.get_device_properties(device)
        return {
            "max_shared_mem": properties.shared_memory_per_block_optin,
            "multiprocessor_count": properties.multi_processor_count,
        }


class Driver(GPUDriver):
    def __init__(self):
        self.utils, self.launcher_cls = _Utils(), _Launcher
        super().__init__()

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    def get_benchmarker(self):
        raise NotImplementedError


def install() -> None:
    triton.runtime.driver.set_active(Driver())
