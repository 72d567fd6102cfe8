"""What the suites have in common: their options, and what they write.

A suite names its cases, measures one of them with the harness of `python -m fastdni bench`, and
makes a table and a picture of all.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fastdni.bench import hardware, header
from fastdni.bench.command import Parser, positive
from fastdni.bench.network import Result
from fastdni.bench.progress import Line


class Suite(NamedTuple):
    """A suite.

    Attributes:
        name: of its files.
        doc: what it is, for `--help`.
        cases: name -> function of (whether anything is compiled, limits of `interleave`) that
            returns the results of a case.
        seconds: of timing a case, and of a quick look at it.
        tables: of results, (whether in Markdown) -> text.
        draw: (results, hardware, path) writes the picture.
        extra: () -> what else to store, and to print.
    """

    name: str
    doc: str
    cases: Mapping[str, Callable[..., list[Result]]]
    seconds: tuple[float, float]
    tables: Callable[[list[Result], bool], str]
    draw: Callable[[list[Result], Mapping, Path], None]
    extra: Callable[[], Mapping[str, object]] = dict


def main(suite: Suite, arguments: Sequence[str] | None = None) -> int:
    """Runs a suite from its command line."""
    parser = Parser(prog=f"python -m benchmarks.suite_{suite.name}", description=suite.doc)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, nothing compiled")
    parser.add_argument("--rounds", type=positive, help="timed rounds a case, not a time limit")
    parser.add_argument("--cases", nargs="+", choices=list(suite.cases), metavar="NAME")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for results and pictures")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    options = parser.parse_args(arguments)

    if options.output is not None:
        try:
            options.output.mkdir(parents=True, exist_ok=True)
        except OSError as reason:
            parser.error(f"cannot write to {options.output}: {reason.strerror}")
    threads = torch.get_num_threads()
    limits = {"seconds": suite.seconds[options.quick]}
    if options.rounds is not None:
        limits = {"rounds": options.rounds}
    results = []
    try:
        with Line() as line:
            for name in options.cases or suite.cases:
                line.show(name)
                results += suite.cases[name](compile=not options.quick, **limits)
        info = hardware()
        del info["threads"]  # the cases say theirs
        extra = suite.extra()
    finally:
        torch.set_num_threads(threads)
    print(f"{header(info)}\n\n{suite.tables(results, options.markdown)}")
    for name, value in extra.items():
        print(f"\n{name}: {value}")
    if options.output is not None:
        write(suite, results, info, extra, options.output / suite.name)
    return 0


def write(suite: Suite, results: list[Result], info: Mapping, extra: Mapping, path: Path) -> None:
    """The results as `path`.json, .md and .png."""
    stored = {"hardware": info, "results": [r.stored() for r in results], **extra}
    path.with_suffix(".json").write_text(json.dumps(stored, indent=1) + "\n")
    text = f"{suite.doc.strip()}\n\n{header(info)}\n\n{suite.tables(results, True)}\n"
    path.with_suffix(".md").write_text(text)
    suite.draw(results, info, path.with_suffix(".png"))
