"""Slow, obvious twins of the digests, on plain integers, for making test vectors.

SHA-256 is written from FIPS 180-4 and section numbers refer to it. Even its constants are
worked out from their definition, so no table here can share a typing error with the core.
"""

WORD_BITS = 32
WORD_MASK = 2**WORD_BITS - 1


def primes(count: int) -> list[int]:
    """The first `count` primes."""
    found: list[int] = []
    candidate = 2
    while len(found) < count:
        if all(candidate % prime for prime in found):
            found.append(candidate)
        candidate += 1
    return found


def root_fraction(degree: int, number: int) -> int:
    """First 32 bits of the fractional part of the root: floor(number ** (1/degree) * 2**32)."""
    scaled = number << (WORD_BITS * degree)
    low, high = 0, scaled
    while low < high:
        middle = (low + high + 1) // 2
        if middle**degree <= scaled:
            low = middle
        else:
            high = middle - 1
    return low & WORD_MASK


INITIAL = [root_fraction(2, prime) for prime in primes(8)]  # 5.3.3
CONSTANTS = [root_fraction(3, prime) for prime in primes(64)]  # 4.2.2


def rotate_right(word: int, bits: int) -> int:
    """2.2.2 ROTR."""
    return (word >> bits) | (word << (WORD_BITS - bits)) & WORD_MASK


def padded(message: bytes) -> bytes:
    """5.1.1: a one bit, zeros, and the length in bits, to a multiple of 64 bytes."""
    zeros = -(len(message) + 9) % 64
    return message + b"\x80" + bytes(zeros) + (8 * len(message)).to_bytes(8, "big")


def schedule(block: bytes) -> list[int]:
    """6.2.2 step 1."""
    words = [int.from_bytes(block[at : at + 4], "big") for at in range(0, 64, 4)]
    for t in range(16, 64):
        w2, w7, w15, w16 = words[t - 2], words[t - 7], words[t - 15], words[t - 16]
        sigma1 = rotate_right(w2, 17) ^ rotate_right(w2, 19) ^ (w2 >> 10)
        sigma0 = rotate_right(w15, 7) ^ rotate_right(w15, 18) ^ (w15 >> 3)
        words.append((sigma1 + w7 + sigma0 + w16) & WORD_MASK)
    return words


def compress(state: list[int], block: bytes) -> list[int]:
    """6.2.2 steps 2 to 4."""
    a, b, c, d, e, f, g, h = state
    for constant, word in zip(CONSTANTS, schedule(block), strict=True):
        sum1 = rotate_right(e, 6) ^ rotate_right(e, 11) ^ rotate_right(e, 25)
        choice = (e & f) ^ (~e & g)
        t1 = h + sum1 + choice + constant + word
        sum0 = rotate_right(a, 2) ^ rotate_right(a, 13) ^ rotate_right(a, 22)
        majority = (a & b) ^ (a & c) ^ (b & c)
        a, b, c, d, e, f, g, h = (
            (t1 + sum0 + majority) & WORD_MASK,
            a,
            b,
            c,
            (d + t1) & WORD_MASK,
            e,
            f,
            g,
        )
    return [
        (old + new) & WORD_MASK for old, new in zip(state, (a, b, c, d, e, f, g, h), strict=True)
    ]


def sha256(message: bytes) -> bytes:
    """6.2: the digest of `message`, 32 bytes."""
    state = INITIAL
    message = padded(message)
    for at in range(0, len(message), 64):
        state = compress(state, message[at : at + 64])
    return b"".join(word.to_bytes(4, "big") for word in state)
