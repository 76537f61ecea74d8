"""The vector files, for every implementation: two generators that share nothing agree on them."""

import hashlib
import json

import naive
import pytest
import reference
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import make

VECTORS = {
    f"{digest}-{vector['name']}": (digest, vector)
    for digest in make.DIGESTS
    for vector in json.loads(make.path_of(digest).read_text(encoding="utf-8"))["vectors"]
}
blocks = st.binary(min_size=16, max_size=16)


@pytest.mark.parametrize("digest", make.DIGESTS)
def test_the_file_is_what_the_naive_twin_makes(digest: str) -> None:
    assert make.path_of(digest).read_text(encoding="utf-8") == make.document(digest)


@pytest.mark.parametrize(("digest", "vector"), VECTORS.values(), ids=VECTORS.keys())
def test_the_second_generator_agrees(digest: str, vector: dict[str, str | int]) -> None:
    page = make.page_of(vector["rule"], vector["a"], vector["b"])
    secret, frame = bytes.fromhex(vector.get("secret", "")), vector.get("frame", 0)
    assert reference.digest_of(digest, page, secret, frame).hex() == vector[digest]


@given(st.binary(max_size=200))
def test_the_naive_twin_pads_like_hashlib(message: bytes) -> None:
    assert naive.sha256(message) == hashlib.sha256(message).digest()


@settings(max_examples=30)
@given(blocks, blocks)
def test_the_naive_aes_is_that_of_a_library(key: bytes, block: bytes) -> None:
    encryptor = Cipher(algorithms.AES128(key), modes.ECB()).encryptor()  # noqa: S305
    assert naive.aes(key, block) == encryptor.update(block)


@given(blocks, blocks)
def test_two_ways_to_multiply_agree(x: bytes, y: bytes) -> None:
    product = reference.carryless_multiply(int.from_bytes(x, "little"), y)
    for bit in range(product.bit_length() - 1, 127, -1):
        if product >> bit & 1:
            product ^= naive.GF128_MODULUS << (bit - 128)
    assert product == naive.gf_multiply(
        int.from_bytes(x, "little"), int.from_bytes(y, "little"), naive.GF128_MODULUS
    )
