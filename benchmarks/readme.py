"""Fills the README's tables in from result files, or checks that they are those.

    python -m benchmarks.readme [--check]

A table stands between `<!-- KIND: FILE -->` and `<!-- end -->`, FILE being a result of a suite.
Needs nothing but Python, so that it runs where nothing is built.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"(<!-- (\w+): (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def _table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _source(stored: dict, file: str) -> str:
    of = stored["hardware"]
    machine = f"{of.get('gpu', of['cpu'])}, {of['isa']}, {of['cores']} cores"
    commit = f"commit {of['commit']}" if "commit" in of else "unknown commit"
    made = f"torch {of['torch']}, {of['date'][:10]}, {commit}"
    return f"\n{machine}; {made}; `{file}`.\n"


def _network(case: str) -> str:
    """A case in words, without what all of them have in common."""
    common = ("adam", "fp32", "cpu")
    return ", ".join(p for p in case.split(", ") if p not in common and "synthesizers" not in p)


def network(stored: dict) -> str:
    """`net.step` at the suite's sizes."""
    rows = []
    for result in stored["results"]:
        ratios = result["ratios"]
        seconds = result["seconds"]["fastdni"]["median"]
        shown = ("eager", "eager fused", "compiled", "backprop compiled", "products")
        cells = [f"{ratios[form]['value']:.2f}" if form in ratios else "-" for form in shown]
        share = f"{100 * result['limit']['seconds'] / seconds:.0f} %"
        rows.append([_network(result["case"]["case"]), f"{1e6 * seconds:.0f}", *cells, share])
    headers = ["network", "us", "eager", "fused Adam", "compiled", "backprop compiled"]
    return _table(rows, [*headers, "products", "of the limit"])


def dropin(stored: dict) -> str:
    """The drop-in modules, with 1 and 2 threads in one line."""
    cells: dict[tuple, list[str]] = {}
    for result in stored["results"]:
        case, ratios = result["case"], result["ratios"]
        key = (case["scheme"], case["net"], str(case["batch"]))
        shown = ("eager",) if case["optimizer"] == "Adam" else ("easy", "backprop")
        for form in shown:
            cells.setdefault((*key, form), []).append(f"{ratios[form]['value']:.2f}")
    keys = list(dict.fromkeys(key[:3] for key in cells))
    rows = [
        [*key, *(" / ".join(cells[*key, form]) for form in ("eager", "easy", "backprop"))]
        for key in keys
    ]
    return _table(rows, ["scheme", "network", "batch", "eager", "easy", "backprop"])


KINDS = {"network": network, "dropin": dropin}


def fill(text: str, root: Path = ROOT) -> str:
    """The text with every table as its result file has it."""

    def block(match: re.Match) -> str:
        begin, kind, file, _, end = match.groups()
        stored = json.loads((root / file).read_text())
        return begin + "\n" + KINDS[kind](stored) + _source(stored, file) + end

    return _BLOCK.sub(block, text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="change nothing, fail if it would")
    options = parser.parse_args(arguments)
    readme = ROOT / "README.md"
    text = readme.read_text()
    filled = fill(text)
    if filled == text:
        return 0
    if options.check:
        print("README.md: tables differ from their result files: python -m benchmarks.readme")
        return 1
    readme.write_text(filled)
    return 0


if __name__ == "__main__":
    sys.exit(main())
