"""The link's structures are those of firmware/ps_link.h, and what is odd does not pass."""

from __future__ import annotations

import subprocess
from dataclasses import fields, replace
from pathlib import Path

import pytest

from pyscan.sources import link
from pyscan.sources.link import CardPage, Completion, Op, Structure, Submission

FIRMWARE = Path(__file__).parents[2] / "firmware"

#: Structure of the header, and the same here.
STRUCTURES: dict[str, Structure] = {
    "ps_link_host": link.HOST_PAGE,
    "ps_link_card": link.CARD_PAGE,
    "ps_link_submission": link.SUBMISSION,
    "ps_link_completion": link.COMPLETION,
    "ps_link_region": link.REGION,
    "ps_link_bus_request": link.BUS_REQUEST,
    "ps_link_bus_reply": link.BUS_REPLY,
}

#: Constants of the header, and the same here.
CONSTANTS = {
    "PS_LINK_VERSION": link.VERSION,
    "PS_LINK_SLOTS": link.SLOTS,
    "PS_LINK_PAGES_MAX": link.PAGES_MAX,
    "PS_LINK_READ_MAX": link.READ_MAX,
    "PS_LINK_REGIONS_MAX": link.REGIONS_MAX,
    "PS_LINK_LOCAL_MAX": link.LOCAL_MAX,
    "PS_LINK_RESULT_SIZE": link.width(Op.DIGEST, 3),
    "PS_LINK_LOG_SIZE": link.LOG_BYTES,
    "PS_LINK_CARD_MAGIC": link.CARD_MAGIC,
    "PS_LINK_HOST_MAGIC": link.HOST_MAGIC,
    "PS_LINK_HOST_AT": link.HOST_AT,
    "PS_LINK_CARD_AT": link.CARD_AT,
    "PS_LINK_SUBMISSIONS_AT": link.SUBMISSIONS_AT,
    "PS_LINK_COMPLETIONS_AT": link.COMPLETIONS_AT,
    "PS_LINK_BUS_REQUEST_AT": link.BUS_REQUEST_AT,
    "PS_LINK_BUS_REPLY_AT": link.BUS_REPLY_AT,
    "PS_LINK_LOG_AT": link.LOG_AT,
    "PS_LINK_DATA_AT": link.DATA_AT,
    "PS_LINK_SLOT_SIZE": link.SLOT_BYTES,
    "PS_LINK_FRAMES_IN_SLOT": 0,
    "PS_LINK_STATUSES_IN_SLOT": link.STATUSES_IN_SLOT,
    "PS_LINK_RESULTS_IN_SLOT": link.RESULTS_IN_SLOT,
    "PS_LINK_MAILBOX_SIZE": link.MAILBOX_BYTES,
    **{f"PS_LINK_OP_{op.name}": op.value for op in link.Op},
    "PS_LINK_RANGE": link.RANGE,
    "PS_LINK_SHA256": link.KINDS["sha256"].bit,
    "PS_LINK_NH4AES": link.KINDS["nh4aes"].bit,
    **{f"PS_LINK_{result.name}": result.value for result in link.Result},
    **{f"PS_LINK_ENGINE_{engine.name}": engine.value for engine in link.Engine},
    **{f"PS_LINK_STATE_{state.name}": state.value for state in link.CardState},
    "PS_LINK_BUS_READ": link.BUS_READ,
    "PS_LINK_BUS_WRITE": link.BUS_WRITE,
}

SUBMISSION = Submission(7, Op.DIGEST, 1, 4096, 3, 0x1122334455667788, 0x99AABBCCDDEEFF00)


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, ...]]:
    """What the compiler says of the header."""
    out = tmp_path_factory.mktemp("layout")
    done = subprocess.run(
        ["make", "--no-print-directory", "-s", "-C", FIRMWARE, f"OUT={out}", "layout"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line]
    return {name: tuple(map(int, numbers)) for name, *numbers in lines}


def test_every_field_lies_where_the_header_has_it(layout: dict[str, tuple[int, ...]]) -> None:
    told = {name: place for name, place in layout.items() if "." in name}
    assert {name.split(".")[0] for name in told} == set(STRUCTURES)
    for name, structure in STRUCTURES.items():
        here = {f"{name}.{field}": place for field, place in structure.places().items()}
        there = {field: place for field, place in told.items() if field.startswith(f"{name}.")}
        reserved = there.pop(f"{name}.reserved", None)
        assert here == there
        ends = max(offset + size for offset, size in there.values())
        ends = max(ends, sum(reserved)) if reserved else ends
        assert structure.size == ends


def test_every_constant_is_that_of_the_header(layout: dict[str, tuple[int, ...]]) -> None:
    told = {name: value for name, (value, *_) in layout.items() if "." not in name}
    assert told == CONSTANTS


def test_check_value() -> None:
    assert link.crc32c(b"123456789") == 0xE3069283  # RFC 3720 names the polynomial
    assert link.crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert link.crc32c(bytes(range(32))) == 0x46DD794E


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_what_is_written_is_read(structure: Structure) -> None:
    kind = type(structure.decode(bytes(structure.size)))
    sizes = structure.places()
    values = {
        field.name: int.from_bytes(bytes(range(1, 1 + sizes[field.name][1])), "big") + index
        for index, field in enumerate(fields(kind))
    }
    record = kind(**values)
    data = structure.encode(record)
    assert len(data) == structure.size
    assert structure.decode(data) == record
    for name, value in values.items():
        offset, size = sizes[name]
        assert int.from_bytes(data[offset : offset + size], "little") == value


def test_one_wrong_bit_anywhere_breaks_the_seal() -> None:
    data = link.SUBMISSION.encode(SUBMISSION)
    assert link.SUBMISSION.unseal(data) == SUBMISSION
    for bit in range(8 * len(data)):
        wrong = bytearray(data)
        wrong[bit // 8] ^= 1 << bit % 8
        assert link.SUBMISSION.unseal(bytes(wrong)) is None


def test_a_seal_does_not_fit_another_entry() -> None:
    other = link.SUBMISSION.encode(replace(SUBMISSION, sequence=8))
    data = link.SUBMISSION.encode(SUBMISSION)
    assert link.SUBMISSION.unseal(data[:60] + other[60:]) is None
    assert link.COMPLETION.unseal(bytes(64)) is None  # nothing was ever written


def test_slots_go_round() -> None:
    assert [link.slot_of(number) for number in (1, 2, 16, 17, (1 << 32) - 1)] == [0, 1, 15, 0, 14]
    assert link.data_at(16) + link.SLOT_BYTES <= link.MAILBOX_BYTES
    assert {link.data_at(number) for number in range(1, 17)} == {
        link.DATA_AT + slot * link.SLOT_BYTES for slot in range(16)
    }


def test_widths() -> None:
    assert [link.width(Op.DIGEST, kinds) for kinds in (0, 1, 2, 3)] == [0, 32, 16, 48]
    assert link.width(Op.READ, 0) == 4096


def test_records_are_named_alike() -> None:
    assert [field.name for field in fields(CardPage)] == list(link.CARD_PAGE.places())
    assert [*(f.name for f in fields(Completion)), "check"] == list(link.COMPLETION.places())
