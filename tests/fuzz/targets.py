"""What is fuzzed: one function for each format that comes from a hand we do not trust.

A harness takes any bytes. It returns, or raises what was raised, when pyscan breaks its
promise: only the error classes that are caught here may leave the code under test, and what
was accepted can be used. To add one, write a function here and give it @target with its
seeds; `python tests/fuzz/seeds.py` then writes tests/fuzz/corpus/NAME/. A finding that was
mended is kept there as found-WHAT, so that every run tries it first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fuzz.machine_targets import fuzz_attach, fuzz_validate, seeds_of
from fuzz.made_module import make_patched_module
from package_files import (
    LINK,
    BtfMaker,
    kernel_files,
    make_bzimage,
    make_deb,
    make_elf,
    make_kallsyms,
    make_module,
    make_tar,
)
from units import build_linux, build_unit, use_unit

from pyscan.approved import (
    LinuxApproved,
    Snapshot,
    load_approved,
    save_approved,
    save_linux,
)
from pyscan.approved.container import MAGIC
from pyscan.approved.encode import decode_unit, encode_unit
from pyscan.approved.envelope import CONTENT_TYPE, EXTERNAL_AAD
from pyscan.compile.module import compile_module
from pyscan.cose import decode_cbor, sign1
from pyscan.errors import ApprovedFileError, PackageError
from pyscan.kernel import KernelImage
from pyscan.kernel.series import SERIES
from pyscan.kernel.symbols import parse_kallsyms
from pyscan.kernel.types import Types
from pyscan.keys import KeyRing, SigningKey
from pyscan.package.bzimage import kernel_payload, module_file, relocation_lists
from pyscan.package.deb import open_package
from pyscan.package.elf import Elf
from pyscan.records import MemoryMap, MemoryRegion

Harness = Callable[[bytes], None]
Seeds = Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Target:
    """A harness with what makes its seed corpus: name of a file -> content."""

    run: Harness
    seeds: Callable[[], Seeds]


TARGETS: Final[dict[str, Target]] = {}


def target(seeds: Callable[[], Seeds]) -> Callable[[Harness], Harness]:
    """Declare `fuzz_NAME` as the harness of target NAME."""

    def declare(harness: Harness) -> Harness:
        TARGETS[harness.__name__.removeprefix("fuzz_")] = Target(harness, seeds)
        return harness

    return declare


@contextmanager
def file_of(data: bytes) -> Iterator[Path]:
    """A file in memory that holds `data`."""
    descriptor = os.memfd_create("fuzz")
    try:
        os.fchmod(descriptor, 0o600)
        with open(descriptor, "wb", closefd=False) as stream:
            stream.write(data)
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


# --- package ------------------------------------------------------------------------------


def elf_seeds() -> Seeds:
    return {"module": make_module(), "empty": make_elf()}


@target(elf_seeds)
def fuzz_elf(data: bytes) -> None:
    """ELF files: headers, contents, symbols, relocations."""
    with suppress(PackageError):
        elf = Elf(data)
        for section in elf.sections:
            assert len(elf.content(section)) <= len(data)
            with suppress(PackageError):
                elf.relocations(section)
        assert len(elf.symbols()) == len(elf.symbol_names())
        relocation_lists(data, elf.sections_end)


def bzimage_seeds() -> Seeds:
    return {
        form: make_bzimage(make_module(), form) for form in ("lz4", "xz", "zstd", "gzip", "plain")
    }


@target(bzimage_seeds)
def fuzz_bzimage(data: bytes) -> None:
    """Boot images, and the same bytes as compressed modules."""
    with suppress(PackageError):
        kernel_payload(data)
    for suffix in ("", ".xz", ".zst", ".gz"):
        with suppress(PackageError):
            module_file(f"a.ko{suffix}", data)


def deb_seeds() -> Seeds:
    tar = make_tar(*kernel_files())
    return {f"deb{suffix}": make_deb(tar, suffix) for suffix in ("", ".xz", ".zst", ".gz")}


@target(deb_seeds)
def fuzz_deb(data: bytes) -> None:
    """Debian packages, and the archives in them."""
    with suppress(PackageError), file_of(data) as path:
        package = open_package(path)
        assert package.release
        for module in package.modules():
            assert "/" not in module.name


# --- kernel -------------------------------------------------------------------------------


def symbols_seeds() -> Seeds:
    return {
        "old": make_kallsyms(),
        "new": make_kallsyms(new_order=True),
        "base-relative": make_kallsyms(absolute_percpu=False),
    }


@target(symbols_seeds)
def fuzz_symbols(data: bytes) -> None:
    """The tables of kallsyms in read-only data."""
    with suppress(PackageError):
        symbols = parse_kallsyms(data, LINK + 0x80_0000, LINK)
        assert len(symbols) == len(symbols.addresses) == len(symbols.kinds)
        for address in symbols.addresses[:16].tolist():
            assert symbols.at(address)
            assert symbols.find(symbols.names[0]) is not None


TYPE_PATHS: Final = ("module.name", "module.mem[3].base", "module.inner.deep", "task.next.module")


def types_seeds() -> Seeds:
    maker = BtfMaker()
    number = maker.add(1, "int", 4, body=bytes(4))
    inner = maker.struct("", 8, ("deep", number, 0), ("other", number, 32))
    array = maker.array(inner, 4)
    maker.struct("module", 72, ("name", number, 0), ("inner", inner, 64), ("mem", array, 128))
    maker.add(2, size=number)
    maker.add(8, "alias", size=number)
    return {"structs": maker.blob(), "empty": BtfMaker().blob()}


@target(types_seeds)
def fuzz_types(data: bytes) -> None:
    """BTF: layouts of types."""
    with suppress(PackageError):
        types = Types(data)
        for path in TYPE_PATHS:
            types.has(path)
            with suppress(PackageError):
                assert types.offset(path) >= 0
            with suppress(PackageError):
                assert types.size(path.split(".")[0]) >= 0
        with suppress(PackageError):
            types.enum("states")


# --- compiled modules ---------------------------------------------------------------------


def module_seeds() -> Seeds:
    return {**elf_seeds(), "patched": make_patched_module()}


@target(module_seeds)
def fuzz_module(data: bytes) -> None:
    """A module's file: refused, or compiled to a unit that can be written and used."""
    with suppress(PackageError):
        unit = compile_module("fuzz", data, SERIES["6.1"])
        use_unit(decode_unit(memoryview(encode_unit(unit))))


# --- approved configurations --------------------------------------------------------------

#: The same in every run, so that a finding can be repeated.
_KEY: Final = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(32)))
_RING: Final = KeyRing.of({"fuzz": _KEY.public})


def unit_seeds() -> Seeds:
    return {name: encode_unit(build_unit(name)) for name in ("vmlinux", "loop")}


@target(unit_seeds)
def fuzz_unit(data: bytes) -> None:
    """A unit's blob: refused, or usable without checks and the same when written again."""
    with suppress(ApprovedFileError):
        unit = decode_unit(memoryview(data))
        use_unit(unit)
        encode_unit(unit)


def approved_seeds() -> Seeds:
    """First byte: as it is, a signed payload, or a signed manifest with blobs behind it."""
    snapshot = Snapshot(
        created_ns=1,
        source="file:/ram",
        memory_map=MemoryMap.of([MemoryRegion(0, 8192)]),
        kernel=KernelImage(4096, 4, 0xFFFF_FFFF_8100_0000, 0, 8192),
        addresses=np.array([0xFFFF_FFFF_8100_0000], dtype=np.uint64),
        frames=np.array([1], dtype=np.uint64),
        flags=np.array([1], dtype=np.uint8),
        digests=np.zeros((1, 32), dtype=np.uint8),
    )
    with TemporaryDirectory() as directory:
        path = Path(directory) / "file"
        save_linux(build_linux(["loop"]), path, _KEY)
        linux = path.read_bytes()
        save_approved(snapshot, path, _KEY)
        message = path.read_bytes()
    start = int.from_bytes(linux[8:16], "little")
    manifest = _payload(linux[start:])
    manifest = b"\2" + len(manifest).to_bytes(4, "little") + manifest
    return {
        "raw": b"\0" + linux[:1024],
        "snapshot": b"\1" + _payload(message),
        "linux": manifest + linux[64:start],
        "linux-cut": manifest,
    }


def _payload(message: bytes) -> bytes:
    """What a COSE_Sign1 message says."""
    parts = decode_cbor(message[1:], len(message))
    assert isinstance(parts, list)
    payload = parts[2]
    assert isinstance(payload, bytes)
    return payload


@target(approved_seeds)
def fuzz_approved(data: bytes) -> None:
    """Files of approved configurations; most are signed, or nothing behind would be reached."""
    match data[:1]:
        case b"\1":
            data = _signed(data[1:])
        case b"\2":
            length = int.from_bytes(data[1:5], "little") % (1 << 20)
            message, blobs = _signed(data[5 : 5 + length]), data[5 + length :]
            start = 64 + len(blobs)
            head = MAGIC + start.to_bytes(8, "little") + len(message).to_bytes(8, "little")
            data = head.ljust(64, b"\0") + blobs + message
        case _:
            data = data[1:]
    with suppress(ApprovedFileError), file_of(data) as path:
        approved, approver = load_approved(path, _RING)
        assert approver == "fuzz"
        _use_approved(approved)


def _signed(payload: bytes) -> bytes:
    return sign1(payload, _KEY, CONTENT_TYPE, EXTERNAL_AAD)


def _use_approved(approved: Snapshot | LinuxApproved) -> None:
    if isinstance(approved, Snapshot):
        assert len(approved.frames) == approved.pages > 0
        return
    use_unit(approved.vmlinux)
    for name in approved.modules:
        use_unit(approved.modules[name])


# --- whole machines -----------------------------------------------------------------------

target(lambda: seeds_of(flag=False))(fuzz_attach)
target(lambda: seeds_of(flag=True))(fuzz_validate)
