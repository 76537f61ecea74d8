"""A small module in which every kind of table occurs that the compiler reads."""

from __future__ import annotations

import struct

from test_compile_module import ALLOC, EXEC, NOBITS, R_32S, R_64, R_PC32, R_PC64, WRITE, Ko

#: What it needs of other units.
IMPORTS = (
    "__fentry__",
    "__x86_return_thunk",
    "__x86_indirect_thunk_rax",
    "__x86_indirect_thunk_r11",
    "pv_ops",
    "their_key",
    "__SCT__theirs",
    "_printk",
)
#: Offsets in .text.
CODE = {
    0x00: b"\xe8\0\0\0\0",  # call __fentry__
    0x08: b"\xe9\0\0\0\0",  # jmp __x86_return_thunk
    0x10: b"\xf0\xff\x00",  # lock incl (%rax)
    0x18: b"\xe8\0\0\0\0",  # call __x86_indirect_thunk_rax
    0x20: b"\x2e\xe9\0\0\0\0",  # jmp __x86_indirect_thunk_r11, with a prefix
    0x28: b"\x0f\x1f\x44\x00\x00",  # a jump label, off
    0x30: b"\xeb\x06",  # a short one, on
    0x38: b"\xe8\0\0\0\0",  # static call of this module's key
    0x40: b"\xe9\0\0\0\0",  # static tail call of another unit's key
    0x48: b"\xff\x14\x25\0\0\0\0",  # call *pv_ops
    0x50: b"\x90" * 8,  # an alternative
    0x58: b"\x0f\x85\0\0\0\0",  # conditional static tail call
    0x60: b"\xe8\0\0\0\0",  # call _printk
    0x68: b"\xe9\0\0\0\0",  # jmp __x86_return_thunk
}
_TEXT_BYTES = 0x80
_REPLACEMENT = b"\xe8\0\0\0\0\x0f\xae\xe8"  # call _printk; lfence


def make_patched_module() -> bytes:
    """The file of the module."""
    ko = Ko()
    code = bytearray(b"\xcc" * _TEXT_BYTES)
    for at, instruction in CODE.items():
        code[at : at + len(instruction)] = instruction
    text = ko.section(".text", ALLOC | EXEC, bytes(code), 16)
    replacement = ko.section(".altinstr_replacement", ALLOC | EXEC, _REPLACEMENT)
    # A trampoline: jmp or ret, int3, and the mark `ud1 %esp, %ecx`.
    trampoline = ko.section(".static_call.text", ALLOC | EXEC, b"\xe9\0\0\0\0\x0f\xb9\xcc", 8)
    init = ko.section(".init.text", ALLOC | EXEC, b"\xe8\0\0\0\0\xc3", 16)
    data = ko.section(".data", ALLOC | WRITE, bytes(64), 32)
    ko.section(".bss", ALLOC | WRITE, bytes(64), 32, NOBITS)
    after = ko.section(".data..ro_after_init", ALLOC | WRITE, bytes(16), 8)
    ko.section(".data..percpu", ALLOC | WRITE, bytes(16), 8)
    here, there, keys = ko.symbol("", text), ko.symbol("", replacement), ko.symbol("", data)
    imports = {name: ko.symbol(name, 0) for name in IMPORTS}
    ko.symbol("init_module", init, 0, kind=2)
    ko.symbol("function", text, 0, kind=2)
    ko.symbol("__SCK__mine", data, 16)
    mine = ko.symbol("__SCT__mine", trampoline, 0)
    target = ko.symbol("callee", text, 0x60, kind=2)
    for at, symbol in (
        (0x01, imports["__fentry__"]),
        (0x09, imports["__x86_return_thunk"]),
        (0x19, imports["__x86_indirect_thunk_rax"]),
        (0x22, imports["__x86_indirect_thunk_r11"]),
        (0x39, mine),
        (0x41, imports["__SCT__theirs"]),
        (0x5A, mine),
        (0x61, imports["_printk"]),
        (0x69, imports["__x86_return_thunk"]),
    ):
        ko.relocate(text, at, R_PC32, symbol, -4)
    ko.relocate(text, 0x4B, R_32S, imports["pv_ops"], 8)
    ko.relocate(replacement, 1, R_PC32, imports["_printk"], -4)
    ko.relocate(trampoline, 1, R_PC32, target, -4)
    ko.relocate(init, 1, R_PC32, imports["_printk"], -4)
    ko.relocate(after, 8, R_64, target, 0)
    _offsets(ko, ".return_sites", here, 0x08, 0x68)
    _offsets(ko, ".retpoline_sites", here, 0x18, 0x20)
    _offsets(ko, ".smp_locks", here, 0x10)
    _mcount(ko, here)
    _paravirt(ko, here)
    _alternatives(ko, here, there)
    _jump_table(ko, here, keys, imports["their_key"])
    _static_calls(ko, here, keys, imports["__SCT__theirs"])
    _exceptions(ko, here)
    _data(ko, here, init, target)
    return ko.file()


def _offsets(ko: Ko, name: str, text: int, *places: int) -> None:
    section = ko.section(name, ALLOC, bytes(4 * len(places)), 4)
    for row, at in enumerate(places):
        ko.relocate(section, 4 * row, R_PC32, text, at)


def _mcount(ko: Ko, text: int) -> None:
    section = ko.section("__mcount_loc", ALLOC, bytes(16), 8)
    ko.relocate(section, 0, R_64, text, 0)
    ko.relocate(section, 8, R_64, text, 0x60)


def _paravirt(ko: Ko, text: int) -> None:
    section = ko.section(".parainstructions", ALLOC, struct.pack("<QBB6x", 0, 1, 7), 8)
    ko.relocate(section, 0, R_64, text, 0x48)


def _alternatives(ko: Ko, text: int, replacement: int) -> None:
    rows = b"".join(
        struct.pack("<iiHBB", 0, 0, feature, 8, length)
        for feature, length in ((20, 8), (3 | 1 << 15, 0), (9 * 32 + 18, 5))
    )
    section = ko.section(".altinstructions", ALLOC, rows, 1)
    for row in range(3):
        ko.relocate(section, 12 * row, R_PC32, text, 0x50)
        ko.relocate(section, 12 * row + 4, R_PC32, replacement, 0)


def _jump_table(ko: Ko, text: int, keys: int, other: int) -> None:
    section = ko.section("__jump_table", ALLOC | WRITE, bytes(32), 8)
    for row, (at, to, key, addend) in enumerate(((0x28, 0x60, keys, 0), (0x30, 0x38, other, 1))):
        ko.relocate(section, 16 * row, R_PC32, text, at)
        ko.relocate(section, 16 * row + 4, R_PC32, text, to)
        ko.relocate(section, 16 * row + 8, R_PC64, key, addend)


def _static_calls(ko: Ko, text: int, keys: int, other: int) -> None:
    section = ko.section(".static_call_sites", ALLOC, bytes(24), 4)
    for row, (at, key, addend) in enumerate(
        ((0x38, keys, 16), (0x40, other, 1), (0x58, keys, 16 | 1))
    ):
        ko.relocate(section, 8 * row, R_PC32, text, at)
        ko.relocate(section, 8 * row + 4, R_PC32, key, addend)


def _exceptions(ko: Ko, text: int) -> None:
    section = ko.section("__ex_table", ALLOC, bytes(24), 4)
    for row, at in enumerate((0x10, 0x12)):
        ko.relocate(section, 12 * row, R_PC32, text, at)
        ko.relocate(section, 12 * row + 4, R_PC32, text, 0x60)
    places = ko.section(".orc_unwind_ip", ALLOC, bytes(8), 4)
    ko.section(".orc_unwind", ALLOC, bytes(range(12)), 2)
    for row, at in enumerate((0, 0x60)):
        ko.relocate(places, 4 * row, R_PC32, text, at)


def _data(ko: Ko, text: int, init: int, function: int) -> None:
    """Read-only data: pointers to a function, and to init code that will be gone."""
    section = ko.section(".rodata", ALLOC, bytes(range(64)), 16)
    ko.relocate(section, 16, R_64, function, 0)
    ko.relocate(section, 32, R_64, ko.symbol("", init), 0)
    ko.relocate(section, 48, R_PC32, text, 8)
    strings = ko.section("__ksymtab_strings", ALLOC, b"callee\0")
    ko.symbol("__ksymtab_callee", strings)
    ko.section(".modinfo", ALLOC, b"name=made\0")
