"""Identifiers: ULIDs in their one spelling."""

from __future__ import annotations

import time

import pytest

from pyscan.ids import is_id, new_id

GOOD = "01ARZ3NDEKTSV4RRFFQ69G5FAV"  # the example of the ULID specification


def test_new_ids_are_ids_and_differ() -> None:
    made = {new_id() for _ in range(1000)}
    assert len(made) == 1000
    assert all(is_id(text) for text in made)


def test_a_new_id_carries_the_time_it_was_made() -> None:
    alphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
    before = time.time_ns() // 1_000_000
    text = new_id()
    after = time.time_ns() // 1_000_000
    made = 0
    for character in text[:10]:
        made = made * 32 + alphabet.index(character)
    assert before <= made <= after


@pytest.mark.parametrize(
    "text",
    [
        "",
        GOOD[:-1],
        GOOD + "0",
        GOOD + "\n",
        GOOD.lower(),
        "8" + GOOD[1:],  # more than 128 bits
        GOOD[:-1] + "I",
        GOOD[:-1] + "L",
        GOOD[:-1] + "O",
        GOOD[:-1] + "U",
        GOOD[:-1] + "-",
        GOOD[:-1] + "\u0660",  # a digit to Unicode
    ],
)
def test_what_is_no_id(text: str) -> None:
    assert is_id(GOOD)
    assert not is_id(text)
