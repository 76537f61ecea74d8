"""Choosing a backend and a form: explicit, and refused with a reason."""

import sys

import pytest

from pyscan.digest import open_digester
from pyscan.digest._native import FORM_VARIABLE, available_forms
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


@pytest.mark.parametrize("form", ["", "auto", "avx1024"])
def test_an_unknown_form_is_refused(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORM_VARIABLE, form)
    with pytest.raises(UsageError, match=r"PYSCAN_FORM=.*use one of: portable"):
        open_digester("native")


def test_numba_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "pyscan.digest._numba", raising=False)
    with pytest.raises(UsageError, match=r"pyscan\[numba\]"):
        open_digester("numba")
