"""Walks of linked lists that an attacker wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_kernel import MIB
from fake_target import FakeTarget, pack
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import Memory

from pyscan.records import PageStatus
from pyscan.sources.layers import FaultSource
from pyscan.validate.lists import Fault, chain_entries, hlist_entries, list_entries
from pyscan.validate.memory import VirtualMemory

OFFSET = 0x18


@pytest.fixture
def fake(tmp_path: Path) -> FakeTarget:
    return FakeTarget(Memory(tmp_path / "ram", 64 * MIB))


@pytest.fixture
def memory(fake: FakeTarget) -> Iterator[VirtualMemory]:
    with fake.memory.source() as source:
        yield fake.target(source).memory


def nodes(fake: FakeTarget, count: int) -> list[int]:
    return [fake.scratch(number) + OFFSET for number in range(count)]


def test_a_list_in_order(fake: FakeTarget, memory: VirtualMemory) -> None:
    ring = nodes(fake, 5)
    fake.list("modules", ring)
    walked = list_entries(memory, fake.address("modules"), OFFSET, 5)
    assert walked.entries == tuple(node - OFFSET for node in ring)
    assert walked.broken is None


def test_an_empty_list(fake: FakeTarget, memory: VirtualMemory) -> None:
    walked = list_entries(memory, fake.address("modules"), OFFSET, 0)
    assert walked.entries == ()
    assert walked.broken is None


@pytest.mark.parametrize("back", [0, 2, 4])
def test_a_list_that_comes_back_to_itself(
    fake: FakeTarget, memory: VirtualMemory, back: int
) -> None:
    ring = nodes(fake, 5)
    fake.list("modules", ring)
    fake.write(ring[4], pack(ring[back]))
    walked = list_entries(memory, fake.address("modules"), OFFSET, 1000)
    assert len(walked.entries) == 5
    assert walked.broken is not None
    assert walked.broken.fault is Fault.CYCLE
    assert walked.broken.node == ring[back]


def test_more_entries_than_the_bound(fake: FakeTarget, memory: VirtualMemory) -> None:
    fake.list("modules", nodes(fake, 5))
    walked = list_entries(memory, fake.address("modules"), OFFSET, 4)
    assert len(walked.entries) == 4
    assert walked.broken is not None
    assert walked.broken.fault is Fault.ENDLESS


@pytest.mark.parametrize(
    "wild", [0, 8, (1 << 64) - 1, 0x1122_3344_5566_7788, 0xDEAD_0000_0000_0100]
)
def test_a_wild_pointer(fake: FakeTarget, memory: VirtualMemory, wild: int) -> None:
    ring = nodes(fake, 3)
    fake.list("modules", ring)
    fake.write(ring[1], pack(wild))
    walked = list_entries(memory, fake.address("modules"), OFFSET, 1000)
    assert walked.entries == tuple(node - OFFSET for node in ring[:2])
    assert walked.broken is not None
    assert walked.broken.fault is Fault.WILD
    assert "\n" not in walked.broken.text


def test_a_page_that_cannot_be_read(fake: FakeTarget) -> None:
    ring = nodes(fake, 3)
    fake.list("modules", ring)
    frame = fake.gpa(ring[1]) >> 12
    with FaultSource(fake.memory.source(), {frame: PageStatus.BLOCKED}) as source:
        memory = fake.target(source).memory
        walked = list_entries(memory, fake.address("modules"), OFFSET, 1000)
    assert walked.broken is not None
    assert walked.broken.fault is Fault.UNREADABLE


@pytest.mark.parametrize("node", [0, 1, 2])
def test_an_entry_that_was_unlinked_one_way(
    fake: FakeTarget, memory: VirtualMemory, node: int
) -> None:
    """Who unlinks carelessly is seen, and the rest of the list is still read."""
    ring = nodes(fake, 3)
    fake.list("modules", ring)
    fake.write(ring[node] + 8, pack(fake.scratch(9)))
    walked = list_entries(memory, fake.address("modules"), OFFSET, 1000)
    assert len(walked.entries) == 3
    assert walked.broken is not None
    assert (walked.broken.fault, walked.broken.node) == (Fault.DISAGREE, ring[node])


def test_a_head_that_forgot_its_last_entry(fake: FakeTarget, memory: VirtualMemory) -> None:
    ring = nodes(fake, 3)
    fake.list("modules", ring)
    fake.put("modules", pack(ring[1]), 8)
    walked = list_entries(memory, fake.address("modules"), OFFSET, 1000)
    assert walked.broken is not None
    assert walked.broken.fault is Fault.DISAGREE


def test_hash_lists(fake: FakeTarget, memory: VirtualMemory) -> None:
    head, (first, second) = fake.address("kprobe_table"), nodes(fake, 2)
    assert hlist_entries(memory, head, OFFSET, 9).entries == ()
    memory.forget()
    fake.write(head, pack(first))
    fake.write(first, pack(second, head))
    fake.write(second, pack(0, first))
    walked = hlist_entries(memory, head, OFFSET, 9)
    assert walked.entries == (first - OFFSET, second - OFFSET)
    assert walked.broken is None
    memory.forget()
    fake.write(second, pack(first, first))
    walked = hlist_entries(memory, head, OFFSET, 9)
    assert walked.broken is not None
    assert walked.broken.fault is Fault.CYCLE


def test_chains(fake: FakeTarget, memory: VirtualMemory) -> None:
    head, end = fake.address("ftrace_ops_list"), fake.address("ftrace_list_end")
    first, second = fake.scratch(0), fake.scratch(1)
    fake.write(head, pack(first))
    fake.write(first + 8, pack(second))
    fake.write(second + 8, pack(end))
    assert chain_entries(memory, head, 8, 9, end).entries == (first, second)
    memory.forget()
    fake.write(second + 8, pack(0))
    assert chain_entries(memory, head, 8, 9, end).broken is None
    memory.forget()
    fake.write(second + 8, pack(second))
    walked = chain_entries(memory, head, 8, 9, end)
    assert walked.broken is not None
    assert walked.broken.fault is Fault.CYCLE


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_noise_ends(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """Pages of pointers into themselves: every walk ends within its bound."""
    fake = FakeTarget(Memory(tmp_path_factory.mktemp("noise") / "ram", 64 * MIB))
    rng = np.random.default_rng(seed)
    steps = rng.integers(0, 2048, 2048).astype(np.uint64) * np.uint64(8)
    words = np.uint64(fake.scratch(0)) + steps
    fake.write(fake.scratch(0), words.tobytes())
    with fake.memory.source() as source:
        memory = fake.target(source).memory
        for walk in (list_entries, hlist_entries, chain_entries):
            walked = walk(memory, fake.scratch(0), OFFSET, 300)
            assert len(walked.entries) <= 300
            assert walk is chain_entries or walked.broken is not None


def test_an_entry_that_came_while_the_list_was_read(
    fake: FakeTarget, memory: VirtualMemory
) -> None:
    """Processes come at the end: the head was read before, or the last entry was."""
    ring, head = nodes(fake, 4), fake.address("modules")
    for early in ([head], ring):
        fake.list("modules", ring[:3])
        memory.forget()
        for address in early:
            memory.u64(address)
        fake.list("modules", ring)
        walked = list_entries(memory, head, OFFSET, 1000)
        assert len(walked.entries) in {3, 4}
        assert walked.broken is None


def test_an_entry_that_went_while_the_list_was_read(
    fake: FakeTarget, memory: VirtualMemory
) -> None:
    ring = nodes(fake, 3)
    fake.list("modules", ring)
    for node in ring[:2]:
        memory.u64(node)
    fake.list("modules", [ring[0], ring[2]])
    fake.write(ring[1] + 8, pack(0xDEAD_0000_0000_0122))  # LIST_POISON2
    walked = list_entries(memory, fake.address("modules"), OFFSET, 1000)
    assert len(walked.entries) == 3
    assert walked.broken is None


def test_an_entry_that_is_passed_by_in_one_direction(
    fake: FakeTarget, memory: VirtualMemory
) -> None:
    """The way back is sound, but the way on leads over another entry: nobody's work."""
    ring, other = nodes(fake, 3), fake.scratch(9) + OFFSET
    fake.list("modules", ring)
    fake.write(ring[0], pack(other))
    fake.write(other, pack(ring[2]) + pack(ring[0]))
    walked = list_entries(memory, fake.address("modules"), OFFSET, 1000)
    assert walked.broken is not None
    assert walked.broken.fault is Fault.DISAGREE
    assert walked.broken.node == ring[2]
