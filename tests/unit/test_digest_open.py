"""Choosing a backend and a form: explicit, and refused with a reason."""

import sys

import pytest

from pyscan.digest import (
    DIGESTS,
    FORM_VARIABLE,
    THREADS_MAX,
    DigestKey,
    available_forms,
    open_digester,
)
from pyscan.errors import UsageError


def test_the_default_is_native_in_the_fastest_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FORM_VARIABLE, raising=False)
    digester = open_digester()
    assert digester.name == "native"
    assert digester.form == f"sha256/{available_forms('sha256')[-1]}"


def test_the_form_is_read_anew_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORM_VARIABLE, "portable")
    assert open_digester().form == "sha256/portable"
    monkeypatch.delenv(FORM_VARIABLE)
    assert open_digester().form == f"sha256/{available_forms('sha256')[-1]}"


@pytest.mark.parametrize("name", ["", "Native", "cuda"])
def test_an_unknown_backend_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="use native or numba"):
        open_digester(name)


@pytest.mark.parametrize("form", ["", "auto", "avx1024", "vpclmul"])
def test_an_unknown_form_is_refused(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORM_VARIABLE, form)
    with pytest.raises(UsageError, match=r"PYSCAN_FORM=.*use one of: portable"):
        open_digester("native")


def test_a_form_of_another_digest_names_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORM_VARIABLE, "portable")
    with DigestKey.generate("gf128aes") as key:
        forms = ", ".join(available_forms("gf128aes"))
        with pytest.raises(UsageError, match=f"use one of: {forms}"):
            open_digester("native", "gf128aes", key)


@pytest.mark.parametrize("backend", ["native", "numba"])
@pytest.mark.parametrize(
    ("digest", "of_key", "reason"),
    [
        ("nh4aes", None, "takes a key; give it a DigestKey"),
        ("nh4aes", "gf128aes", "a key of gf128aes was given"),
        ("sha256", "nh4aes", "takes no key; open it without one"),
    ],
)
def test_a_key_that_does_not_fit_is_refused(
    backend: str, digest: str, of_key: str | None, reason: str
) -> None:
    key = None if of_key is None else DigestKey.generate(of_key)
    with pytest.raises(UsageError, match=reason):
        open_digester(backend, digest, key)


@pytest.mark.parametrize("digest", ["", "md5", "NH4AES"])
def test_an_unknown_digest_is_refused(digest: str) -> None:
    with pytest.raises(UsageError, match=f"use one of: {', '.join(DIGESTS)}"):
        open_digester("native", digest)
    with pytest.raises(UsageError, match=f"use one of: {', '.join(DIGESTS)}"):
        available_forms(digest)


@pytest.mark.parametrize("threads", [-1, 0, THREADS_MAX + 1])
@pytest.mark.parametrize("backend", ["native", "numba"])
def test_a_number_of_threads_that_cannot_be_is_refused(backend: str, threads: int) -> None:
    with pytest.raises(UsageError, match=f"use 1 to {THREADS_MAX}"):
        open_digester(backend, threads=threads)


def test_numba_refuses_what_it_does_not_have() -> None:
    with DigestKey.generate("gf128aes") as key, pytest.raises(UsageError, match="use native"):
        open_digester("numba", "gf128aes", key)
    with pytest.raises(UsageError, match="use fewer"):
        open_digester("numba", threads=THREADS_MAX)


def test_numba_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "pyscan.digest._numba", raising=False)
    with pytest.raises(UsageError, match=r"pyscan\[numba\]"):
        open_digester("numba")
