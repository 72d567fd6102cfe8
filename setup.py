"""Hands over to CMake: sources, flags and architectures are in CMakeLists.txt, nowhere else."""

import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        torch = importlib.util.find_spec("torch")
        if torch is None:
            sys.exit("fastdni: torch is needed to build; install it first (pip install torch)")
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # One build folder per environment: an isolated build's compiler paths do not outlive it.
        environment = f"{sys.prefix} {torch.origin} {self.distribution.get_version()}"
        tag = hashlib.sha256(environment.encode()).hexdigest()[:8]
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-{tag}"
        settings = {
            "Python_EXECUTABLE": sys.executable,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": output,
            "FASTDNI_VERSION": self.distribution.get_version(),
            # Named each time, so that a value taken back returns to its default.
            "FASTDNI_CUDA": os.environ.get("FASTDNI_CUDA") or "AUTO",
            "FASTDNI_CUDA_ARCHS": os.environ.get("FASTDNI_CUDA_ARCHS") or "80 90a 100",
        }
        definitions = [f"-D{name}={value}" for name, value in settings.items()]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        subprocess.run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *definitions], check=True)
        subprocess.run(["cmake", "--build", build, "-j", jobs], check=True)


setup(
    ext_modules=[Extension("fastdni._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
