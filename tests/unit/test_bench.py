"""The benchmarks' own arithmetic: turns, ratios, lines, goals, documents and pages."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyscan.bench import document as documents
from pyscan.bench import peers
from pyscan.bench.detection import theory
from pyscan.bench.document import Goal, Ratio, Spread
from pyscan.bench.measure import Measured, ratios_of
from pyscan.bench.report import save_markdown
from pyscan.bench.run import BenchOptions, run_bench
from pyscan.bench.runner import Entry, Samples, alternate, ratio, spread
from pyscan.bench.scaling import fit
from pyscan.bench.shapes import BY_NAME, FIRST, SHAPES
from pyscan.bench.targets import judge_goals
from pyscan.errors import FileFormatError, UsageError

STORED = Path(__file__).with_name("bench_small.json")


class Clock:
    """A clock that only contenders move."""

    def __init__(self) -> None:
        self.now = 0
        self.turns: list[str] = []

    def __call__(self) -> int:
        return self.now

    def entry(self, name: str, work: int, costs_ns: int | Callable[[], int]) -> Entry:
        """A contender that does `work` in `costs_ns`."""

        def run() -> int:
            self.turns.append(name)
            self.now += costs_ns() if callable(costs_ns) else costs_ns
            return work

        return Entry(name, run)


def test_contenders_take_turns() -> None:
    clock = Clock()
    entries = [clock.entry(name, 10, 10) for name in "ABC"]
    alternate(entries, 3, pass_min_ns=10, clock=clock)
    assert "".join(clock.turns) == "AABBCC" + "ABC" * 3  # twice each to warm up


def test_rates_are_work_a_nanosecond() -> None:
    clock = Clock()
    fast, slow = alternate(
        [clock.entry("fast", 4096, 100), clock.entry("slow", 4096, 800)], 5, clock=clock
    )
    assert fast.spread() == Spread(40.96, 40.96, 40.96)
    assert ratio(fast, slow).median == pytest.approx(8)
    assert slow.ms_for(4096 * 1000).median == pytest.approx(0.8)


def test_short_passes_are_repeated_and_long_ones_are_not() -> None:
    clock = Clock()
    entries = [clock.entry("short", 1, 10), clock.entry("long", 1, 5000)]
    alternate(entries, 1, pass_min_ns=1000, clock=clock)
    assert clock.turns.count("short") == 2 + 100
    assert clock.turns.count("long") == 2 + 1


def test_preparation_is_not_timed() -> None:
    clock = Clock()

    def evict() -> None:
        clock.now += 1_000_000

    entry = dataclasses.replace(clock.entry("A", 1000, 10), before=evict, once=True)
    (samples,) = alternate([entry], 2, clock=clock)
    assert samples.per_ns == (100.0, 100.0)
    assert len(clock.turns) == 1 + 2


def test_no_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        alternate([], 0)


def test_a_ratio_is_taken_inside_a_round() -> None:
    """A machine that slows down by half meanwhile changes no ratio."""
    ours, others = Samples("ours", (8.0, 8.0, 4.0)), Samples("others", (4.0, 4.0, 2.0))
    assert ratio(ours, others) == Spread(2.0, 2.0, 2.0)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1))
def test_a_spread_holds_its_values(values: list[float]) -> None:
    found = spread(values)
    assert found.min <= found.median <= found.max
    assert {found.min, found.max} <= set(values)


def test_every_pair_has_its_ratio() -> None:
    samples = [Samples("a", (1.0,)), Samples("b", (2.0,)), Samples("c", (4.0,))]
    found = {
        (each.contender, each.against): each.value.median for each in ratios_of("s", 1, samples)
    }
    assert found["a", "b"] == 0.5
    assert found["c", "a"] == 4.0
    assert len(found) == 6


@given(st.floats(0.01, 100), st.floats(0, 10))
def test_a_straight_line_is_found(slope: float, start: float) -> None:
    xs = [1.0, 2.0, 4.0, 8.0, 64.0]
    found = fit(xs, [slope * x + start for x in xs])
    assert found[0] == pytest.approx(slope, rel=1e-6)
    assert found[1] == pytest.approx(start, abs=1e-6 * (slope + start))
    assert found[2] == pytest.approx(1)
    assert found[3] < 1e-6


def test_a_curve_is_not_called_a_line() -> None:
    xs = [1.0, 2.0, 4.0, 8.0]
    *_, r_squared, residual = fit(xs, [x**2 for x in xs])
    assert r_squared < 0.99
    assert residual > 0.1


@given(st.floats(0, 100), st.floats(1, 50), st.floats(0, 1))
def test_what_is_found_was_seen(lives_ms: float, interval_ms: float, share: float) -> None:
    sweep_ms = share * interval_ms
    found, seen = theory(lives_ms, interval_ms, sweep_ms)
    assert 0 <= found <= seen + 1e-9 <= 1 + 1e-9
    if lives_ms >= interval_ms + sweep_ms:
        assert found == pytest.approx(1)


def test_without_a_second_read_found_is_seen() -> None:
    assert theory(5, 20, 0) == (pytest.approx(0.25), pytest.approx(0.25))
    found, _ = theory(10, 20, 4)
    assert found == pytest.approx((10 - 4 / 2) / 20)


def _ratio(contender: str, against: str, value: float, threads: int = 1) -> Ratio:
    return Ratio(FIRST, threads, contender, against, Spread(value, value, value))


def test_goals_take_our_best_against_their_best() -> None:
    measured = Measured(
        ratios=[
            _ratio("nh4aes", "leechcore-file+sha256", 30),
            _ratio("nh4aes", "leechcore-qemu+sha256", 19),
            _ratio("gf128aes", "leechcore-file+sha256", 33),
            _ratio("gf128aes", "leechcore-qemu+sha256", 21),
            _ratio("nh4aes", "read-limit", 0.8),
        ]
    )
    goals = {goal.name: goal for goal in judge_goals(measured)}
    assert goals["keyed sweep / (leechcorepyc + hashlib), 1 thread"] == Goal(
        "keyed sweep / (leechcorepyc + hashlib), 1 thread", ">= 20.00 x", "21.00 x (gf128aes)", True
    )
    limit = goals["keyed sweep / read limit, 1 thread"]
    assert (limit.got, limit.met) == ("80.0 % (nh4aes)", False)
    assert goals["keyed sweep / read limit, 2 threads"].met is None


@pytest.mark.parametrize("reader", peers.READERS)
def test_the_read_limit_reads_every_word(reader: str) -> None:
    """A compiler that left loads out would make a limit that no memory has."""
    words = np.random.default_rng().integers(0, 1 << 64, size=(16, 512), dtype=np.uint64)
    ffi, lib = peers.memory().ffi, peers.memory().lib
    base = ffi.from_buffer("uint8_t[]", words)
    read = getattr(lib, f"peer_read_{reader}")
    assert read(base, ffi.NULL, 16, 1) == np.bitwise_xor.reduce(words, axis=None)
    chosen = np.array([3, 1, 7, 0, 12, 5, 9, 15], dtype=np.uint64)
    offsets = ffi.from_buffer("uint64_t[]", chosen * np.uint64(4096))
    assert read(base, offsets, 8, 1) == np.bitwise_xor.reduce(words[chosen], axis=None)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_of_a_peer_share_all_pages(threads: int) -> None:
    pages = np.random.default_rng().integers(0, 256, size=(7, 4096), dtype=np.uint8)
    golden = pages.copy()
    golden[[0, 3, 6], [0, 17, 4095]] ^= 1
    ffi, lib = peers.memory().ffi, peers.memory().lib
    base, expected = (ffi.from_buffer("uint8_t[]", each) for each in (pages, golden))
    assert lib.peer_compare(base, ffi.NULL, 7, threads, expected) == 3
    copy = np.zeros_like(pages)
    lib.peer_copy(base, ffi.NULL, 7, threads, ffi.from_buffer("uint8_t[]", copy))
    assert (copy == pages).all()


def test_shapes_name_contenders_that_exist() -> None:
    assert {name for shape in SHAPES for name in shape.contenders} <= set(BY_NAME)
    assert SHAPES[0].name == "contiguous-1GiB"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BenchOptions(shapes=("round",)), "shape 'round' is unknown; use one of: contiguous-1GiB"),
        (BenchOptions(contenders=("crc",)), "contender 'crc' is unknown; use one of: nh4aes"),
    ],
)
def test_unknown_names_are_refused_before_anything_is_measured(
    options: BenchOptions, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run_bench(options, pytest.fail)


def test_a_stored_document_comes_back_as_it_was(tmp_path: Path) -> None:
    document = documents.load(STORED)
    documents.save(document, tmp_path / "again.json")
    assert documents.load(tmp_path / "again.json") == document


def test_the_document_has_the_promised_form() -> None:
    raw = json.loads(STORED.read_text())
    assert raw["machine"]["cpu"]
    first = raw["results"][0]
    assert first["shape"] == "contiguous-1GiB"
    assert {"shape", "contender", "threads", "gb_per_s", "pages_per_s", "form"} <= first.keys()
    assert first["gb_per_s"].keys() == {"median", "min", "max"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no benchmark document"),
        (b"[1, 2", "no benchmark document"),
        (b'{"machine": {}}', "no benchmark document"),
        (b'"' + 17 * 2**20 * b"x" + b'"', "larger than any"),
    ],
)
def test_what_is_no_document_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "foreign.json"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=message):
        documents.load(path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "later.json"
    path.write_text(json.dumps(json.loads(STORED.read_text()) | {"version": 2}))
    with pytest.raises(FileFormatError, match="version 2, 1 is read"):
        documents.load(path)


def test_a_missing_document_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="No such file"):
        documents.load(tmp_path / "none.json")


def test_the_page_shows_ratios_limits_and_what_is_absent(tmp_path: Path) -> None:
    document = documents.load(STORED)
    page = tmp_path / "page.md"
    save_markdown(document, page, [tmp_path / "plots/throughput.svg"])
    text = page.read_text()
    assert document.machine.cpu in text
    assert "![throughput](plots/throughput.svg)" in text
    assert text.index("## Must reach") < text.index("## contiguous-1GiB, 1 thread")
    for result in document.results:
        assert f"| {result.contender} |" in text
        assert f"{result.gb_per_s.median:.2f}" in text
    for absent in document.absent:
        assert absent.reason in text


def test_a_pipe_sign_breaks_no_table(tmp_path: Path) -> None:
    document = documents.load(STORED)
    odd = dataclasses.replace(document, note="a | b")
    save_markdown(odd, tmp_path / "page.md", [])
    assert r"| beside it | a \| b |" in (tmp_path / "page.md").read_text()
