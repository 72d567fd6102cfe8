"""`python -m fastdni info | bench`: what is installed and built; what the kernels buy."""

import importlib.util
import platform
import sys

import torch

import fastdni
from fastdni import _C
from fastdni.bench import command as bench


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
    parser = bench.Parser(prog="python -m fastdni", description="Tools of fastdni.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("info", help="versions, backends, what the extension was built for")
    of_bench = commands.add_parser("bench", help="what the fused kernels buy on one's own sizes")
    bench.add_arguments(of_bench)
    options = parser.parse_args(arguments)
    if options.command == "bench":
        bench.check(of_bench, options)
        return bench.run(options)
    lines = info()
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
