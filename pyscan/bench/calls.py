"""What is counted by the call: a watch list held against its values, and calling itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pyscan.bench import peers
from pyscan.bench.document import Rate, Spread
from pyscan.bench.measure import Plan, Progress
from pyscan.bench.memory import Backing, Memory, filled
from pyscan.bench.peers import Unavailable
from pyscan.bench.runner import Entry, alternate
from pyscan.digest import WatchList
from pyscan.errors import InternalError

_VALUES: Final = 8192
#: Where the watched values lie, as runs of so many side by side: kernels keep most of them
#: in tables (system calls, interrupts), some alone (hooks).
_TABLE_VALUES: Final = 128
_SPREAD_BYTES: Final = 4 << 20
WATCH_TABLES: Final = "watch list of 8,192 values in 64 tables"
CALL: Final = "calls of a C function that does nothing"
WATCH_SINGLES: Final = "watch list of 8,192 values at random places"


def measure_calls(plan: Plan, progress: Progress) -> list[Rate]:
    """Compares of a whole watch list a second: the native core's, and numpy's gather."""
    found: list[Rate] = []
    with filled(_SPREAD_BYTES, Backing.SHARED, False, plan.random) as memory:
        for name, run_values in ((WATCH_TABLES, _TABLE_VALUES), (WATCH_SINGLES, 1)):
            progress(name)
            found += _watch_list(name, _places(plan, run_values), memory, plan.rounds)
    return found + _call(plan.rounds)


def _call(rounds: int) -> list[Rate]:
    """The way from Python to C and back: five arguments, API mode, the GIL released."""
    try:
        module = peers.memory()
    except Unavailable:
        return []  # the shapes say it already
    compare, nothing = module.lib.peer_compare, module.ffi.NULL

    def call() -> int:
        return int(compare(nothing, nothing, 0, 1, nothing))

    return [
        Rate(CALL, each.name, _a_second(each.spread()))
        for each in alternate([Entry("cffi", _counted(call))], rounds)
    ]


def _places(plan: Plan, run_values: int) -> NDArray[np.int64]:
    """Indices of _VALUES words in runs of `run_values`, ascending."""
    runs = _SPREAD_BYTES // 8 // run_values
    chosen = np.sort(plan.random.choice(runs, size=_VALUES // run_values, replace=False))
    return (chosen[:, None] * run_values + np.arange(run_values)).ravel()


def _watch_list(name: str, places: NDArray[np.int64], memory: Memory, rounds: int) -> list[Rate]:
    words = np.frombuffer(memory.data, dtype="<u8")
    offsets, expected = (8 * places).astype(np.uint64), words[places]
    data = memory.data.toreadonly()
    watched = WatchList(offsets, expected)

    def native() -> int:
        return watched.compare(data).mismatched

    def gather() -> int:
        return int(np.count_nonzero(words[places] != expected))

    contenders = {"watch-list": native, "numpy-gather": gather}
    for contender, compare in contenders.items():
        _check_work(contender, compare, words, int(places[_VALUES // 2]))
    entries = [Entry(contender, _counted(compare)) for contender, compare in contenders.items()]
    return [Rate(name, each.name, _a_second(each.spread())) for each in alternate(entries, rounds)]


def _check_work(
    name: str,
    compare: Callable[[], int],
    words: np.ndarray[tuple[int], np.dtype[np.uint64]],
    at: int,
) -> None:
    before = compare()
    words[at] ^= np.uint64(1)
    found = compare()
    words[at] ^= np.uint64(1)
    if (before, found) != (0, 1):
        raise InternalError(f"contender {name} does not find a changed value")


def _counted(compare: Callable[[], int]) -> Callable[[], int]:
    def run() -> int:
        compare()
        return 1

    return run


def _a_second(per_ns: Spread) -> Spread:
    return Spread(median=per_ns.median * 1e9, min=per_ns.min * 1e9, max=per_ns.max * 1e9)
