"""A profile of a step in every form: a trace to look at, and how many calls a step is made of."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

_STEPS = 3


def trace(steps: Mapping[str, Callable[[], object]], device: str, path: Path) -> list[list]:
    """Writes a Chrome trace of a few steps of each, every one in a range of its name.

    Args:
        steps: form -> its step.
        device: "cpu" or "cuda".
        path: of the JSON, which Chrome (its page "tracing") and Perfetto show.

    Returns:
        Rows of: form, operators that a step sends through torch's dispatcher, kernels that it
        launches on the device ("-" on the CPU).
    """
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device == "cuda" else []
    for step in steps.values():
        step()
    rows = []
    with profile(activities=activities) as profiler:
        for name, step in steps.items():
            for _ in range(_STEPS):
                with record_function(name):
                    step()
    profiler.export_chrome_trace(str(path))
    events = profiler.events()
    for name in steps:
        spans = [e.time_range for e in events if e.name == name and e.device_type == DeviceType.CPU]

        def within(event, spans=spans) -> bool:
            return any(s.start <= event.time_range.start <= s.end for s in spans)

        inside = [e for e in events if "::" in e.name and e.device_type == DeviceType.CPU]
        operators = sum(map(within, (e for e in inside if " " not in e.name)))
        launches = [e for e in events if e.name.startswith(("cudaLaunch", "cuLaunch", "cudaGraph"))]
        kernels = sum(map(within, launches)) / _STEPS if device == "cuda" else None
        rows.append([name, f"{operators / _STEPS:g}", "-" if kernels is None else f"{kernels:g}"])
    return rows
