"""The kernel's own patching, replayed on the bytes of its package.

Every function changes a window of a unit's image (`Window`) as the kernel does when it boots,
loads a module or flips a key. Sources: arch/x86/kernel/{alternative,static_call,jump_label,
ftrace,paravirt}.c of 6.1; the order of the steps is that of alternative_instructions().
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pyscan.approved.unit import ALTERNATIVE_NOT, Column
from pyscan.validate.placed import Placed, within
from pyscan.validate.state import RETHUNK, RETPOLINE, RETPOLINE_LFENCE, PatchState

U64 = NDArray[np.uint64]

CALL: Final = 0xE8
JMP32: Final = 0xE9
JMP8: Final = 0xEB
INT3: Final = 0xCC
LOCK: Final = 0xF0
DS_PREFIX: Final = 0x3E
CS_PREFIX: Final = 0x2E
#: x86_nops (arch/x86/include/asm/nops.h): the one nop of each length from 1 to 8.
NOPS: Final = (
    b"\x90",
    b"\x66\x90",
    b"\x0f\x1f\x00",
    b"\x0f\x1f\x40\x00",
    b"\x0f\x1f\x44\x00\x00",
    b"\x66\x0f\x1f\x44\x00\x00",
    b"\x0f\x1f\x80\x00\x00\x00\x00",
    b"\x0f\x1f\x84\x00\x00\x00\x00\x00",
)
NOP5: Final = NOPS[4]
RETURN: Final = b"\xc3\xcc\xcc\xcc\xcc"
LFENCE: Final = b"\x0f\xae\xe8"
#: What a call of __static_call_return0 becomes: xor %eax, %eax with prefixes.
RETURN_ZERO: Final = b"\x2e\x2e\x2e\x31\xc0"
_HALF_LINE: Final = 0x20
_ADDRESS_MASK: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Part of a placed unit: `data` (n,) uint8 are the bytes from offset `start` on."""

    placed: Placed
    start: int
    data: NDArray[np.uint8]

    def rows(self, column: Column, length: int = 1) -> Column:
        """The rows of a column that has offsets, as far as they fit in the window."""
        return within(column, column["offset"], self.start, self.start + len(self.data) - length)

    def offsets(self, column: NDArray[np.uint32], length: int) -> NDArray[np.int64]:
        """Offsets of a plain column as far as they fit in the window."""
        found = within(column, column, self.start, self.start + len(self.data) - length)
        return found.astype(np.int64)

    def put(self, offset: int, code: bytes) -> None:
        """Write one place."""
        at = offset - self.start
        self.data[at : at + len(code)] = np.frombuffer(code, dtype=np.uint8)

    def put_all(self, offsets: NDArray[np.int64], code: bytes) -> None:
        """Write the same bytes to many places."""
        at = (offsets - self.start)[:, None] + np.arange(len(code))
        self.data[at] = np.frombuffer(code, dtype=np.uint8)

    def put_branches(
        self, offsets: NDArray[np.int64], opcode: int | NDArray[np.uint8], targets: U64
    ) -> None:
        """Write branches of 5 bytes (opcode, 32-bit displacement) to virtual `targets`."""
        at = offsets - self.start
        self.data[at] = opcode
        sources = np.uint64(self.placed.address) + offsets.astype(np.uint64) + np.uint64(5)
        displacement = (targets - sources).astype(np.uint32).astype("<u4")
        self.data[at[:, None] + np.arange(1, 5)] = displacement[:, None].view(np.uint8)

    def bytes_at(self, offset: int, length: int) -> bytes:
        """Bytes of one place."""
        return self.data[offset - self.start : offset - self.start + length].tobytes()


def nops(length: int) -> bytes:
    """add_nops(): as few nops as possible, the longest first."""
    whole, rest = divmod(length, len(NOPS))
    return NOPS[-1] * whole + (NOPS[rest - 1] if rest else b"")


def branch(opcode: int, source: int, target: int) -> bytes:
    """A branch of 5 bytes at `source`."""
    return bytes([opcode]) + ((target - source - 5) & 0xFFFF_FFFF).to_bytes(4, "little")


def branch_target(code: bytes, source: int) -> int:
    """Where a branch of 5 bytes at `source` leads."""
    return (source + 5 + int.from_bytes(code[1:5], "little", signed=True)) & _ADDRESS_MASK


def wants_return_thunk(state: PatchState, addresses: U64) -> NDArray[np.bool_]:
    """cpu_wants_rethunk_at()."""
    if not state.has(RETHUNK):
        return np.zeros(len(addresses), dtype=bool)
    if state.return_thunk != state.its_return_thunk or not state.its_return_thunk:
        return np.ones(len(addresses), dtype=bool)
    lower: NDArray[np.bool_] = (addresses & np.uint64(_HALF_LINE)) == 0
    return lower


def patch_paravirt(window: Window, state: PatchState) -> None:
    """apply_paravirt(): indirect calls through pv_ops become direct ones, or nops."""
    for row in window.rows(window.placed.unit.sites.paravirt):
        offset, index, length = int(row["offset"]), int(row["index"]), int(row["length"])
        if offset + length > window.start + len(window.data):
            continue
        target = int(state.paravirt[index]) if index < len(state.paravirt) else 0
        code = b""
        if target != state.paravirt_nop:
            target = target or state.paravirt_bug
            code = branch(CALL, window.placed.address + offset, target)
        window.put(offset, code + nops(length - len(code)))


def patch_retpolines(window: Window, state: PatchState) -> None:
    """apply_retpolines(): calls of a thunk become indirect branches where that is safe.

    Sites that would go through an ITS thunk, whose place only the target knows, keep the
    package's bytes here: `its_sites` names them.
    """
    if state.has(RETPOLINE) and not state.has(RETPOLINE_LFENCE):
        return
    rows = window.rows(window.placed.unit.sites.retpolines, 8)
    rows = rows[~its_sites(window.placed, rows, state)]
    kinds = rows[["register", "form", "length", "prefix"]]
    for kind in np.unique(kinds):
        code = indirect_branch(kind, fenced=state.has(RETPOLINE_LFENCE))
        if code is not None:
            window.put_all(rows["offset"][kinds == kind].astype(np.int64), code)


def indirect_branch(kind: np.void, *, fenced: bool) -> bytes | None:
    """patch_retpoline(): the indirect branch; None when it does not fit."""
    register, form, length = (int(kind[name]) for name in ("register", "form", "length"))
    code = b""
    if form == 2:
        return None
    if fenced:
        code += LFENCE
    if register >= 8:
        code += b"\x41"
    code += bytes([0xFF, (0xD0 if form == 0 else 0xE0) + register % 8])
    if form == 1 and len(code) < length:
        code += bytes([INT3])
    if len(code) > length:
        return None
    rest = length - len(code)
    return code + (nops(rest) if rest > 1 else NOPS[0] * rest)


def its_sites(placed: Placed, rows: Column, state: PatchState) -> NDArray[np.bool_]:
    """Which retpoline sites go through an ITS thunk: cpu_wants_indirect_its_thunk_at()."""
    if not state.indirect_its:
        return np.zeros(len(rows), dtype=bool)
    # The address of the last byte that is not the branch itself: behind an lfence.
    shift = len(LFENCE) if state.has(RETPOLINE_LFENCE) else 0
    last = np.uint64(placed.address) + rows["offset"].astype(np.uint64) + np.uint64(shift + 1)
    last += (rows["register"] >= 8).astype(np.uint64)
    lower: NDArray[np.bool_] = (last & np.uint64(_HALF_LINE)) == 0
    return lower


def patch_returns(window: Window, state: PatchState) -> None:
    """apply_returns(): returns through a thunk become plain ones, or reach the chosen thunk."""
    offsets = window.offsets(window.placed.unit.sites.returns, 5)
    put_returns(window, offsets, state)


def put_returns(window: Window, offsets: NDArray[np.int64], state: PatchState) -> None:
    """patch_return() at every offset."""
    addresses = np.uint64(window.placed.address) + offsets.astype(np.uint64)
    through = wants_return_thunk(state, addresses)
    window.put_all(offsets[~through], RETURN)
    targets = np.full(int(through.sum()), state.return_thunk, dtype=np.uint64)
    window.put_branches(offsets[through], JMP32, targets)


def patch_alternatives(window: Window, replacements: Window, state: PatchState) -> None:
    """apply_alternatives(): every entry in turn, so the last one that applies wins."""
    sites = window.placed.unit.sites
    rows = sites.alternatives
    inside = (rows["offset"] >= window.start) & (
        rows["offset"].astype(np.int64) + rows["length"] <= window.start + len(window.data)
    )
    numbers = rows["feature"] & (ALTERNATIVE_NOT - 1)
    features = np.zeros(ALTERNATIVE_NOT, dtype=bool)
    features[: len(state.features)] = state.features
    applies = features[numbers] != ((rows["feature"] & ALTERNATIVE_NOT) != 0)
    for index in np.flatnonzero(inside & (applies | (rows["runs"] > 0))).tolist():
        row = rows[index]
        if applies[index]:
            window.put(int(row["offset"]), _replacement(window.placed, replacements, row))
        _merge_nops(window, row, replaced=bool(applies[index]))


def _replacement(placed: Placed, replacements: Window, row: np.void) -> bytes:
    """What is copied over the original, its first branch led to the same target."""
    source, length = int(row["replacement"]), int(row["length"])
    code = replacements.bytes_at(source, int(row["replacement_length"]))
    place, origin = placed.address + int(row["offset"]), placed.address + source
    if len(code) == 5 and code[0] == CALL:
        code = branch(CALL, place, branch_target(code, origin))
    elif len(code) == 5 and code[0] == JMP32:
        target = branch_target(code, origin)
        short = target - place - 2
        # recompute_jump(): only forwards, and only where the short form reaches.
        if target >= place and short <= 127:
            code = bytes([JMP8, short & 0xFF]) + NOPS[2]
        else:
            code = branch(JMP32, place, target)
    return code + NOPS[0] * (length - len(code))


def _merge_nops(window: Window, row: np.void, *, replaced: bool) -> None:
    """optimize_nops(), at the places that the compiler has found."""
    first = int(row["first_run"])
    for run in window.placed.unit.sites.alternative_runs[first : first + int(row["runs"])]:
        offset, length = int(row["offset"]) + int(run["start"]), int(run["length"])
        same = bool(run["replaced"]) == replaced
        if same and window.bytes_at(offset, length) == NOPS[0] * length:
            window.put(offset, nops(length))


def patch_locks(window: Window, state: PatchState, text: tuple[int, int]) -> None:
    """alternatives_smp_unlock(): no lock prefixes on one processor, in the unit's own text."""
    if not state.uniprocessor:
        return
    offsets = window.offsets(window.placed.unit.sites.locks, 1)
    offsets = offsets[(offsets >= text[0]) & (offsets < text[1])] - window.start
    locked = offsets[window.data[offsets] == LOCK]
    window.data[locked] = DS_PREFIX


def patch_mcount(window: Window) -> None:
    """ftrace_init(): no function is traced."""
    window.put_all(window.offsets(window.placed.unit.sites.mcount, 5), NOP5)


def patch_jump_labels(window: Window, enabled: NDArray[np.bool_], rows: Column) -> None:
    """arch_jump_label_transform(); `enabled` (n,): whether the key of each row is."""
    jumps = enabled != (rows["branch"] != 0)
    offsets, targets = rows["offset"].astype(np.int64), rows["target"].astype(np.int64)
    long = rows["length"] == 5
    window.put_all(offsets[long & ~jumps], NOP5)
    window.put_all(offsets[~long & ~jumps], NOPS[1])
    far = long & jumps
    address = np.uint64(window.placed.address)
    window.put_branches(offsets[far], JMP32, address + targets[far].astype(np.uint64))
    near = ~long & jumps
    at = offsets[near] - window.start
    window.data[at] = JMP8
    window.data[at + 1] = (targets[near] - offsets[near] - 2).astype(np.uint8)


def patch_static_calls(window: Window, functions: U64, rows: Column, state: PatchState) -> None:
    """__static_call_transform() of call sites; `functions` (n,): what the keys hold, 0 for none."""
    offsets = rows["offset"].astype(np.int64)
    none, tail, conditional = functions == 0, rows["tail"] != 0, rows["length"] == 6
    zero = functions == np.uint64(state.static_call_return0)
    plain = ~tail & ~conditional
    window.put_all(offsets[plain & none], NOP5)
    window.put_all(offsets[plain & zero], RETURN_ZERO)
    called = plain & ~none & ~zero
    window.put_branches(offsets[called], CALL, functions[called])
    jumped = tail & ~conditional & ~none
    window.put_branches(offsets[jumped], JMP32, functions[jumped])
    put_returns(window, offsets[tail & ~conditional & none], state)
    # 0f 8x and a displacement: the condition stays.
    targets = functions.copy()
    end = state.return_thunk if state.has(RETHUNK) else state.static_call_return
    targets[none] = end
    at = offsets[conditional]
    opcodes = window.data[at + 1 - window.start].copy()
    window.put_branches(at + 1, opcodes, targets[conditional])


def patch_trampolines(window: Window, functions: U64, rows: Column, state: PatchState) -> None:
    """__static_call_transform() of trampolines: a jump, or a return for no function."""
    offsets = rows["offset"].astype(np.int64)
    window.put_branches(offsets[functions != 0], JMP32, functions[functions != 0])
    put_returns(window, offsets[functions == 0], state)
