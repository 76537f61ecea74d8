"""Who owns the kernel's executable pages, and who may write what must not change.

The rules are those of a kernel with CONFIG_STRICT_KERNEL_RWX and CONFIG_STRICT_MODULE_RWX.
Executable and read-only memory has no writable alias at all: `set_memory_ro` changes the
pages' place in the direct map and in the image's mapping too (arch/x86/mm/pat/set_memory.c,
cpa_process_alias), whether it is called for the image (mark_rodata_ro), for a module or for
generated code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pyscan.records import PAGE_SHIFT, PAGE_SIZE, PageStatus
from pyscan.sources.base import is_ram
from pyscan.translate import EXECUTABLE, WRITABLE, Leaves
from pyscan.validate.context import Target
from pyscan.validate.memory import AccessFailed
from pyscan.validate.objects import MODULE_LIVE, BpfSymbol, LoadedModule, Structures
from pyscan.validate.problem import ProblemKind, Problems

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

#: enum ftrace_ops flags, include/linux/ftrace.h: it made its trampoline itself.
FTRACE_ALLOC_TRAMP: Final = 1 << 11

#: Orphaned runs of pages that are looked into, and their pages in all.
_RUNS_MAX: Final = 256
_ORPHANS_MAX: Final = 4096

#: Longest BPF code of one symbol, in bytes: BPF_MAXINSNS is 4096 for the unprivileged, and
#: one million for others (BPF_COMPLEXITY_LIMIT_INSNS); the JIT makes about 6 bytes of each.
_BPF_MAX: Final = 16 << 20

#: Largest module, in bytes; the largest of distributions are about 16 MiB.
_MODULE_MAX: Final = 64 << 20


class OwnerKind(StrEnum):
    """What an executable page is for."""

    VMLINUX = "vmlinux"
    MODULE = "module"
    MODULE_INIT = "module-init"  # of a module that is being loaded
    FTRACE = "ftrace-trampoline"
    KPROBE = "kprobe-slots"
    BPF = "bpf"
    REALMODE = "realmode"
    ITS = "its-thunks"
    HYPERCALL = "hypercall"  # Hyper-V's page, filled by the hypervisor


#: Kinds whose every byte is compared with what the package implies, here or by others. Of
#: the others `pyscan.validate.generated` counts what it could compare.
VERIFIED: Final = frozenset(
    {OwnerKind.VMLINUX, OwnerKind.MODULE, OwnerKind.REALMODE, OwnerKind.ITS}
)


@dataclass(frozen=True, slots=True)
class Owner:
    """Executable pages [start, end) and what they are for."""

    kind: OwnerKind
    start: int
    end: int
    name: str


#: The owner of an executable page by its address and content, when the content says so to
#: the last byte that can be executed.
Recognise = Callable[[Target, int, bytes], Owner | None]


@dataclass(frozen=True, slots=True)
class Ownership:
    """Executable bytes by what they are for."""

    owners: tuple[Owner, ...]
    bytes_by_kind: Mapping[OwnerKind, int]


@dataclass(frozen=True, slots=True)
class _Runs:
    """Disjoint ranges of page numbers, ascending: [start, end)."""

    start: I64
    end: I64

    def pages_below(self, page: I64) -> I64:
        """How many pages of the runs lie below each of `page`."""
        lengths = self.end - self.start
        before = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        row = np.searchsorted(self.start, page, side="right")
        inside = np.zeros(len(page), dtype=np.int64)
        some = row > 0
        last = row[some] - 1
        beyond = page[some] - self.end[last]
        inside[some] = before[row[some]] - np.maximum(0, -beyond)
        return inside

    def overlap(self, start: I64, end: I64) -> I64:
        """How many pages of the runs lie in each [start, end)."""
        return self.pages_below(end) - self.pages_below(start)

    def minus(self, other: _Runs) -> _Runs:
        """The parts of these runs that `other` does not cover."""
        points = np.concatenate([self.start, self.end, other.start, other.end])
        mine = np.repeat([1, -1, 0, 0], [len(self.start)] * 2 + [len(other.start)] * 2)
        theirs = np.repeat([0, 0, 1, -1], [len(self.start)] * 2 + [len(other.start)] * 2)
        order = np.argsort(points, kind="stable")
        points = points[order]
        bare = (np.cumsum(mine[order]) > 0) & (np.cumsum(theirs[order]) == 0)
        following = np.append(points[1:], points[-1:])
        kept = bare & (following > points)
        return _union(points[kept], following[kept])


def _union(start: I64, end: I64) -> _Runs:
    """Runs of ranges in any order; ranges that touch are joined."""
    order = np.argsort(start, kind="stable")
    start, end = start[order], end[order]
    reach = np.maximum.accumulate(end) if len(end) else end
    first = np.ones(len(start), dtype=bool)
    first[1:] = start[1:] > reach[:-1]
    last = np.ones(len(start), dtype=bool)
    last[:-1] = first[1:]
    return _Runs(start[first], reach[last])


def _virtual_runs(leaves: Leaves, kept: NDArray[np.bool_]) -> _Runs:
    """Runs of virtual page numbers of the leaves that are `kept`."""
    start = (leaves.address[kept] >> np.uint64(PAGE_SHIFT)).astype(np.int64)
    return _union(start, start + (leaves.size[kept] >> np.uint64(PAGE_SHIFT)).astype(np.int64))


def check_permissions(target: Target, problems: Problems) -> None:
    """W^X: no leaf of the kernel half is writable and executable."""
    leaves = target.memory.leaves
    both = np.uint8(WRITABLE | EXECUTABLE)
    runs = _virtual_runs(leaves, (leaves.flags & both) == both)
    kind = ProblemKind.WRITABLE_EXECUTABLE
    for address, pages in _addresses(runs, problems):
        text = f"{pages} pages can be written and executed"
        problems.add(kind, address, target.place(address), text)


def check_aliases(target: Target, problems: Problems) -> None:
    """No frame that holds code or read-only data can be written at another address.

    Protected are all executable leaves, read-only data of vmlinux (less its tail, which
    the kernel gives to the page allocator: free_kernel_image_pages), and of live modules.
    """
    leaves = target.memory.leaves
    protected = _protected_frames(target)
    writable = np.flatnonzero((leaves.flags & WRITABLE) != 0)
    start = (leaves.gpa[writable] >> np.uint64(PAGE_SHIFT)).astype(np.int64)
    end = start + (leaves.size[writable] >> np.uint64(PAGE_SHIFT)).astype(np.int64)
    shared = protected.overlap(start, end)
    rows = np.flatnonzero(shared)
    problems.total += max(0, len(rows) - _RUNS_MAX)
    for row in rows[:_RUNS_MAX].tolist():
        address = int(leaves.address[writable[row]])
        text = f"{int(shared[row])} protected pages from frame {int(start[row]):#x} on"
        problems.add(ProblemKind.WRITABLE_ALIAS, address, target.place(address), text)


def _protected_frames(target: Target) -> _Runs:
    """Runs of RAM frames that nobody may write."""
    leaves = target.memory.leaves
    code = (leaves.flags & EXECUTABLE) != 0
    code[code] = is_ram(target.memory.source.regions(), leaves.gpa[code] >> np.uint64(PAGE_SHIFT))
    first = (leaves.gpa[code] >> np.uint64(PAGE_SHIFT)).astype(np.int64)
    starts = [first]
    ends = [first + (leaves.size[code] >> np.uint64(PAGE_SHIFT)).astype(np.int64)]
    ranges = np.array(list(_read_only_ranges(target)), dtype=np.int64).reshape(-1, 2)
    for low, high in _each(_union(ranges[:, 0], ranges[:, 1])):
        frames, counts = _frames_behind(leaves, low, high)
        starts.append(frames)
        ends.append(frames + counts)
    return _union(np.concatenate(starts), np.concatenate(ends))


def _frames_behind(leaves: Leaves, first: int, end: int) -> tuple[I64, I64]:
    """Frames and page counts that the virtual pages [first, end) lead to, a pair a leaf."""
    pages = (leaves.address >> np.uint64(PAGE_SHIFT)).astype(np.int64)
    low = max(0, int(np.searchsorted(pages, first, side="right")) - 1)
    part = slice(low, int(np.searchsorted(pages, end)))
    start = np.maximum(pages[part], first)
    last = np.minimum(
        pages[part] + (leaves.size[part] >> np.uint64(PAGE_SHIFT)).astype(np.int64), end
    )
    frames = (leaves.gpa[part] >> np.uint64(PAGE_SHIFT)).astype(np.int64) + start - pages[part]
    kept = last > start
    return frames[kept], (last - start)[kept]


def _each(runs: _Runs) -> Iterator[tuple[int, int]]:
    yield from zip(runs.start.tolist(), runs.end.tolist(), strict=True)


def _read_only_ranges(target: Target) -> Iterator[tuple[int, int]]:
    """Virtual pages [first, end) of read-only data that is whole and in use."""
    if target.has("__start_rodata") and target.has("__end_rodata"):
        start, end = target.address("__start_rodata"), target.address("__end_rodata")
        yield start >> PAGE_SHIFT, end >> PAGE_SHIFT
    for module in target.modules:
        if module.state == MODULE_LIVE and _plausible(module):
            first = module.base >> PAGE_SHIFT
            yield first, first + (module.ro_size >> PAGE_SHIFT)


def _plausible(module: LoadedModule) -> bool:
    """Whether a module's layout can be: bounds what is read for it."""
    return module.ro_size <= module.size <= _MODULE_MAX and module.base % PAGE_SIZE == 0


def check_owners(
    target: Target,
    structures: Structures,
    owners: Iterable[Owner],
    recognise: Recognise,
    problems: Problems,
) -> Ownership:
    """Every executable page of the kernel half has an owner; code without is hidden code.

    `owners`: further ones that were found out otherwise, such as the real-mode trampoline.
    `recognise` is asked for pages that are on no list.
    """
    known = [*_owners(target, structures, problems), *owners]
    leaves = target.memory.leaves
    code = _virtual_runs(leaves, (leaves.flags & EXECUTABLE) != 0)
    orphans = code.minus(_owner_runs(known))
    recognised = tuple(_recognised(target, orphans, recognise))
    if recognised:
        known += recognised
        orphans = code.minus(_owner_runs(known))
    for address, pages in _addresses(orphans, problems):
        problems.add(
            ProblemKind.ORPHAN_CODE,
            address,
            target.place(address),
            f"{pages} executable pages belong to no listed module or known user",
        )
    counts = dict.fromkeys(OwnerKind, 0)
    for kind in OwnerKind:
        mine = _owner_runs([owner for owner in known if owner.kind is kind])
        counts[kind] = int(code.overlap(mine.start, mine.end).sum()) << PAGE_SHIFT
    return Ownership(tuple(known), counts)


def _owners(target: Target, structures: Structures, problems: Problems) -> Iterator[Owner]:
    """Owners that the kernel's own lists name."""
    yield Owner(OwnerKind.VMLINUX, target.virtual_base, target.address("_etext"), "vmlinux")
    for module in structures.modules:
        if _plausible(module):
            end = module.base + module.text_size
            yield Owner(OwnerKind.MODULE, module.base, end, module.name)
        if module.init_base and module.init_text_size <= _MODULE_MAX:
            end = module.init_base + module.init_text_size
            yield Owner(OwnerKind.MODULE_INIT, module.init_base, end, module.name)
    for ops in structures.ftrace:
        if ops.flags & FTRACE_ALLOC_TRAMP and ops.trampoline_size <= PAGE_SIZE:
            end = ops.trampoline + ops.trampoline_size
            yield Owner(OwnerKind.FTRACE, ops.trampoline, end, target.place(ops.func))
    for page in structures.slot_pages:
        yield Owner(OwnerKind.KPROBE, page.address, page.address + PAGE_SIZE, page.cache)
    for pack in structures.packs:
        yield Owner(OwnerKind.BPF, pack.start, pack.start + pack.size, "pack")
    for symbol in structures.bpf:
        yield from _bpf_owner(symbol, problems)
    yield from _hypercall_page(target)


def _bpf_owner(symbol: BpfSymbol, problems: Problems) -> Iterator[Owner]:
    if not symbol.start < symbol.end <= symbol.start + _BPF_MAX:
        length = symbol.end - symbol.start
        problems.add(
            ProblemKind.IMPLAUSIBLE, symbol.start, f"BPF {symbol.name}", f"{length} bytes long"
        )
        return
    yield Owner(OwnerKind.BPF, symbol.start, symbol.end, symbol.name)


def _hypercall_page(target: Target) -> Iterator[Owner]:
    """The page through which Hyper-V is called (arch/x86/hyperv/hv_init.c)."""
    if not target.has("hv_hypercall_pg"):
        return
    try:
        page = target.memory.u64(target.address("hv_hypercall_pg"))
    except AccessFailed:
        return  # it is reported where the page it lies on is compared
    if page:
        yield Owner(OwnerKind.HYPERCALL, page, page + PAGE_SIZE, "hv_hypercall_pg")


def _owner_runs(owners: Iterable[Owner]) -> _Runs:
    """Runs of the pages that owners touch. What cannot be an address is left out."""
    pairs = [
        (owner.start >> PAGE_SHIFT, (owner.end + PAGE_SIZE - 1) >> PAGE_SHIFT)
        for owner in owners
        if 0 <= owner.start < owner.end <= 1 << 64
    ]
    start = np.array([first for first, _ in pairs], dtype=np.int64)
    return _union(start, np.array([last for _, last in pairs], dtype=np.int64))


def _addresses(runs: _Runs, problems: Problems) -> Iterator[tuple[int, int]]:
    """Address and length in pages of each run; runs beyond the bound are only counted."""
    problems.total += max(0, len(runs.start) - _RUNS_MAX)
    for first, end in zip(
        runs.start[:_RUNS_MAX].tolist(), runs.end[:_RUNS_MAX].tolist(), strict=True
    ):
        yield first << PAGE_SHIFT, end - first


def _recognised(target: Target, orphans: _Runs, recognise: Recognise) -> Iterator[Owner]:
    """Owners of orphaned pages that their content tells."""
    lengths = orphans.end - orphans.start
    if lengths.sum() > _ORPHANS_MAX:
        return
    for first, length in zip(orphans.start.tolist(), lengths.tolist(), strict=True):
        steps = np.arange(first, first + length, dtype=np.uint64)
        pages, statuses = target.memory.read_pages(steps << np.uint64(PAGE_SHIFT))
        for page in np.flatnonzero(statuses == PageStatus.OK).tolist():
            owner = recognise(target, (first + page) << PAGE_SHIFT, pages[page].tobytes())
            if owner is not None:
                yield owner
