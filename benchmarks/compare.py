"""What changed between two folders of results.

    python -m benchmarks.compare benchmarks/results/cpu/2026-11-20 benchmarks/results/cpu/2026-11-25

For every case that both hold: the ratios to fastdni, A, B, and B over A, each ratio with its noise
band. A change is marked where the bands do not meet: ratios of one run do not depend on the
machine's mood, so such a change is one of the code, or of the machine's kind.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from fastdni.bench import header, table
from fastdni.bench.command import Parser


def load(folder: Path) -> dict[str, dict]:
    """Suite -> what it stored."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {name: stored for name, stored in found.items() if "results" in stored}


def _ratios(stored: dict) -> dict[tuple, dict]:
    """(case, form) -> ratio."""
    return {
        (", ".join(map(str, result["case"].values())), form): ratio
        for result in stored["results"]
        for form, ratio in result["ratios"].items()
        if isinstance(ratio, dict)
    }


def changes(a: dict, b: dict) -> Iterator[tuple[tuple, dict, dict, bool]]:
    """(case, form), ratio in A, ratio in B, whether their bands are apart; of all in both."""
    before, after = _ratios(a), _ratios(b)
    for key in before:
        if key in after:
            x, y = before[key], after[key]
            yield key, x, y, x["high"] < y["low"] or y["high"] < x["low"]


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("a", type=Path, metavar="A", help="a folder of results")
    parser.add_argument("b", type=Path, metavar="B", help="another one")
    parser.add_argument("--all", action="store_true", help="also what did not change")
    options = parser.parse_args(arguments)
    for folder in (options.a, options.b):
        if not folder.is_dir() or not load(folder):
            parser.error(f"{folder} holds no results")
    a, b = load(options.a), load(options.b)
    common = [name for name in a if name in b]
    if not common:
        parser.error(f"{options.a} and {options.b} have no suite in common")
    for name in common:
        print(f"== {name}\nA: {header(a[name]['hardware'])}\nB: {header(b[name]['hardware'])}\n")
        found = list(changes(a[name], b[name]))
        rows = [
            [*key, *(f"{r['value']:.2f} [{r['low']:.2f} {r['high']:.2f}]" for r in (x, y)),
             f"{y['value'] / x['value']:.2f}", "*" if apart else ""]
            for key, x, y, apart in found
            if apart or options.all
        ]  # fmt: skip
        marked = sum(apart for *_, apart in found)
        print(f"{marked} of {len(found)} ratios changed by more than their noise bands")
        if rows:
            print(table(rows, ["case", "time of / fastdni", "A", "B", "B / A", ""]))
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
