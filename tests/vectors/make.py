"""Make sha256-pages.json: digests of pages, by the naive twin.

    cd tests && python -m vectors.make

C, numba and firmware are all held to that one file. A page is described by a rule and its
two numbers, so the file stays small. One vector a line with the keys in this order: the
native driver reads it line by line.

    ramp        byte i is (i * a + b) mod 256
    spike       byte a is b, all others are zero
    xorshift32  little-endian words of Marsaglia's xorshift32 (13, 17, 5) from state a
"""

import json
from pathlib import Path

import naive

PAGE_SIZE = 4096
PATH = Path(__file__).with_name("sha256-pages.json")

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


def document() -> str:
    """The text of the vector file."""
    lines = [
        json.dumps(
            {
                "name": name,
                "rule": rule,
                "a": a,
                "b": b,
                "sha256": naive.sha256(page_of(rule, a, b)).hex(),
            }
        )
        for name, rule, a, b in VECTORS
    ]
    return '{"digest": "sha256", "page_size": 4096, "vectors": [\n' + ",\n".join(lines) + "\n]}\n"


if __name__ == "__main__":
    PATH.write_text(document(), encoding="utf-8")
