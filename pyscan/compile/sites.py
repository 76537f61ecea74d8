"""Where a unit's text is patched: the tables that the kernel's build leaves, as columns.

Sources: arch/x86/include/asm/{alternative,jump_label,paravirt_types}.h, include/linux/
{jump_label,static_call_types}.h, tools/objtool (.return_sites, .retpoline_sites).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import capstone
import numpy as np
from numpy.typing import NDArray

from pyscan.approved.unit import (
    ALTERNATIVE,
    ALTERNATIVE_RUN,
    JUMP_LABEL,
    PARAVIRT,
    RETPOLINE,
    STATIC_CALL,
    TRAMPOLINE,
    Column,
    Section,
    Sites,
)
from pyscan.compile.draft import I64, OWN, Draft, Rows
from pyscan.errors import PackageError
from pyscan.kernel.series import Series

#: Tables that have no section in vmlinux: symbols bound them (include/asm-generic/
#: vmlinux.lds.h). Modules have them as sections.
BOUNDED_TABLES: Final = {
    "__jump_table": ("__start___jump_table", "__stop___jump_table"),
    ".static_call_sites": ("__start_static_call_sites", "__stop_static_call_sites"),
    "__mcount_loc": ("__start_mcount_loc", "__stop_mcount_loc"),
}
#: The thunks of indirect branches, by the number of the register (arch/x86/lib/retpoline.S).
THUNKS: Final = tuple(
    f"__x86_indirect_thunk_{register}"
    for register in (
        *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
        *(f"r{number}" for number in range(8, 16)),
    )
)
_CALL: Final = 0xE8
_JMP32: Final = 0xE9
_CS_PREFIX: Final = 0x2E
_NOP: Final = 0x90
_DECODER: Final = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)


class SiteReader:
    """Reads the tables of one draft.

    `text`: ranges of offsets (start, end) whose bytes are predicted; sites elsewhere (code
    that is gone after boot) are left out.
    """

    def __init__(self, draft: Draft, series: Series, text: Sequence[tuple[int, int]]) -> None:
        self._draft = draft
        self._series = series
        self._text = text

    def read(self, thunks: dict[tuple[int, int], int], trampolines: Column) -> Sites:
        """All sites. `thunks`: (slot, addend) of an indirect-branch thunk -> its register.

        Raises PackageError for a table that contradicts the code it speaks of.
        """
        alternatives, runs = self._alternatives()
        return Sites(
            mcount=self._mcount(),
            returns=self._offsets(".return_sites", 5),
            locks=self._offsets(".smp_locks", 1),
            retpolines=self._retpolines(thunks),
            paravirt=self._paravirt(),
            alternatives=alternatives,
            alternative_runs=runs,
            jump_labels=self._jump_labels(),
            static_calls=self._static_calls(),
            trampolines=trampolines,
        )

    def _inside(self, offsets: I64, slots: I64, length: int | I64) -> NDArray[np.bool_]:
        kept = np.zeros(len(offsets), dtype=bool)
        for start, end in self._text:
            kept |= (offsets >= start) & (offsets + length <= end)
        kept &= slots == OWN
        return kept

    def _offsets(self, name: str, length: int) -> NDArray[np.uint32]:
        rows = self._draft.rows(name, 4, {"at": (0, "<i4")})
        offsets, slots = self._draft.relative(rows, "at", 0)
        return np.unique(offsets[self._inside(offsets, slots, length)]).astype(np.uint32)

    def _mcount(self) -> NDArray[np.uint32]:
        rows = self._draft.rows("__mcount_loc", 8, {"at": (0, "<i8")})
        offsets, slots = self._draft.absolute(rows, "at", 0)
        return np.unique(offsets[self._inside(offsets, slots, 5)]).astype(np.uint32)

    def _retpolines(self, thunks: dict[tuple[int, int], int]) -> Column:
        image = self._draft.image
        found = []
        for offset in self._offsets(".retpoline_sites", 5).tolist():
            prefix = int(image[offset] == _CS_PREFIX)
            opcode = int(image[offset + prefix])
            conditional = opcode == 0x0F
            form = {_CALL: 0, _JMP32: 1, 0x0F: 2}.get(opcode)
            place = offset + prefix + 1 + conditional
            register = thunks.get(self._branch_target(place))
            if form is None or register is None:
                raise PackageError(
                    f"{self._draft.name}: no branch to a known thunk at {offset:#x}, where "
                    ".retpoline_sites has one; the package is damaged or of an unknown build"
                )
            found.append((offset, register, form, place + 4 - offset, prefix))
        return np.array(found, dtype=RETPOLINE)

    def _branch_target(self, place: int) -> tuple[int, int]:
        """(slot, addend) of the 32-bit branch displacement at `place`."""
        rows = Rows(
            np.array([place], dtype=np.int64),
            {"to": self._draft.image[place : place + 4].view("<i4").copy()},
        )
        target, slot = self._draft.relative(rows, "to", 0)
        # The displacement counts from behind itself; an addend of a relocation has that in it.
        return int(slot[0]), int(target[0]) + 4

    def _paravirt(self) -> Column:
        fields = {"at": (0, "<i8"), "index": (8, "u1"), "length": (9, "u1")}
        rows = self._draft.rows(".parainstructions", self._series.paravirt_bytes, fields)
        offsets, slots = self._draft.absolute(rows, "at", 0)
        kept = self._inside(offsets, slots, rows.columns["length"].astype(np.int64))
        column = np.empty(int(kept.sum()), dtype=PARAVIRT)
        column["offset"] = offsets[kept]
        column["index"], column["length"] = (rows.columns[k][kept] for k in ("index", "length"))
        return np.sort(column, order="offset")

    def _alternatives(self) -> tuple[Column, Column]:
        fields = {
            "at": (0, "<i4"),
            "by": (4, "<i4"),
            "feature": (8, "<u2"),
            "length": (10, "u1"),
            "replacement": (11, "u1"),
        }
        rows = self._draft.rows(".altinstructions", self._series.alternative_bytes, fields)
        offsets, slots = self._draft.relative(rows, "at", 0)
        sources, source_slots = self._draft.relative(rows, "by", 4)
        lengths = rows.columns["length"].astype(np.int64)
        copied = rows.columns["replacement"].astype(np.int64)
        kept = self._inside(offsets, slots, lengths)
        legal = (source_slots == OWN) & (sources >= 0) & (copied <= lengths)
        legal &= sources + copied <= len(self._draft.image)
        if not legal[kept].all():
            raise PackageError(f"{self._draft.name}: .altinstructions refers outside the image")
        column = np.zeros(int(kept.sum()), dtype=ALTERNATIVE)
        column["offset"], column["replacement"] = offsets[kept], sources[kept]
        column["feature"] = rows.columns["feature"][kept]
        column["length"], column["replacement_length"] = lengths[kept], copied[kept]
        runs: list[tuple[int, int, int]] = []
        for row in column:
            row["first_run"] = len(runs)
            runs += self._nop_runs(row)
            row["runs"] = len(runs) - int(row["first_run"])
        return column, np.array(runs, dtype=ALTERNATIVE_RUN)

    def _nop_runs(self, row: np.void) -> list[tuple[int, int, int]]:
        """Runs of one-byte nops that optimize_nops() merges (arch/x86/kernel/alternative.c)."""
        image, length = self._draft.image, int(row["length"])
        start, source = int(row["offset"]), int(row["replacement"])
        original = image[start : start + length].tobytes()
        replaced = image[source : source + int(row["replacement_length"])].tobytes()
        replaced += bytes([_NOP]) * (length - len(replaced))
        return [
            *((at, size, 0) for at, size in nop_runs(original)),
            *((at, size, 1) for at, size in nop_runs(replaced)),
        ]

    def _jump_labels(self) -> Column:
        fields = {"at": (0, "<i4"), "to": (4, "<i4"), "key": (8, "<i8")}
        rows = self._draft.rows("__jump_table", 16, fields)
        offsets, slots = self._draft.relative(rows, "at", 0)
        targets, target_slots = self._draft.relative(rows, "to", 4)
        keys, key_slots = self._draft.relative(rows, "key", 8)
        kept = self._inside(offsets, slots, 2) & (target_slots == OWN)
        column = np.empty(int(kept.sum()), dtype=JUMP_LABEL)
        column["offset"], column["target"] = offsets[kept], targets[kept]
        # Bit 0 of a key: the branch is taken when the key is off. Bit 1 is for objtool.
        column["branch"] = keys[kept] & 1
        column["key_slot"], column["key_addend"] = self._references(
            keys[kept] & ~3, key_slots[kept]
        )
        first = self._draft.image[column["offset"]]
        column["length"] = np.where((first == 0xEB) | (first == 0x66), 2, 5)
        return np.sort(column, order="offset")

    def _static_calls(self) -> Column:
        fields = {"at": (0, "<i4"), "key": (4, "<i4")}
        rows = self._draft.rows(".static_call_sites", 8, fields)
        offsets, slots = self._draft.relative(rows, "at", 0)
        keys, key_slots = self._draft.relative(rows, "key", 4)
        kept = self._inside(offsets, slots, 5)
        column = np.empty(int(kept.sum()), dtype=STATIC_CALL)
        column["offset"] = offsets[kept]
        column["tail"] = keys[kept] & 1
        column["key_slot"], column["key_addend"] = self._references(
            keys[kept] & ~3, key_slots[kept]
        )
        column["length"] = np.where(self._draft.image[column["offset"]] == 0x0F, 6, 5)
        names = [slot.name for slot in self._draft.slots.rows]
        column["trampoline"] = [
            names[slot].startswith("__SCT__") for slot in column["key_slot"].tolist()
        ]
        return np.sort(column, order="offset")

    def _references(self, targets: I64, slots: I64) -> tuple[I64, I64]:
        """(slot, addend) of places: their address is the slot's value plus the addend."""
        own = slots == OWN
        link = np.array(self._draft.link_address, dtype=np.uint64).astype(np.int64)
        return np.where(own, 0, slots), np.where(own, targets + link, targets)


def nop_runs(code: bytes) -> list[tuple[int, int]]:
    """(start, length) of each two or more one-byte nops in a row, at instruction boundaries.

    Decoding stops at what is no instruction, except that a tail of nops is always one run.
    """
    if bytes([_NOP, _NOP]) not in code:
        return []
    runs: list[tuple[int, int]] = []
    run = 0
    end = 0
    for at, size, _mnemonic, _operands in _DECODER.disasm_lite(code, 0):
        end = at + size
        if size == 1 and code[at] == _NOP:
            run += 1
            continue
        if run > 1:
            runs.append((at - run, run))
        run = 0
    if end < len(code):
        run = len(code) - len(code.rstrip(bytes([_NOP])))
        end = len(code)
    if run > 1:
        runs.append((end - run, run))
    return runs


def trampoline_column(rows: Sequence[tuple[int, int, int]]) -> Column:
    """Rows of TRAMPOLINE (offset, slot and addend of the key), sorted by offset."""
    return np.sort(np.array(list(rows), dtype=TRAMPOLINE), order="offset")


def table_between(name: str, start: int, end: int) -> Section:
    """A table that two symbols bound, as offsets. Raises PackageError when they are swapped."""
    if end < start:
        raise PackageError(f"vmlinux: {name} ends before it begins")
    return Section(name, start, end - start)
