"""One vector file for every implementation; made by the naive twin, checked by hashlib."""

import hashlib
import json

import naive
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vectors import make

VECTORS = json.loads(make.PATH.read_text(encoding="utf-8"))["vectors"]


def test_the_file_is_what_the_naive_twin_makes() -> None:
    assert make.PATH.read_text(encoding="utf-8") == make.document()


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["name"] for vector in VECTORS])
def test_hashlib_agrees(vector: dict[str, str | int]) -> None:
    page = make.page_of(vector["rule"], vector["a"], vector["b"])
    assert hashlib.sha256(page).hexdigest() == vector["sha256"]


@given(st.binary(max_size=200))
def test_the_naive_twin_pads_like_hashlib(message: bytes) -> None:
    assert naive.sha256(message) == hashlib.sha256(message).digest()
