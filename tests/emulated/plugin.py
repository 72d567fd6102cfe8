"""As a pytest plugin (`-p emulated.plugin`): the emulated GPU, in the process that `environment()`
is for."""

import simt.extension  # noqa: F401  takes the place of fastdni's own

from emulated import ops, triton_driver
from fastdni import agreement

ops.install()
triton_driver.install()
# Products of 1e9 multiply-adds would take minutes.
agreement._LARGE_OF_CUDA = agreement._LARGE_OF_TRITON = ()
