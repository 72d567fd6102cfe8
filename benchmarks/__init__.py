"""Benchmarks: `python -m benchmarks.<name>`. The timing loop is :mod:`fastdni.bench`."""
