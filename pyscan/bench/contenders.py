"""Who runs: one row a contender. All do the same work, go over pages and count those that
are not as expected, except where the row says that nothing is checked.
"""

from __future__ import annotations

import hashlib
import importlib
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Final, Protocol

import numpy as np

from pyscan.bench import peers
from pyscan.bench.memory import Workload
from pyscan.bench.peers import Unavailable
from pyscan.digest import (
    DIGESTS,
    FORM_VARIABLE,
    Digester,
    DigestKey,
    available_forms,
    open_digester,
)
from pyscan.errors import InternalError, UsageError
from pyscan.records import PAGE_SIZE

#: Pages of a contiguous shape that a slow contender goes over in one pass, from a random
#: one on: far more than the caches hold.
WINDOW_PAGES: Final = (128 << 20) // PAGE_SIZE
#: Pages that LeechCore is asked for at a time; it is fastest from 256 on.
_LEECHCORE_PAGES: Final = 512

#: Passes of every reader before the fastest is taken for the limit.
_TRIES: Final = 7

#: Goes over pages `first` to `first + count - 1`; returns how many are not as expected.
Pass = Callable[[int, int], int]


class Make(Protocol):
    """Readies a contender for one workload. Raises Unavailable."""

    def __call__(self, work: Workload, threads: int, stack: ExitStack) -> Ready:
        """What is to be released is pushed on `stack`."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A contender that can run; `form` names the implementation that was chosen."""

    run: Pass
    form: str


@dataclass(frozen=True, slots=True)
class Contender:
    """One row of the table."""

    name: str
    about: str
    make: Make
    whole: bool = False  # goes over all of a contiguous shape in one pass
    checks: bool = True  # finds a page that was changed


def ready(contender: Contender, work: Workload, threads: int, stack: ExitStack) -> Ready:
    """Ready a contender and make sure that it does the work: it must find a changed byte."""
    made = contender.make(work, threads, stack)
    if contender.checks:
        _check_work(contender, made, work)
    return made


def _check_work(contender: Contender, made: Ready, work: Workload) -> None:
    first, count = 0, min(work.pages, 64)
    changed = work.starts[count // 2] + 1234
    before = made.run(first, count)
    work.memory.data[changed] ^= 0x20
    found = made.run(first, count)
    work.memory.data[changed] ^= 0x20
    if (before, found) != (0, 1):
        raise InternalError(
            f"contender {contender.name} saw {before} changed pages where none was and {found} "
            "where one was; its figures would be worthless"
        )


def _spread_over(run: Pass, threads: int, stack: ExitStack) -> Pass:
    """`run` on so many threads, each with its share of the pages."""
    if threads == 1:
        return run
    pool = stack.enter_context(ThreadPoolExecutor(threads))

    def all_threads(first: int, count: int) -> int:
        bounds = [first + count * part // threads for part in range(threads + 1)]
        lengths = [end - start for start, end in pairwise(bounds)]
        return sum(pool.map(run, bounds[:-1], lengths))

    return all_threads


# ---- ours ----


def _ours(
    work: Workload,
    threads: int,
    stack: ExitStack,
    *,
    backend: str = "native",
    digest: str = "sha256",
    form: str = "",
    batch_pages: int = 0,
) -> Ready:
    """One of our digests; `form` forces one, `batch_pages` cuts a pass into calls of that size."""
    digester = _open(backend, digest, threads, stack, form)
    data = work.memory.data.toreadonly()
    pages = np.frombuffer(data, dtype=np.uint8).reshape(-1, PAGE_SIZE)
    expected, _ = digester.hash_view(data, work.offsets, frames=work.frames)
    batch = batch_pages or work.pages

    def one(part: slice) -> int:
        frames = work.frames[part]
        if work.contiguous:
            return digester.compare_pages(pages[part], expected[part], frames=frames).mismatched
        return digester.compare_view(
            data, work.offsets[part], expected[part], frames=frames
        ).mismatched

    def run(first: int, count: int) -> int:
        end = first + count
        return sum(one(slice(at, min(at + batch, end))) for at in range(first, end, batch))

    return Ready(run, digester.form)


def _open(backend: str, digest: str, threads: int, stack: ExitStack, form: str = "") -> Digester:
    """A digester with a key of its own. Raises Unavailable where it cannot run."""
    before = os.environ.get(FORM_VARIABLE)
    try:
        if form:
            os.environ[FORM_VARIABLE] = form
        key = None
        if DIGESTS[digest].keyed:
            key = stack.enter_context(DigestKey.generate(digest))
        return open_digester(backend, digest, key, threads)
    except UsageError as error:
        raise Unavailable(str(error)) from error
    finally:
        os.environ.pop(FORM_VARIABLE, None)
        if before is not None:
            os.environ[FORM_VARIABLE] = before


# ---- what memory can give ----


def _pointer(module: Any, data: memoryview, work: Workload, first: int) -> tuple[Any, Any]:
    """Base and offsets of the pages from `first` on, as the functions of peers.py take them."""
    ffi = module.ffi
    base = ffi.from_buffer("uint8_t[]", data)
    if work.contiguous:
        return base + first * PAGE_SIZE, ffi.NULL
    return base, ffi.from_buffer("uint64_t[]", work.offsets) + first


def _read(work: Workload, threads: int, stack: ExitStack) -> Ready:
    """The fastest of several ways to read and do nothing else: the limit of every scan."""
    del stack
    module, data = peers.memory(), work.memory.data

    def reader(name: str) -> Pass:
        read = getattr(module.lib, f"peer_read_{name}")

        def run(first: int, count: int) -> int:
            read(*_pointer(module, data, work, first), count, threads)
            return 0

        return run

    name, run = _fastest({name: reader(name) for name in peers.READERS}, work.pages)
    return Ready(run, f"loads of {name[:2]} bytes, {name[3:]} pages at once")


def _fastest(passes: dict[str, Pass], pages: int) -> tuple[str, Pass]:
    """The pass with the least time of several, which take turns."""
    count = min(pages, WINDOW_PAGES)
    least: dict[str, int] = {}
    for _ in range(_TRIES):
        for name, run in passes.items():
            started = time.perf_counter_ns()
            run(0, count)
            spent = time.perf_counter_ns() - started
            least[name] = min(spent, least.get(name, spent))
    fastest = min(least, key=lambda name: least[name])
    return fastest, passes[fastest]


def _copy(work: Workload, threads: int, stack: ExitStack) -> Ready:
    del stack
    module, data = peers.memory(), work.memory.data
    target = module.ffi.from_buffer("uint8_t[]", np.zeros(work.pages * PAGE_SIZE, dtype=np.uint8))

    def run(first: int, count: int) -> int:
        pages, offsets = _pointer(module, data, work, first)
        module.lib.peer_copy(pages, offsets, count, threads, target + first * PAGE_SIZE)
        return 0

    return Ready(run, "libc")


def _compare_golden(work: Workload, threads: int, stack: ExitStack) -> Ready:
    del stack
    module, data = peers.memory(), work.memory.data
    golden = module.ffi.from_buffer("uint8_t[]", work.golden)

    def run(first: int, count: int) -> int:
        pages, offsets = _pointer(module, data, work, first)
        packed = golden + first * PAGE_SIZE
        return int(module.lib.peer_compare(pages, offsets, count, threads, packed))

    return Ready(run, "libc")


def _openssl(work: Workload, threads: int, stack: ExitStack) -> Ready:
    del stack
    module, data = peers.openssl(), work.memory.data
    digests = work.sha256
    expected = module.ffi.from_buffer("uint8_t[]", digests)

    def run(first: int, count: int) -> int:
        pages, offsets = _pointer(module, data, work, first)
        mine = expected + first * digests.shape[1]
        return int(module.lib.peer_evp_sha256(pages, offsets, count, threads, mine))

    return Ready(run, "EVP, one context")


# ---- others, page by page from Python ----

PageDigest = Callable[[memoryview], bytes]


def _sha256(page: memoryview) -> bytes:
    return hashlib.sha256(page).digest()


def _blake3() -> PageDigest:
    blake3: Any = _imported("blake3")
    return lambda page: bytes(blake3.blake3(page).digest())


def _xxh3() -> PageDigest:
    xxhash: Any = _imported("xxhash")
    return lambda page: bytes(xxhash.xxh3_128_digest(page))


def _mapped(
    work: Workload, threads: int, stack: ExitStack, *, load: Callable[[], PageDigest]
) -> Ready:
    """A digest from a library over the memory itself."""
    digest = load()
    return _page_loop(work, work.memory.data.toreadonly(), digest, threads, stack)


def _mmap(work: Workload, threads: int, stack: ExitStack) -> Ready:
    """hashlib over a mapping of the file that Python made."""
    with work.path.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return _page_loop(work, data, _sha256, threads, stack)


def _page_loop(
    work: Workload, data: memoryview, digest: PageDigest, threads: int, stack: ExitStack
) -> Ready:
    starts = work.starts
    expected = [digest(data[start : start + PAGE_SIZE]) for start in starts]

    def run(first: int, count: int) -> int:
        different = 0
        for index in range(first, first + count):
            start = starts[index]
            different += digest(data[start : start + PAGE_SIZE]) != expected[index]
        return different

    return Ready(_spread_over(run, threads, stack), "a page a call")


# ---- copied in ----


def _chunks(work: Workload, first: int, count: int, pages_max: int) -> Iterator[tuple[int, int]]:
    """Runs of pages that lie one behind the other, at most `pages_max` each: index and length."""
    start = first
    for index in range(first + 1, first + count + 1):
        ends = index == first + count or index - start == pages_max
        if ends or work.starts[index] != work.starts[index - 1] + PAGE_SIZE:
            yield start, index - start
            start = index


def _pread(work: Workload, threads: int, stack: ExitStack) -> Ready:
    """preadv(2) into a buffer that is used again, then hashlib."""
    descriptor = os.open(work.path, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    expected = [row.tobytes() for row in work.sha256]

    def run(first: int, count: int) -> int:
        buffer = memoryview(bytearray(work.chunk_pages * PAGE_SIZE))
        different = 0
        for start, length in _chunks(work, first, count, work.chunk_pages):
            os.preadv(descriptor, [buffer[: length * PAGE_SIZE]], work.starts[start])
            for i in range(length):
                page = buffer[i * PAGE_SIZE : (i + 1) * PAGE_SIZE]
                different += _sha256(page) != expected[start + i]
        return different

    return Ready(_spread_over(run, threads, stack), f"{work.chunk_pages} pages at a time")


def _pread_ours(work: Workload, threads: int, stack: ExitStack, *, digest: str) -> Ready:
    """preadv(2) into a buffer that is used again, then one of our digests."""
    digester = _open("native", digest, 1, stack)
    descriptor = os.open(work.path, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    data = work.memory.data.toreadonly()
    expected, _ = digester.hash_view(data, work.offsets, frames=work.frames)

    def run(first: int, count: int) -> int:
        buffer = np.zeros((work.chunk_pages, PAGE_SIZE), dtype=np.uint8)
        different = 0
        for start, length in _chunks(work, first, count, work.chunk_pages):
            os.preadv(descriptor, [buffer[:length].data], work.starts[start])
            part = slice(start, start + length)
            compared = digester.compare_pages(
                buffer[:length], expected[part], frames=work.frames[part]
            )
            different += compared.mismatched
        return different

    form = f"{digester.form}, {work.chunk_pages} pages at a time"
    return Ready(_spread_over(run, threads, stack), form)


def _leechcore(work: Workload, threads: int, stack: ExitStack, *, device: str) -> Ready:
    """LeechCore's scattered read, then hashlib; one handle a thread."""
    leechcorepyc: Any = _imported("leechcorepyc")
    name = device.format(path=work.path, name=work.path.name)
    expected = [row.tobytes() for row in work.sha256]
    handles = threading.local()

    def handle() -> Any:
        if not hasattr(handles, "open"):
            try:
                handles.open = leechcorepyc.LeechCore(name)
            except (OSError, RuntimeError, TypeError) as error:
                raise Unavailable(f"LeechCore does not open {name} ({error})") from error
        return handles.open

    def run(first: int, count: int) -> int:
        different = 0
        for start in range(first, first + count, _LEECHCORE_PAGES):
            end = min(start + _LEECHCORE_PAGES, first + count)
            pages = handle().read_scatter(work.starts[start:end])
            if len(pages) != end - start:
                raise InternalError(f"LeechCore dropped {end - start - len(pages)} pages")
            for index, page in enumerate(pages, start):
                different += _sha256(page["data"]) != expected[index]
        return different

    handle()
    return Ready(_spread_over(run, threads, stack), f"{_LEECHCORE_PAGES} pages at a time")


def _imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise Unavailable(f"{package} is not installed; install pyscan[bench]") from error


# ---- the table ----


def _row(name: str, about: str, make: Callable[..., Ready], **settings: Any) -> Contender:
    whole, checks = settings.pop("whole", False), settings.pop("checks", True)
    return Contender(name, about, partial(make, **settings), whole, checks)


#: The contender that all others have above them.
LIMIT: Final = "read-limit"
#: Sizes of call, in pages, at which the cost of a call is measured.
CALL_PAGES: Final = (1, 16, 256, 4096)

CONTENDERS: Final[tuple[Contender, ...]] = (
    _row("nh4aes", "ours, keyed, the default", _ours, digest="nh4aes", whole=True),
    _row("gf128aes", "ours, keyed", _ours, digest="gf128aes", whole=True),
    _row("sha256", "ours", _ours, whole=True),
    _row("numba-nh4aes", "ours, numba", _ours, backend="numba", digest="nh4aes", whole=True),
    _row(LIMIT, "reads only", _read, whole=True, checks=False),
    _row("memcpy", "copies only", _copy, whole=True, checks=False),
    _row("memcmp", "against a golden copy", _compare_golden, whole=True),
    _row("openssl-evp-sha256", "C, a page a call", _openssl),
    _row("hashlib-sha256", "Python", _mapped, load=lambda: _sha256),
    _row("blake3", "PyPI", _mapped, load=_blake3),
    _row("xxh3-128", "PyPI; no evidence of integrity", _mapped, load=_xxh3),
    _row("leechcore-file+sha256", "PyPI", _leechcore, device="file://{path}"),
    _row("leechcore-qemu+sha256", "PyPI", _leechcore, device="qemu://shm={name}"),
    _row("pread+sha256", "hashlib, copied in", _pread),
    _row("mmap+sha256", "hashlib, mapped", _mmap),
    _row("pread+nh4aes", "ours, copied in", _pread_ours, digest="nh4aes"),
)


def digest_variants() -> tuple[Contender, ...]:
    """Our digests once more: each form that this CPU has, and nh4aes by pages a call."""
    forms = [
        _row(f"{digest}[{form}]", "ours, forced form", _ours, digest=digest, form=form)
        for digest in DIGESTS
        for form in available_forms(digest)
    ]
    calls = [
        _row(f"nh4aes/{pages}", "ours, by the call", _ours, digest="nh4aes", batch_pages=pages)
        for pages in CALL_PAGES
    ]
    return (*forms, *calls)
