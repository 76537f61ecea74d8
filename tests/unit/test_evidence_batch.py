"""Several records of evidence at once: one wait for the disk, the same chain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pyscan.errors import EvidenceError, InternalError
from pyscan.evidence import EvidenceLog, verify_directory
from pyscan.keys import SigningKey

KEY = SigningKey.generate()


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EvidenceLog]:
    with EvidenceLog.open(tmp_path, KEY, "ctl-1") as log:
        yield log


def records(path: Path) -> int:
    [summary] = verify_directory(path).logs
    return summary.records


def test_a_batch_is_records_like_any_other(log: EvidenceLog, tmp_path: Path) -> None:
    log.append("note", {"n": 0})
    log.append_all(("note", {"n": n}) for n in range(1, 50))
    log.append_all([])
    log.append("note", {"n": 50})
    log.close()
    assert records(tmp_path) == 53  # opened, 51 notes, closed
    with EvidenceLog.open(tmp_path, KEY, "ctl-1") as again:
        again.append_all([("note", {"n": 51})])
    assert records(tmp_path) == 56


@pytest.mark.parametrize("bad", [("blob", {}), ("No Kind", {}), ("verdict", {"id": "x"})])
def test_one_that_must_not_be_written_keeps_all_out(
    log: EvidenceLog, tmp_path: Path, bad: tuple[str, dict[str, object]]
) -> None:
    with pytest.raises(InternalError):
        log.append_all([("note", {}), bad])
    log.append("note", {})
    log.close()
    assert records(tmp_path) == 3


def test_after_one_that_cannot_be_written_the_log_takes_nothing(
    log: EvidenceLog, tmp_path: Path
) -> None:
    with pytest.raises(InternalError):
        log.append_all([("note", {}), ("note", {"huge": b"x" * (2 << 20)})])
    with pytest.raises(EvidenceError, match="restart the program"):
        log.append("note", {})
    with EvidenceLog.open(tmp_path, KEY, "ctl-1"):
        pass
    assert records(tmp_path) == 3  # opened, recovered, closed: nothing of the batch
