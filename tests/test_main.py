"""`python -m fastdni`."""

import subprocess
import sys

import torch

import fastdni


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "fastdni", *arguments], capture_output=True, text=True
    )


def test_info_names_versions_backends_and_reasons():
    result = run("info")
    assert result.returncode == 0, result.stderr
    shown = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    shown = {name: value.strip() for name, value in shown.items()}
    assert shown["fastdni"] == fastdni.__version__
    assert shown["torch"] == torch.__version__
    for name, status in fastdni.backends().items():
        assert shown[f"backend {name}"] == status
    architectures = fastdni._C.build_info()["cuda_architectures"]
    assert (architectures or "no CUDA kernels") in shown["built with"]


def test_a_missing_or_unknown_command_is_one_line_and_exit_code_2():
    for arguments in ((), ("launch",)):
        result = run(*arguments)
        assert result.returncode == 2
        assert "COMMAND" in result.stderr and "Traceback" not in result.stderr


def test_the_import_brings_no_compiler():
    """torch's and Triton's take seconds."""
    code = "import sys, fastdni; sys.exit(bool({'torch._dynamo', 'triton'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
