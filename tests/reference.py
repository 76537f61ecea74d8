"""The second generator of expected digests: other libraries, other algorithms, and faster.

Nothing is shared with naive.py or the core: AES is that of `cryptography`, NH is done on
numpy arrays, and GF(2^128) multiplies by a table of 256 multiples and reduces at the end.
"""

import hashlib
from collections.abc import Callable
from functools import cache

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

DIGEST_BYTES = {"sha256": 32, "nh4aes": 16, "gf128aes": 16}


@cache
def nh_key(secret: bytes) -> tuple[np.ndarray, Callable[[bytes], bytes]]:
    stream = hashlib.shake_256(b"pyscan nh4aes v1" + secret).digest(4208)
    return np.frombuffer(stream, dtype="<u4", count=1048), aes_of(stream[-16:])


@cache
def gf_key(secret: bytes) -> tuple[bytes, Callable[[bytes], bytes]]:
    stream = hashlib.shake_256(b"pyscan gf128aes v1" + secret).digest(4112)
    return stream[:4096], aes_of(stream[-16:])


def aes_of(key: bytes) -> Callable[[bytes], bytes]:
    # One block without chaining: the digests chain by themselves.
    return Cipher(algorithms.AES128(key), modes.ECB()).encryptor().update  # noqa: S305


def sha256(page: bytes) -> bytes:
    return hashlib.sha256(page).digest()


def nh4aes(secret: bytes, page: bytes, frame: int) -> bytes:
    key, encrypt = nh_key(secret)
    words = np.frombuffer(page, dtype="<u4")
    passes = np.lib.stride_tricks.sliding_window_view(key, 1024)[::8]
    keyed = (words + passes).astype(np.uint64)
    sums = (keyed[:, 0::2] * keyed[:, 1::2]).sum(axis=1, dtype=np.uint64).astype("<u8")
    blocks = int.from_bytes(sums[:2].tobytes(), "little"), sums[2:].tobytes()
    first = encrypt((blocks[0] ^ frame).to_bytes(16, "little"))
    mixed = int.from_bytes(first, "little") ^ int.from_bytes(blocks[1], "little")
    return encrypt(mixed.to_bytes(16, "little"))


def carryless_multiply(x: int, y: bytes) -> int:
    """Product of polynomials over GF(2), byte by byte of `y` from the top."""
    multiples = [0, x]
    for byte in range(2, 256):
        multiples.append(multiples[byte // 2] << 1 ^ (x if byte % 2 else 0))
    product = 0
    for byte in reversed(y):
        product = product << 8 ^ multiples[byte]
    return product


def gf128aes(secret: bytes, page: bytes, frame: int) -> bytes:
    key, encrypt = gf_key(secret)
    keyed = np.frombuffer(page, np.uint8) ^ np.frombuffer(key, np.uint8)
    product = 0
    for x, y in zip(*np.split(keyed.reshape(64, 4, 16), 2, axis=1), strict=True):
        for lane in range(2):
            product ^= carryless_multiply(int.from_bytes(x[lane].tobytes(), "little"), y[lane])
    for bit in range(product.bit_length() - 1, 127, -1):
        if product >> bit & 1:
            product ^= 0x87 << (bit - 128) ^ 1 << bit
    return encrypt((product ^ frame).to_bytes(16, "little"))


def digest_of(digest: str, page: bytes, secret: bytes, frame: int) -> bytes:
    """Any of the three; `secret` and `frame` are for the keyed ones."""
    if digest == "sha256":
        return sha256(page)
    return {"nh4aes": nh4aes, "gf128aes": gf128aes}[digest](secret, page, frame)
