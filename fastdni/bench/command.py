"""`python -m fastdni bench`: what the fused kernels buy on one's own sizes."""

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import torch

import fastdni as dni
from fastdni.backend import BACKENDS
from fastdni.bench import dropin, forms, network, recurrent
from fastdni.bench.cases import (
    ACTIVATIONS,
    OPTIMIZERS,
    PRECISIONS,
    Case,
    parse_net,
    parse_synthesizer,
)
from fastdni.bench.network import Result, report
from fastdni.bench.report import hardware, header, microseconds, table

DESCRIPTION = """\
Times a training step of a decoupled network on fastdni's backends, against the same step in plain
PyTorch (eager, with a fused optimizer, compiled, in a CUDA graph) and against backpropagation, all
in one run, in turn. The forms are compared with each other before anything is timed.

Times are medians [20th to 80th percentile]; ratios are medians [5th to 95th] over rounds, in which
all forms ran side by side: above 1 where fastdni is the faster one. The limit is the larger of the
step's arithmetic and its memory traffic, at rates measured in the same run.
"""
EPILOG = """\
examples:
  python -m fastdni bench --net 784-256-256-10 --batch 256 --plot speedup.png
  python -m fastdni bench --net 784-256-256-10 --sweep width=64..1024 --quick --plot cost.png
  python -m fastdni bench --drop-in --peer dni
"""
_MOST_THREADS = 1024
_BUSY = 0.6  # load for each core from which on measurements are not to be trusted
# Of `--sweep NAME=FROM..TO`: the least value, and the case of each value.
SWEEPS: dict[str, tuple[int, Callable[[Case, int], Case]]] = {
    "width": (
        1,
        lambda case, n: case._replace(
            widths=(case.widths[0], *[n] * (len(case.widths) - 2), case.widths[-1])
        ),
    ),
    "layers": (
        2,
        lambda case, n: case._replace(
            widths=(case.widths[0], *[case.widths[1]] * (n - 1), case.widths[-1])
        ),
    ),
    "batch": (1, lambda case, n: case._replace(batch=n)),
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _of(convert: Callable) -> Callable:
    """The conversion as argparse wants it: what a ValueError says is the message."""

    def converted(text: str):
        try:
            return convert(text)
        except ValueError as reason:
            raise argparse.ArgumentTypeError(str(reason)) from None

    return converted


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def parse_sweep(text: str) -> tuple[str, list[int]]:
    """`width=64..1024` as the name and 64, 128, ..., 1024.

    Raises:
        ValueError: it is something else.
    """
    name, _, numbers = text.partition("=")
    first, dots, last = numbers.partition("..")
    known = name in SWEEPS and dots and first.isdecimal() and last.isdecimal()
    if not known or not SWEEPS[name][0] <= int(first) <= int(last):
        raise ValueError(
            "a sweep is width=FROM..TO, layers=FROM..TO (at least 2) or batch=FROM..TO, "
            f"got {text!r}"
        )
    values = [int(first)]
    while 2 * values[-1] < int(last):
        values.append(2 * values[-1])
    return name, values + [int(last)] * (values[-1] != int(last))


def parse_peer(name: str) -> ModuleType:
    """An importable module with dni-pytorch's names.

    Raises:
        ValueError: it cannot be imported, or lacks a name.
    """
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as reason:
        first = str(reason).partition("\n")[0]
        raise ValueError(f"cannot import {name!r}: {first}") from None
    missing = [needed for needed in dropin.NAMES if not callable(getattr(module, needed, None))]
    if missing:
        raise ValueError(f"{name!r} has no {', '.join(missing)}: it is no dni-pytorch")
    return module


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `python -m fastdni bench`."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    of_net = parser.add_argument_group("the network")
    of_net.add_argument(
        "--net", type=_of(parse_net), default=(784, 256, 256, 10), metavar="784-256-256-10",
        help="widths of the input and of every layer",
    )  # fmt: skip
    of_net.add_argument("--batch", type=positive, default=256, help="rows (default: 256)")
    of_net.add_argument("--batch-norm", action="store_true", help="BatchNorm1d in every layer")
    of_net.add_argument("--activation", choices=ACTIVATIONS, default="relu", help="default: relu")
    of_net.add_argument(
        "--synthesizer", type=_of(parse_synthesizer), default=(), metavar="linear|mlp:1024",
        help="linear (default), or MLPs: mlp:1024 has two hidden layers, mlp:1024x1 one",
    )  # fmt: skip
    of_net.add_argument("--no-context", action="store_true", help="synthesizers without labels")
    of_net.add_argument("--optimizer", choices=OPTIMIZERS, default="adam", help="default: adam")
    of_net.add_argument("--precision", choices=PRECISIONS, default="fp32", help="default: fp32")

    how = parser.add_argument_group("how it is measured")
    how.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    how.add_argument(
        "--backends", nargs="+", metavar="NAME", help="of fastdni (default: all that are available)"
    )
    how.add_argument("--threads", type=positive, help="default: torch's own")
    how.add_argument("--seconds", type=float, default=5.0, help="of timing a case (default: 5)")
    how.add_argument("--rounds", type=positive, help="instead: rounds of timing a case")
    how.add_argument("--quick", action="store_true", help="nothing is compiled: starts at once")

    what = parser.add_argument_group("what else is measured")
    what.add_argument(
        "--sweep", type=_of(parse_sweep), metavar="width=64..4096",
        help="a size doubled from one value to another: width, layers or batch",
    )  # fmt: skip
    what.add_argument(
        "--drop-in", action="store_true", help="the drop-in modules, in a network of these widths"
    )
    what.add_argument(
        "--rnn", action="store_true", help="windows of an LSTM instead, a small and a large one"
    )
    what.add_argument(
        "--peer", type=_of(parse_peer), action="append", default=[], metavar="MODULE",
        help="with --drop-in: also the modules of any importable copy of dni-pytorch",
    )  # fmt: skip

    out = parser.add_argument_group("what is written")
    out.add_argument("--plot", type=Path, metavar="PNG", help="a picture")
    out.add_argument("--json", type=Path, metavar="FILE", help="the results")
    out.add_argument("--trace", type=Path, metavar="FILE", help="a profile, for Chrome or Perfetto")
    out.add_argument("--markdown", action="store_true", help="print Markdown tables")


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuses what does not go together, or not on this machine."""
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA GPU")
    if options.precision == "tf32" and options.device == "cpu":
        parser.error("--precision tf32 is one of CUDA GPUs; the CPU has fp32 and bf16")
    swept = options.sweep[1][0] if options.sweep and options.sweep[0] == "batch" else options.batch
    if options.batch_norm and min(swept, options.batch) < 2:
        parser.error("--batch must be at least 2 with --batch-norm")
    if options.threads is not None and options.threads > _MOST_THREADS:
        parser.error(f"--threads must be at most {_MOST_THREADS}, got {options.threads}")
    if not options.seconds > 0:
        parser.error(f"--seconds must be positive, got {options.seconds:g}")
    available, serving = dni.backends(), network.backends_for(options.device)
    for name in options.backends or []:
        if name not in BACKENDS:
            parser.error(f"--backends: there is no {name!r}, only {', '.join(BACKENDS)}")
        if available[name] != "available":
            parser.error(f"--backends: {name} is not available: {available[name]}")
        if name not in serving:
            parser.error(f"--backends: {name} does not serve --device {options.device}")
    if options.rnn:
        for name in ("sweep", "trace", "backends", "drop_in", "plot", "batch_norm", "no_context"):
            if getattr(options, name):
                parser.error(f"--rnn goes without --{name.replace('_', '-')}")
        for name in ("net", "batch", "device", "precision", "optimizer", "activation"):
            if getattr(options, name) != parser.get_default(name):
                parser.error(f"--rnn goes without --{name}")
    if options.peer and not options.drop_in:
        parser.error("--peer goes with --drop-in")
    if options.drop_in:
        for name in ("sweep", "trace", "backends", "batch_norm", "no_context", "synthesizer"):
            if getattr(options, name):
                parser.error(f"--drop-in goes without --{name.replace('_', '-')}")
        for name in ("device", "precision", "optimizer", "activation"):
            if getattr(options, name) != parser.get_default(name):
                parser.error(f"--drop-in goes without --{name}")
        if options.batch < 2:
            parser.error("--batch must be at least 2 with --drop-in: its network has BatchNorm")
    if options.plot is not None:
        try:
            canvas = importlib.import_module("matplotlib.backend_bases").FigureCanvasBase
        except ImportError:
            parser.error("--plot needs matplotlib, which is not installed")
        kinds = canvas.get_supported_filetypes()
        if options.plot.suffix.removeprefix(".") not in kinds:
            parser.error(f"--plot must be a picture such as speedup.png, got {options.plot}")
    for path in (options.plot, options.json, options.trace):
        if path is not None:
            try:
                path.open("ab").close()
            except OSError as reason:
                parser.error(f"cannot write {path}: {reason.strerror}")


def run(options: argparse.Namespace) -> int:
    """Measures, prints, writes."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = options.precision == "tf32"
    limits = {"seconds": options.seconds} if options.rounds is None else {"rounds": options.rounds}
    info = hardware()
    print(header(info), flush=True)
    if float(info["load"]) > _BUSY * info["cores"]:
        print("others are at work on this machine: times and ratios may be off")
    print(flush=True)
    if options.rnn:
        return _windows(options, limits, info)
    try:
        results = _drop_in(options, limits) if options.drop_in else _network(options, limits)
    except ArithmeticError as reason:
        print(f"fastdni bench: not the same step, so nothing was timed: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nfastdni bench: interrupted", file=sys.stderr)
        return 130
    except RuntimeError as reason:  # no memory, say
        first = str(reason).strip().partition("\n")[0]
        print(f"fastdni bench: cannot be measured here: {first}", file=sys.stderr)
        return 1
    if not results:
        return 1
    if options.json is not None:
        stored = {"hardware": info, "results": [result.stored() for result in results]}
        options.json.write_text(json.dumps(stored, indent=1) + "\n")
    if options.plot is not None:
        from fastdni.bench import plots

        if options.sweep is None:
            plots.bars(results, info, options.plot)
        else:
            name, values = options.sweep
            points = list(zip(values, results, strict=False))
            plots.lines({name: points}, str(case_of(options)), info, options.plot)
    if options.trace is not None:
        _trace(case_of(options), list(results[0].seconds), options)
    for path in (options.json, options.plot, options.trace):
        if path is not None:
            print(f"wrote {path}")
    swept = 1 if options.sweep is None or options.drop_in else len(options.sweep[1])
    return 0 if len(results) >= swept else 1


def _windows(options: argparse.Namespace, limits: dict, info: dict) -> int:
    try:
        stored = recurrent.run(options.markdown, limits)
    except ArithmeticError as reason:
        print(f"fastdni bench: not the same step, so nothing was timed: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nfastdni bench: interrupted", file=sys.stderr)
        return 130
    if options.json is not None:
        options.json.write_text(json.dumps({"hardware": info, "results": stored}, indent=1) + "\n")
        print(f"wrote {options.json}")
    return 0


def case_of(options: argparse.Namespace) -> Case:
    """The network and its training, as the options say."""
    return Case(
        options.net,
        options.batch,
        options.optimizer,
        options.activation,
        options.batch_norm,
        not options.no_context,
        options.synthesizer,
        options.precision,
        options.device,
    )


def _network(options: argparse.Namespace, limits: dict) -> list[Result]:
    case = case_of(options)
    backends = options.backends or network.backends_for(options.device)
    names = network.forms_for(options.device, backends, compile=not options.quick)
    if options.sweep is None:
        print(case, flush=True)
        found = network.measure(case, names, with_limit=True, progress=True, **limits)
        print(report(found, options.markdown))
        return [found]
    name, values = options.sweep
    results = []
    for value in values:
        point = SWEEPS[name][1](case, value)
        print(f"{name} {value}: {point}", flush=True)
        try:
            found = network.measure(
                point, names, with_limit=True, progress=True,
                labels={name: value, "case": str(point)}, **limits,
            )  # fmt: skip
        except ArithmeticError as reason:
            print(f"fastdni bench: not the same step, so it ends here: {reason}", file=sys.stderr)
            break
        results.append(found)
    if results:
        print("\n" + sweep_table(name, values[: len(results)], results, options.markdown))
    return results


def sweep_table(name: str, values: list[int], results: list[Result], markdown: bool) -> str:
    """Microseconds against a size, and the share of the limit that fastdni reaches."""
    ours, *others = max((result.seconds for result in results), key=len)
    rows = []
    for value, result in zip(values, results, strict=True):
        timings = [result.seconds.get(form) for form in (ours, *others)]
        times = [microseconds(timing.median) if timing else "-" for timing in timings]
        best = result.ratios.get(result.strongest(forms.DECOUPLED))
        share = result.limit.seconds / next(iter(result.seconds.values())).median
        quotient = f"{best.value:.2f}" if best else "-"
        rows.append([value, *times, quotient, f"{100 * share:.0f} %"])
    best = f"strongest DNI / {ours}"
    return table(rows, [name, f"{ours}, us", *others, best, "limit / time"], markdown)


def _trace(case: Case, names: list[str], options: argparse.Namespace) -> None:
    from fastdni.bench.trace import trace

    steps = {n: forms.prepare(n, case).step for n in names if n != "products"}
    rows = trace(steps, case.device, options.trace)
    headers = ["form", "operators a step", "kernels launched a step"]
    print("\n" + table(rows, headers, options.markdown))


def _drop_in(options: argparse.Namespace, limits: dict) -> list[Result]:
    results = []
    for scheme in dropin.SCHEMES:
        for found in dropin.measure(
            scheme, options.net, options.batch, tuple(options.peer), True, **limits
        ):
            print(", ".join(map(str, found.case.values())))
            print(report(found, options.markdown) + "\n", flush=True)
            results.append(found)
    return results
