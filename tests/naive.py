"""Slow, obvious twins of the digests, on plain integers, for making test vectors.

SHA-256 is written from FIPS 180-4, AES-128 from FIPS 197, and section numbers refer to them;
the keyed digests from docs/spec/digest.md. Even constants are worked out from their
definition, so no table here can share a typing error with the core.
"""

import hashlib

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


# ---- AES-128, FIPS 197 ----


def gf_multiply(x: int, y: int, modulus: int) -> int:
    """Product of two polynomials over GF(2), bit i for x^i, modulo another; shift and xor."""
    degree = modulus.bit_length() - 1
    product = 0
    while y:
        if y & 1:
            product ^= x
        y >>= 1
        x <<= 1
        if x >> degree:
            x ^= modulus
    return product


AES_MODULUS = 0b1_0001_1011  # 4.2: x^8 + x^4 + x^3 + x + 1


def sub_byte(byte: int) -> int:
    """5.1.1: the inverse, found by trying, then the affine map (5.1)."""
    inverse = next((c for c in range(256) if gf_multiply(byte, c, AES_MODULUS) == 1), 0)
    result = 0x63
    for shift in range(5):
        result ^= (inverse << shift | inverse >> (8 - shift)) & 0xFF
    return result


S_BOX = bytes(sub_byte(byte) for byte in range(256))


def aes_round_keys(key: bytes) -> list[bytes]:
    """5.2: eleven round keys."""
    words = [key[at : at + 4] for at in range(0, 16, 4)]
    constant = 1
    while len(words) < 44:
        word = words[-1]
        if len(words) % 4 == 0:
            word = bytes(S_BOX[byte] for byte in word[1:] + word[:1])
            word = bytes([word[0] ^ constant]) + word[1:]
            constant = gf_multiply(constant, 2, AES_MODULUS)
        words.append(xor(words[-4], word))
    return [b"".join(words[at : at + 4]) for at in range(0, 44, 4)]


def xor(x: bytes, y: bytes) -> bytes:
    """Byte by byte."""
    return bytes(a ^ b for a, b in zip(x, y, strict=True))


def mix_column(column: bytes) -> bytes:
    """5.1.3."""
    return bytes(
        gf_multiply(column[row], 2, AES_MODULUS)
        ^ gf_multiply(column[(row + 1) % 4], 3, AES_MODULUS)
        ^ column[(row + 2) % 4]
        ^ column[(row + 3) % 4]
        for row in range(4)
    )


def aes(key: bytes, block: bytes) -> bytes:
    """5.1: one block of 16 bytes, encrypted."""
    round_keys = aes_round_keys(key)
    state = xor(block, round_keys[0])
    for number, round_key in enumerate(round_keys[1:], start=1):
        state = bytes(S_BOX[byte] for byte in state)
        state = bytes(state[(at + 4 * (at % 4)) % 16] for at in range(16))  # 5.1.2
        if number < 10:
            state = b"".join(mix_column(state[at : at + 4]) for at in range(0, 16, 4))
        state = xor(state, round_key)
    return state


# ---- the keyed digests, docs/spec/digest.md ----


def words_of(data: bytes, size: int) -> list[int]:
    """Little-endian words of `size` bytes."""
    return [int.from_bytes(data[at : at + size], "little") for at in range(0, len(data), size)]


def nh_sum(message: list[int], key: list[int]) -> int:
    """NH of RFC 4418, 5.2.2, over all words of a page, with consecutive words paired."""
    total = 0
    for i in range(0, len(message), 2):
        total += ((message[i] + key[i]) & WORD_MASK) * ((message[i + 1] + key[i + 1]) & WORD_MASK)
    return total % 2**64


def nh4aes(secret: bytes, page: bytes, frame: int) -> bytes:
    """nh4aes v1: 16 bytes."""
    stream = hashlib.shake_256(b"pyscan nh4aes v1" + secret).digest(4208)
    key, message = words_of(stream[:4192], 4), words_of(page, 4)
    n = [nh_sum(message, key[8 * t : 8 * t + 1024]) for t in range(4)]
    first = (n[0] | n[1] << 64) ^ frame
    second = n[2] | n[3] << 64
    state = aes(stream[4192:], first.to_bytes(16, "little"))
    return aes(stream[4192:], xor(state, second.to_bytes(16, "little")))


GF128_MODULUS = 1 << 128 | 1 << 7 | 1 << 2 | 1 << 1 | 1


def gf128aes(secret: bytes, page: bytes, frame: int) -> bytes:
    """gf128aes v1: 16 bytes."""
    stream = hashlib.shake_256(b"pyscan gf128aes v1" + secret).digest(4112)
    key, message = words_of(stream[:4096], 16), words_of(page, 16)
    keyed = [m ^ k for m, k in zip(message, key, strict=True)]
    total = frame
    for i in range(0, 256, 4):
        for lane in range(2):
            total ^= gf_multiply(keyed[i + lane], keyed[i + 2 + lane], GF128_MODULUS)
    return aes(stream[4096:], total.to_bytes(16, "little"))
