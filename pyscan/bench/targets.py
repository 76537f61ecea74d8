"""What has to be reached: ratios inside one run, on a machine with AVX2 and VPCLMULQDQ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pyscan.bench.calls import CALL, WATCH_TABLES
from pyscan.bench.document import Goal, Ratio
from pyscan.bench.measure import Measured
from pyscan.bench.shapes import CALLS, FIRST, SCATTERED

_KEYED: Final = ("nh4aes", "gf128aes")
_LEECHCORE: Final = ("leechcore-file+sha256", "leechcore-qemu+sha256")


@dataclass(frozen=True, slots=True)
class RatioGoal:
    """The best of `ours` must be `least` times as fast as the best of `others`."""

    name: str
    ours: tuple[str, ...]
    others: tuple[str, ...]
    least: float
    threads: int = 1
    shape: str = FIRST
    percent: bool = False

    def judge(self, measured: Measured) -> Goal:
        """Hold it against what was measured."""
        found = {(each.contender, each.against): each for each in self._mine(measured.ratios)}
        wanted = self._text(self.least, ">= ")
        if not found:
            return Goal(self.name, wanted, "not measured", None)
        values = {
            ours: min(each.value.median for key, each in found.items() if key[0] == ours)
            for ours, _ in found
        }
        best = max(values, key=lambda name: values[name])
        got = f"{self._text(values[best])} ({best})"
        return Goal(self.name, wanted, got, values[best] >= self.least)

    def _mine(self, ratios: Sequence[Ratio]) -> list[Ratio]:
        return [
            each
            for each in ratios
            if (each.shape, each.threads) == (self.shape, self.threads)
            and each.contender in self.ours
            and each.against in self.others
        ]

    def _text(self, value: float, sign: str = "") -> str:
        return f"{sign}{100 * value:.1f} %" if self.percent else f"{sign}{value:.2f} x"


@dataclass(frozen=True, slots=True)
class TimeGoal:
    """The best of `ours` must sweep the shape in at most `most_ms`."""

    name: str
    ours: tuple[str, ...]
    most_ms: float
    shape: str
    threads: int = 1

    def judge(self, measured: Measured) -> Goal:
        """Hold it against what was measured."""
        times = {
            each.contender: each
            for each in measured.results
            if (each.shape, each.threads) == (self.shape, self.threads)
            and each.contender in self.ours
        }
        wanted = f"<= {self.most_ms:g} ms"
        if not times:
            return Goal(self.name, wanted, "not measured", None)
        best = min(times.values(), key=lambda each: each.ms.median)
        limit = f", {100 * best.limit.median:.0f} % of the read limit" if best.limit else ""
        got = f"{best.ms.median:.2f} ms ({best.contender}{limit})"
        return Goal(self.name, wanted, got, best.ms.median <= self.most_ms)


@dataclass(frozen=True, slots=True)
class RateGoal:
    """`ours` must do it so many times a second."""

    name: str
    what: str
    ours: str
    least: float

    def judge(self, measured: Measured) -> Goal:
        """Hold it against what was measured."""
        wanted = f">= {self.least:,.0f} /s"
        for each in measured.rates:
            if (each.name, each.contender) == (self.what, self.ours):
                got = each.per_s.median
                return Goal(self.name, wanted, f"{got:,.0f} /s", got >= self.least)
        return Goal(self.name, wanted, "not measured", None)


@dataclass(frozen=True, slots=True)
class CallGoal:
    """A call through cffi must cost at most `most` of what `ours` does in a call of `pages`."""

    name: str
    ours: str
    pages: int
    most: float

    def judge(self, measured: Measured) -> Goal:
        """Hold it against what was measured."""
        wanted = f"<= {100 * self.most:.1f} %"
        work = [
            self.pages * 1e3 / each.pages_per_s
            for each in measured.results
            if (each.shape, each.contender) == (CALLS, self.ours)
        ]
        call = [1e3 / each.per_s.median for each in measured.rates if each.name == CALL]
        if not work or not call:
            return Goal(self.name, wanted, "not measured", None)
        share = call[0] / work[0]
        got = f"{100 * share:.1f} % ({1e6 * call[0]:.0f} ns of {1e3 * work[0]:.1f} us)"
        return Goal(self.name, wanted, got, share <= self.most)


GOALS: Final[tuple[RatioGoal | TimeGoal | RateGoal | CallGoal, ...]] = (
    RatioGoal("keyed sweep / read limit, 1 thread", _KEYED, ("read-limit",), 0.85, percent=True),
    RatioGoal(
        "keyed sweep / read limit, 2 threads", _KEYED, ("read-limit",), 0.95, 2, percent=True
    ),
    RatioGoal("keyed sweep / (leechcorepyc + hashlib), 1 thread", _KEYED, _LEECHCORE, 20),
    RatioGoal("keyed sweep / (mmap + hashlib), 1 thread", _KEYED, ("mmap+sha256",), 12),
    RatioGoal("sha256 / OpenSSL EVP a page in C", ("sha256",), ("openssl-evp-sha256",), 1.8),
    TimeGoal("a sweep of 8,000 scattered pages, 1 thread", _KEYED, 2.0, SCATTERED),
    TimeGoal("a sweep of 8,000 scattered pages, 2 threads", _KEYED, 2.0, SCATTERED, 2),
    RateGoal("compares of a watch list of 8,192 values", WATCH_TABLES, "watch-list", 200_000),
    RatioGoal("numba / C", ("numba-nh4aes",), ("nh4aes",), 0.60, percent=True),
    CallGoal("a call through cffi / 256 pages", "nh4aes", 256, 0.02),
    RatioGoal(
        "calls of 256 pages / one call, with all that Python checks",
        ("nh4aes/256",),
        ("nh4aes",),
        0.98,
        shape=CALLS,
        percent=True,
    ),
)


def judge_goals(measured: Measured) -> list[Goal]:
    """All goals, in the order of the table."""
    return [goal.judge(measured) for goal in GOALS]
