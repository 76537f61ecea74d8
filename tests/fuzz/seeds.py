"""Write the seed corpora, tests/fuzz/corpus/NAME/: `python tests/fuzz/seeds.py`."""

from __future__ import annotations

import sys
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"


def write_all() -> int:
    """Write every seed of every target; returns how many bytes they have."""
    from targets import TARGETS

    total = 0
    for name, target in TARGETS.items():
        directory = CORPUS / name
        directory.mkdir(parents=True, exist_ok=True)
        for seed, data in target.seeds().items():
            (directory / seed).write_bytes(data)
            total += len(data)
    return total


if __name__ == "__main__":
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests), str(tests / "unit")]
    print(f"{write_all()} bytes")
