"""How far the analytic default is from what `turnout tune` found: reads the record of its searches.

    python3 -m turnout tune --shape qwen3-30b,... --mode lora,full --record RECORD
    PYTHONPATH=src python3 benchmarks/defaults.py RECORD

ratio = time of the analytic default / time of the winner, per problem; asked is their geometric
mean. See benchmarks/README.md. Needs no GPU.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from turnout.bench.musts import Must, show
from turnout.tuning import journal
from turnout.tuning.show import console, kernels

MOST = 1.1
WORST = 8  # rows that are shown


def searched(path: Path) -> list[tuple[float, dict[str, Any]]]:
    """(ratio, event) of every problem, its last search alone; the largest ratio first.

    Raises:
        ValueError: no report, or one without searches.
    """
    last = {}
    for event in journal.read(path).of("kernel"):
        search = event.get("search")
        if search and search["default_s"]:
            key = (event["kernel"], event["device"], str(event["key"]))
            last[key] = (search["default_s"] / search["winner_s"], event)
    if not last:
        raise ValueError(f"{path} has no searches; expected a record of `turnout tune`")
    return sorted(last.values(), key=lambda found: -found[0])


def musts(ratios: Sequence[float]) -> list[Must]:
    """The demand on the geometric mean."""
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return [Must("analytic default / tuned", mean, MOST, False, f"{len(ratios)} problems")]


def main(args: Sequence[str] | None = None) -> int:
    """Prints the worst problems and the demand; 1 if it is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("record", type=Path, help="what `turnout tune --record` wrote")
    try:
        found = searched(parser.parse_args(args).record)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console().print(kernels([event for _, event in found[:WORST]]))
    demands = musts([ratio for ratio, _ in found])
    print(show(demands))
    return int(not all(demand.passed for demand in demands))


if __name__ == "__main__":
    sys.exit(main())
