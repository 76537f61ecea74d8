"""Make the vector files: digests of pages, by the naive twin.

    cd tests && python -m vectors.make

C, numba and firmware are all held to these files. A page is described by a rule and its
two numbers, so they stay small. One vector a line with the keys in this order: the
native driver reads them line by line. Vectors of a keyed digest also have the master secret
and the frame number of the page.

    ramp        byte i is (i * a + b) mod 256
    spike       byte a is b, all others are zero
    xorshift32  little-endian words of Marsaglia's xorshift32 (13, 17, 5) from state a
"""

import json
from pathlib import Path

import naive

PAGE_SIZE = 4096
FOLDER = Path(__file__).parent
KEYED = {"nh4aes": naive.nh4aes, "gf128aes": naive.gf128aes}
DIGESTS = ("sha256", *KEYED)

SECRETS = (bytes(range(32)), bytes(32), b"\xff" * 32)
FRAMES = (0, 1, 0x100000, 2**52 - 1, 2**64 - 1)

VECTORS = [
    ("zeros", "ramp", 0, 0),
    ("ones", "ramp", 0, 0xFF),
    ("poison", "ramp", 0, 0xA5),
    ("counting", "ramp", 1, 0),
    ("ramp-7-3", "ramp", 7, 3),
    ("ramp-251-128", "ramp", 251, 128),
    ("first-bit", "spike", 0, 0x80),
    ("first-byte", "spike", 0, 0x01),
    ("block-end", "spike", 63, 0x01),
    ("block-start", "spike", 64, 0x80),
    ("middle", "spike", 2048, 0x10),
    ("last-byte", "spike", 4095, 0x01),
    ("xorshift-1", "xorshift32", 1, 0),
    ("xorshift-marsaglia", "xorshift32", 2463534242, 0),
    ("xorshift-all-ones", "xorshift32", 0xFFFFFFFF, 0),
]


def xorshift32(state: int) -> bytes:
    """A page of pseudo-random words; Marsaglia, "Xorshift RNGs", 2003."""
    page = bytearray()
    while len(page) < PAGE_SIZE:
        state ^= state << 13 & 0xFFFFFFFF
        state ^= state >> 17
        state ^= state << 5 & 0xFFFFFFFF
        page += state.to_bytes(4, "little")
    return bytes(page)


def page_of(rule: str, a: int, b: int) -> bytes:
    """The page that a vector describes."""
    match rule:
        case "ramp":
            return bytes((i * a + b) % 256 for i in range(PAGE_SIZE))
        case "spike":
            return bytes(b if i == a else 0 for i in range(PAGE_SIZE))
        case "xorshift32":
            return xorshift32(a)
    raise ValueError(f"unknown rule {rule!r}")


def path_of(digest: str) -> Path:
    """The vector file of a digest."""
    return FOLDER / f"{digest}-pages.json"


def vectors_of(digest: str) -> list[dict[str, str | int]]:
    """All vectors of a digest."""
    made: list[dict[str, str | int]] = []
    for number, (name, rule, a, b) in enumerate(VECTORS):
        page = page_of(rule, a, b)
        vector: dict[str, str | int] = {"name": name, "rule": rule, "a": a, "b": b}
        if digest in KEYED:
            secret, frame = SECRETS[number % len(SECRETS)], FRAMES[number % len(FRAMES)]
            vector |= {"secret": secret.hex(), "frame": frame}
            vector[digest] = KEYED[digest](secret, page, frame).hex()
        else:
            vector[digest] = naive.sha256(page).hex()
        made.append(vector)
    return made


def document(digest: str) -> str:
    """The text of a vector file."""
    lines = ",\n".join(json.dumps(vector) for vector in vectors_of(digest))
    return f'{{"digest": "{digest}", "page_size": 4096, "vectors": [\n{lines}\n]}}\n'


if __name__ == "__main__":
    for each in DIGESTS:
        path_of(each).write_text(document(each), encoding="utf-8")
