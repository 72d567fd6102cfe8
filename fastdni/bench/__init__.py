"""Measuring: callables timed in turn, a training step in every form, limits, tables, pictures.

`python -m fastdni bench` is made of this, and so are the suites under benchmarks/ in the source.
"""

from fastdni.bench.report import cores, hardware, header, table
from fastdni.bench.timing import BURST, Ratio, Timing, interleave

__all__ = ["BURST", "Ratio", "Timing", "cores", "hardware", "header", "interleave", "table"]
