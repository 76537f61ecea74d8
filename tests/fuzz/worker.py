"""One target, fuzzed in a process of its own: `worker.py TARGET ENGINE [option...]`.

Engine `atheris` takes libFuzzer's options. Engine `random` mutates the seeds without looking
at coverage: `--runs=N --seconds=N --seed=N --findings=DIR CORPUS...`, 0 for no limit.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import time
import traceback
from hashlib import sha256
from pathlib import Path

LENGTH_MAX = 1 << 16
#: Targets that compare whole memories.
MACHINES = frozenset({"attach", "validate"})


def main(arguments: list[str]) -> int:
    """Fuzz until a limit or a finding; returns the exit status."""
    name, engine, *options = arguments
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests), str(tests / "unit")]
    if engine == "atheris":
        import atheris

        hooks = atheris.instrument_imports(include=["pyscan"])
        # atheris (3.0) keeps the result of every comparison that it looks into for ever,
        # megabytes each where arrays are compared.
        hooks._trace_dataflow = name not in MACHINES
        with hooks:
            from targets import TARGETS
        atheris.Setup([sys.argv[0], *options], TARGETS[name].run)
        atheris.Fuzz()  # ends the process
    from targets import TARGETS

    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--findings", type=Path)
    parser.add_argument("corpus", nargs="+", type=Path)
    chosen = parser.parse_args(options)
    source = random.Random(chosen.seed)
    seeds = [file.read_bytes() for folder in chosen.corpus for file in sorted(folder.iterdir())]
    ends = time.monotonic() + chosen.seconds if chosen.seconds else float("inf")
    done = status = 0
    while (not chosen.runs or done < chosen.runs) and time.monotonic() < ends:
        data = seeds[done] if done < len(seeds) else mutated(source, seeds)
        done += 1
        try:
            TARGETS[name].run(data)
        except Exception:
            traceback.print_exc()
            (chosen.findings / f"crash-{sha256(data).hexdigest()[:16]}").write_bytes(data)
            status = 1
            break
    print(f"stat::number_of_executed_units: {done}", file=sys.stderr)
    return status


def mutated(source: random.Random, seeds: list[bytes]) -> bytes:
    """A seed after a few edits: bits, bytes, interesting numbers, copies, cuts."""
    data = bytearray(source.choice(seeds))
    for _ in range(1 << source.randrange(5)):
        at = source.randrange(len(data) + 1)
        match source.randrange(6):
            case 0:
                with contextlib.suppress(IndexError):
                    data[at] ^= 1 << source.randrange(8)
            case 1:
                data[at : at + 1] = source.randbytes(1)
            case 2:
                width = source.choice((1, 2, 4, 8))
                number = source.choice((0, 1, 1 << (8 * width - 1), (1 << (8 * width)) - 1))
                data[at : at + width] = number.to_bytes(width, "little")
            case 3:
                start = source.randrange(len(data) + 1)
                data[at:at] = data[start : start + source.randrange(64)]
            case 4:
                del data[at : at + source.randrange(64)]
            case 5 if source.randrange(8) == 0:
                del data[at:]
    return bytes(data[:LENGTH_MAX])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
