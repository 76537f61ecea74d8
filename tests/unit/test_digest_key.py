"""Digest keys: drawn anew, never shown, never copied, gone when closed."""

import copy
import gc
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from pyscan.digest import DigestKey, open_digester
from pyscan.errors import UsageError
from pyscan.records import PAGE_SIZE

PAGE = bytes(PAGE_SIZE)
FRAMES = np.zeros(1, dtype=np.uint64)
KEYED = ["nh4aes", "gf128aes"]


def digest_with(key: DigestKey) -> bytes:
    return open_digester("native", key.digest, key).hash_pages(PAGE, frames=FRAMES)[0].tobytes()


def locked_kib() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"VmLck:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize("digest", KEYED)
def test_every_generated_key_is_another(digest: str) -> None:
    keys = [DigestKey.generate(digest) for _ in range(8)]
    assert len({digest_with(key) for key in keys}) == 8


@pytest.mark.parametrize("digest", KEYED)
def test_a_key_shows_nothing_and_cannot_be_copied(digest: str) -> None:
    with DigestKey.from_secret(digest, b"S" * 32) as key:
        assert repr(key) == str(key) == f"<DigestKey of {digest}>"
        assert not hasattr(key, "__dict__")
        for take in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied or pickled"):
                take(key)


@pytest.mark.parametrize("digest", KEYED)
def test_a_closed_key_ends_its_digesters(digest: str) -> None:
    key = DigestKey.generate(digest)
    digester = open_digester("native", digest, key)
    digester.hash_pages(PAGE, frames=FRAMES)
    key.close()
    key.close()
    with pytest.raises(ValueError, match=r"^key: it is closed"):
        digester.hash_pages(PAGE, frames=FRAMES)
    with pytest.raises(ValueError, match=r"^key: it is closed"):
        open_digester("native", digest, key)


def test_a_key_lies_in_locked_memory_until_it_is_collected() -> None:
    gc.collect()
    before = locked_kib()
    key = DigestKey.generate("nh4aes")
    digester = open_digester("native", "nh4aes", key)
    assert locked_kib() == before + 8
    del key
    digester.hash_pages(PAGE, frames=FRAMES)
    assert locked_kib() == before + 8
    del digester
    assert locked_kib() == before


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_secret_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=r"^secret: "):
        DigestKey.from_secret("nh4aes", bytes(size))


@pytest.mark.parametrize(("digest", "reason"), [("sha256", "takes no key"), ("md5", "is unknown")])
def test_a_digest_without_a_key_has_none(digest: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        DigestKey.generate(digest)
