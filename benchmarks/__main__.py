"""All suites of the CPU, in under ten minutes: `python -m benchmarks [--quick] [--output FOLDER]`.

Results, tables and pictures go to benchmarks/results/cpu/<date>/.
"""

import datetime
import sys
from pathlib import Path

from benchmarks import suite, suite_dropin, suite_network, suite_scaling
from fastdni.bench.command import Parser

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    parser = Parser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, nothing compiled")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu" / today, metavar="FOLDER")
    options = parser.parse_args(arguments)
    for one in (suite_network.SUITE, suite_dropin.SUITE, suite_scaling.SUITE):
        print(f"== {one.name}", flush=True)
        how = ["--output", str(options.output)] + ["--quick"] * options.quick
        suite.main(one, how)
        print()
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
