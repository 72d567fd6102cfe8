"""`python -m fastdni info`: versions, backends, what the extension was built for."""

import argparse
import importlib.util
import platform
import sys

import torch

import fastdni
from fastdni import _C


def info() -> list[tuple[str, str]]:
    """Lines of `python -m fastdni info`: (name, value)."""
    build = _C.build_info()
    cuda = "no CUDA kernels"
    if build["cuda"] is not None:
        cuda = f"CUDA {build['cuda']}, architectures {build['cuda_architectures']}"
    triton = importlib.util.find_spec("triton")
    lines = [
        ("fastdni", fastdni.__version__),
        ("torch", torch.__version__),
        ("Python", platform.python_version()),
        ("Triton", __import__("triton").__version__ if triton else "not installed"),
        ("built with", f"{build['compiler']}, torch {build['torch_headers']} headers, {cuda}"),
        ("CPU kernels", f"{_C.cpu_capability()} (FASTDNI_ISA chooses another)"),
        ("CPU products", "MKL and oneDNN, by size" if _C.onednn_enabled() else "MKL"),
        ("threads", str(torch.get_num_threads())),
    ]
    backends = fastdni.backends().items()
    return lines + [(f"backend {name}", status) for name, status in backends]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastdni", description="Tools of fastdni.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("info", help="versions, backends, what the extension was built for")
    parser.parse_args(arguments)
    lines = info()
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
