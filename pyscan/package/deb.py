"""Kernel packages: a .deb (deb(5)), or a directory that one was unpacked into.

A package's release is in the path of its boot image or modules, one for the whole package:

    boot/vmlinuz-RELEASE
    lib/modules/RELEASE/.../NAME.ko[.gz|.xz|.zst]        or usr/lib/modules/...

Ubuntu and others keep the two in different packages. The archive is read whole, once, so
that what is parsed is what was digested; its content is streamed, one file at a time.
"""

from __future__ import annotations

import io
import os
import re
import stat
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Final, NamedTuple, Self

from pyscan.errors import PackageError
from pyscan.package.bzimage import MODULE_BYTES_MAX, is_module, module_file
from pyscan.package.compression import Compression, Progress, pieces

#: Bounds of what is read. The largest kernel packages have 0.3 GiB (1.5 GiB unpacked).
PACKAGE_BYTES_MAX: Final = 1 << 30
UNPACKED_BYTES_MAX: Final = 8 << 30
VMLINUZ_BYTES_MAX: Final = 256 << 20
FILES_MAX: Final = 100_000
_CONTROL_BYTES_MAX: Final = 16 << 20
_PATH_BYTES_MAX: Final = 1024

_AR_MAGIC: Final = b"!<arch>\n"
_AR_HEADER_BYTES: Final = 60
_AR_MEMBERS_MAX: Final = 16
_AR_HEADER: Final = re.compile(rb"(.{16})[0-9 ]{12}[0-9 ]{6}[0-9 ]{6}[0-7 ]{8}([0-9]{1,10}) *`\n")

_TAR_BLOCK: Final = 512

#: What a package may hold. dpkg takes neither pax headers nor sparse files.
_TAR_CONTENT: Final = (
    tarfile.REGTYPE,
    tarfile.AREGTYPE,
    tarfile.DIRTYPE,
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
)
_TAR_LONG: Final = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)

_SUFFIXES: Final = {
    "": Compression.NONE,
    ".gz": Compression.GZIP,
    ".xz": Compression.XZ,
    ".zst": Compression.ZSTD,
}

_RELEASE: Final = r"([0-9][A-Za-z0-9.+~_-]{0,63})"
_VMLINUZ_PATH: Final = re.compile(rf"boot/vmlinuz-{_RELEASE}", re.ASCII)
_MODULE_PATH: Final = re.compile(rf"(?:usr/)?lib/modules/{_RELEASE}/(?:.*/)?[^/]+", re.ASCII)

#: deb-control(5).
_FIELDS: Final = {
    "Package": re.compile(r"[a-z0-9][a-z0-9+.-]{1,127}", re.ASCII),
    "Version": re.compile(r"[0-9A-Za-z][0-9A-Za-z.+:~-]{0,127}", re.ASCII),
    "Architecture": re.compile(r"[a-z0-9][a-z0-9-]{0,31}", re.ASCII),
}


class ModuleFile(NamedTuple):
    """A module of a package.

    `path` is that in the package without the suffix of a compression, `data` the ELF file.
    """

    path: str
    data: bytes

    @property
    def name(self) -> str:
        """The module's name as the kernel has it, with underscores."""
        return _module_name(self.path)


class _File(NamedTuple):
    """A file of a package. `read` gives its content once, before the next file is asked for."""

    path: str
    read: Callable[[int], bytes]  # takes the most bytes allowed


_Files = Callable[[Progress | None], Iterator[_File]]


@dataclass(frozen=True, slots=True, eq=False)
class KernelPackage:
    """An opened package; `vmlinuz` is the boot image, None in a package of modules only.

    A directory without DEBIAN/control (as `dpkg-deb -R` makes it) has its own name for
    `name`, and empty `version` and `architecture`.
    """

    name: str
    version: str
    architecture: str
    sha256: str  # of the file; of the sorted lines "digest  path" of a directory's files
    release: str
    vmlinuz: bytes | None = field(repr=False)
    _files: _Files = field(repr=False)

    def modules(self, progress: Progress | None = None) -> Iterator[ModuleFile]:
        """All modules, read and decompressed one by one, in the package's order.

        `progress` is called with bytes of the package taken so far, and all. Raises
        PackageError: damaged, of several releases, two boot images, two modules of one name.
        """
        seen: set[str] = set()
        images = 0
        for file in self._files(progress):
            images += _VMLINUZ_PATH.fullmatch(file.path) is not None
            if images > 1:
                raise PackageError(f"{self.name}: it holds more than one boot image")
            if _release(file.path) not in (None, self.release):
                raise PackageError(
                    f"{self.name}: {file.path} is not of {self.release}; "
                    "take one kernel's package at a time"
                )
            if _MODULE_PATH.fullmatch(file.path) is None or not is_module(file.path):
                continue
            path = file.path[: file.path.rindex(".ko") + len(".ko")]
            if _module_name(path) in seen:
                raise PackageError(f"{self.name}: it holds more than one module like {path}")
            seen.add(_module_name(path))
            yield ModuleFile(path, module_file(file.path, file.read(MODULE_BYTES_MAX)))


def open_package(path: Path) -> KernelPackage:
    """Open a .deb, or a directory that one was unpacked into.

    Raises PackageError: not readable, no kernel package, damaged, or beyond the bounds.
    """
    try:
        if path.is_dir():
            return _open_directory(path)
        return _open_deb(path)
    except OSError as error:
        raise PackageError(f"{path}: cannot be read: {error.strerror}") from error


def _module_name(path: str) -> str:
    return path.rsplit("/", 1)[-1].removesuffix(".ko").replace("-", "_")


def _release(path: str) -> str | None:
    """The kernel release that a path speaks of."""
    found = _VMLINUZ_PATH.fullmatch(path) or _MODULE_PATH.fullmatch(path)
    return found[1] if found else None


def _find_kernel(files: Iterator[_File], what: str) -> tuple[str, bytes | None]:
    """Release and boot image. Stops at the image, which comes first in most packages."""
    release = None
    for file in files:
        release = release or _release(file.path)
        if _VMLINUZ_PATH.fullmatch(file.path):
            return _release(file.path) or "", file.read(VMLINUZ_BYTES_MAX)
    if release is None:
        raise PackageError(
            f"{what}: no kernel (boot/vmlinuz-*) and no modules (lib/modules/*) in it; "
            "take the package of the kernel image, not a meta package"
        )
    return release, None


# ---------------------------------------------------------------------------------- .deb


def _open_deb(path: Path) -> KernelPackage:
    data = _read_file(path, PACKAGE_BYTES_MAX)
    what = path.name
    control, content = _ar_members(data, what)
    fields = _control_fields(control, what)

    def files(progress: Progress | None = None) -> Iterator[_File]:
        return _tar_files(*content, what, UNPACKED_BYTES_MAX, progress)

    release, vmlinuz = _find_kernel(files(), what)
    return KernelPackage(
        name=fields["Package"],
        version=fields["Version"],
        architecture=fields["Architecture"],
        sha256=sha256(data).hexdigest(),
        release=release,
        vmlinuz=vmlinuz,
        _files=files,
    )


_Archive = tuple[memoryview, Compression]


def _ar_members(data: bytes, what: str) -> tuple[_Archive, _Archive]:
    """control.tar and data.tar of a package of format 2.0 (deb(5))."""
    found: dict[str, _Archive] = {}
    for name, content in _ar_entries(data, what):
        if not found and (name != "debian-binary" or bytes(content[:2]) != b"2."):
            break
        stem, tar, suffix = name.partition(".tar")
        key = stem + tar
        if suffix not in _SUFFIXES or key in found:
            break
        if not name.startswith("_"):
            found[key] = content, _SUFFIXES[suffix]
        if key == "data.tar":
            break
    if list(found) != ["debian-binary", "control.tar", "data.tar"]:
        raise PackageError(
            f"{what}: not a Debian package whose parts are known; "
            "get it again, or unpack it and pass the directory"
        )
    return found["control.tar"], found["data.tar"]


def _ar_entries(data: bytes, what: str) -> Iterator[tuple[str, memoryview]]:
    """Names and contents of an ar archive's members (ar(5), no long names)."""
    if not data.startswith(_AR_MAGIC):
        raise PackageError(f"{what}: neither a Debian package nor a directory")
    position = len(_AR_MAGIC)
    for _ in range(_AR_MEMBERS_MAX):
        if position >= len(data):
            return
        header = _AR_HEADER.fullmatch(data, position, position + _AR_HEADER_BYTES)
        start = position + _AR_HEADER_BYTES
        if header is None or start + int(header[2]) > len(data):
            raise PackageError(f"{what}: truncated or damaged; get the package again")
        end = start + int(header[2])
        name = header[1].decode("latin-1").rstrip(" ").removesuffix("/")
        yield name, memoryview(data)[start:end]
        position = end + end % 2


def _control_fields(archive: _Archive, what: str) -> dict[str, str]:
    for file in _tar_files(*archive, f"{what}: control.tar", _CONTROL_BYTES_MAX, None):
        if file.path == "control":
            return _parse_control(file.read(_CONTROL_BYTES_MAX), what)
    raise PackageError(f"{what}: it has no control file; get the package again")


def _parse_control(data: bytes, what: str) -> dict[str, str]:
    """The fields of _FIELDS in a control file (deb-control(5))."""
    fields: dict[str, str] = {}
    for line in data.decode("utf-8", "replace").splitlines():
        key, colon, value = line.partition(":")
        if colon and key in _FIELDS:
            if key in fields or _FIELDS[key].fullmatch(value.strip()) is None:
                raise PackageError(f"{what}: {key} in its control file is damaged")
            fields[key] = value.strip()
    if len(fields) != len(_FIELDS):
        raise PackageError(f"{what}: its control file lacks {', '.join(_FIELDS - fields.keys())}")
    return fields


class _TarDamageError(Exception):
    """What is wrong with a tar archive."""


class _Entry(tarfile.TarInfo):
    """A header that is strict: tarfile takes a damaged one for the end of the archive.

    It also reads headers of any length into memory.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Parse one block. Raises _TarDamageError; tarfile's own error at the archive's end."""
        if len(buf) != _TAR_BLOCK:
            raise _TarDamageError("it is truncated")
        if not any(buf):
            return super().frombuf(buf, encoding, errors)  # raises: the end of the archive
        try:
            entry = super().frombuf(buf, encoding, errors)
        except (tarfile.TarError, ValueError) as error:
            raise _TarDamageError("a header cannot be read") from error
        long = entry.type in _TAR_LONG and entry.size <= _PATH_BYTES_MAX
        if entry.size < 0 or not (long or entry.type in _TAR_CONTENT):
            raise _TarDamageError("it holds what no package holds")
        return entry


class _Pipe(io.RawIOBase):
    """What tarfile reads a stream from.

    It does not read on behind the end of a whole archive; of a file that is longer than the
    rest of the archive it would ask for all the blocks that are not there.
    """

    def __init__(self, source: Iterator[bytes]) -> None:
        super().__init__()
        self._source = source
        self._left = memoryview(b"")

    def read(self, size: int = -1, /) -> bytes:
        """`size` bytes, fewer at the end, all when negative. Raises _TarDamageError: none."""
        parts = []
        while size != 0:
            if not self._left:
                piece = next(self._source, None)
                if piece is None:
                    break
                self._left = memoryview(piece)
            taken = len(self._left) if size < 0 else min(size, len(self._left))
            parts.append(self._left[:taken])
            self._left = self._left[taken:]
            size -= taken if size > 0 else 0
        if not parts:
            raise _TarDamageError("it is truncated")
        return b"".join(parts)

    def drain(self) -> None:
        """Read on to the end, where the checksum is."""
        for _ in self._source:
            pass


def _tar_files(
    data: memoryview,
    compression: Compression,
    what: str,
    bytes_max: int,
    progress: Progress | None,
) -> Iterator[_File]:
    """The regular files of a compressed tar archive, in its order. Raises PackageError."""
    pipe = _Pipe(pieces(data, compression, what, bytes_max, progress))
    seen: set[str] = set()
    try:
        with tarfile.open(fileobj=pipe, mode="r|", tarinfo=_Entry, errors="surrogateescape") as tar:
            for number, entry in enumerate(tar):
                path = _checked_path(entry.name, what)
                if number >= FILES_MAX or path in seen:
                    raise PackageError(f"{what}: too many files, or {path} more than once")
                seen.add(path)
                if entry.isreg():
                    yield _File(path, _TarContent(tar, entry, f"{what}: {path}").read)
                elif _release_of_file(path):
                    raise PackageError(f"{what}: {path} is a link or a directory, not a file")
        pipe.drain()
    except (tarfile.TarError, _TarDamageError) as error:
        raise PackageError(f"{what}: the archive inside is damaged ({error})") from error


@dataclass(frozen=True, slots=True)
class _TarContent:
    """A file of a tar archive that is read now or never."""

    tar: tarfile.TarFile
    entry: tarfile.TarInfo
    what: str

    def read(self, bytes_max: int) -> bytes:
        """All of it. Raises PackageError."""
        if self.entry.size > bytes_max:
            raise PackageError(f"{self.what}: {self.entry.size} bytes; at most {bytes_max} allowed")
        try:
            stream = self.tar.extractfile(self.entry)
            return stream.read() if stream else b""
        except (tarfile.TarError, _TarDamageError) as error:
            raise PackageError(f"{self.what}: the archive inside is damaged ({error})") from error


def _release_of_file(path: str) -> bool:
    """Whether a path is one that a boot image or module has."""
    return _VMLINUZ_PATH.fullmatch(path) is not None or (
        _MODULE_PATH.fullmatch(path) is not None and is_module(path)
    )


def _checked_path(name: str, what: str) -> str:
    """A path relative to the package's root, without tricks."""
    path = name.removeprefix("./").removesuffix("/")
    if path in ("", "."):
        return "."
    steps = path.split("/")
    long = len(path) > _PATH_BYTES_MAX
    if long or {"", ".", ".."} & set(steps) or not path.isprintable():
        raise PackageError(f"{what}: {path[:80]!a} is no path of a package")
    return path


# ----------------------------------------------------------------------------- directory


def _open_directory(root: Path) -> KernelPackage:
    """A directory: its files are digested first, and must be the same when they are read."""
    digests = {path: _digest(root, path) for path in _directory_paths(root)}
    lines = sorted(f"{digest}  {path}\n" for path, digest in digests.items())

    def files(progress: Progress | None = None) -> Iterator[_File]:
        for done, path in enumerate(digests):
            if progress:
                progress(done, len(digests))
            yield _File(path, _DiskContent(root, path, digests[path]).read)

    release, vmlinuz = _find_kernel(files(), str(root))
    fields = _directory_fields(root)
    return KernelPackage(
        name=fields.get("Package") or root.resolve().name or "/",
        version=fields.get("Version", ""),
        architecture=fields.get("Architecture", ""),
        sha256=sha256("".join(lines).encode()).hexdigest(),
        release=release,
        vmlinuz=vmlinuz,
        _files=files,
    )


@dataclass(frozen=True, slots=True)
class _DiskContent:
    root: Path
    path: str
    digest: str

    def read(self, bytes_max: int) -> bytes:
        """The file, if it still is what was digested. Raises PackageError."""
        try:
            data = _read_file(self.root / self.path, bytes_max, os.O_NOFOLLOW)
        except OSError as error:
            raise PackageError(f"{self.path}: cannot be read: {error.strerror}") from error
        if sha256(data).hexdigest() != self.digest:
            raise PackageError(f"{self.path}: changed while it was read; try again")
        return data


def _digest(root: Path, path: str) -> str:
    limit = max(MODULE_BYTES_MAX, VMLINUZ_BYTES_MAX)
    return sha256(_read_file(root / path, limit, os.O_NOFOLLOW)).hexdigest()


def _directory_fields(root: Path) -> dict[str, str]:
    control = root / "DEBIAN" / "control"
    with suppress(FileNotFoundError):
        return _parse_control(_read_file(control, _CONTROL_BYTES_MAX), str(root))
    return {}


def _directory_paths(root: Path) -> list[str]:
    """Boot images and modules, sorted, the boot images first. Links are not followed.

    Raises OSError: a folder that cannot be read may hide modules.
    """
    found: list[str] = []
    count = 0
    for top in ("boot", "lib/modules", "usr/lib/modules"):
        steps = (root / top, *(root / parent for parent in Path(top).parents[:-1]))
        if any(step.is_symlink() for step in steps) or not steps[0].is_dir():
            continue  # with a merged /usr, lib is a link to usr/lib
        for folder, _, names in os.walk(root / top, onerror=_reraise):
            inside = Path(folder).relative_to(root).as_posix()
            count += 1 + len(names)
            if count > FILES_MAX:
                raise PackageError(f"{root}: more than {FILES_MAX} files; pass a package's own")
            found += [f"{inside}/{name}" for name in names]
    paths = [_checked_path(path, str(root)) for path in found if _release_of_file(path)]
    return sorted(paths, key=lambda path: (not path.startswith("boot/"), path))


def _reraise(error: OSError) -> None:
    raise error


def _read_file(path: Path, bytes_max: int, flags: int = 0) -> bytes:
    """All of a regular file. Raises OSError, and PackageError."""
    # O_NONBLOCK: a FIFO in the file's place must not hang the program.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    with open(handle, "rb") as stream:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise PackageError(f"{path}: not a regular file")
        data = stream.read(bytes_max + 1)
    if len(data) > bytes_max:
        raise PackageError(f"{path}: larger than {bytes_max} bytes")
    return data
