"""Memory per rank, predicted against measured: what `make bench-memory` prints. Exits with 1 where a limit is missed.

python tests/bench/memory.py [small|middle ...]
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from measured_memory import LIMITS, MODELS, Compared, compared, missed

KINDS = ("weights", "gradients", "optimizer", "activations", "kv_cache", "peak")


def main(sizes: list[str]) -> int:
    """Prints a row per run, then the median and the largest error of every kind."""
    print(f"{'MB of a rank, predicted / measured':42}" + "".join(f"{kind:>22}" for kind in KINDS))
    found: list[Compared] = []
    wrong: list[str] = []
    for size in sizes:
        for name in MODELS:
            for phase in ("train", "prefill"):
                for tp in (1, 2):
                    one = compared(name, size, phase, tp)
                    found.append(one)
                    where = f"{size} {name}, {phase}, tp {tp}"
                    print(f"{where:42}" + "".join(f"{_cell(one, kind):>22}" for kind in KINDS), flush=True)
                    wrong += [f"{where}: {text}" for text in missed(one)]
    print()
    for kind in KINDS:
        ratios = [one.ratio(kind) for one in found if one.measured.get(kind)]
        least, most = LIMITS[kind]
        errors = [abs(ratio - 1) for ratio in ratios]
        print(
            f"{kind:12} predicted / measured: {min(ratios):.3f} to {max(ratios):.3f} (limits {least:g} to {most:g}),"
            f" median error {statistics.median(errors):.1%}"
        )
    print("\n".join(wrong))
    return 1 if wrong else 0


def _cell(one: Compared, kind: str) -> str:
    if not one.measured.get(kind):
        return ""
    return f"{one.predicted[kind] / 1e6:.3f} / {one.measured[kind] / 1e6:.3f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["small", "middle"]))
