"""The guest's kernel, approved by its package through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from operator_shell import Operator


@pytest.fixture(scope="session")
def operator(guest_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Operator:
    """An operator who has approved the guest's kernel by its package."""
    directory = tmp_path_factory.mktemp("operator")
    operator = Operator(directory / "home", directory / "cloud.approved")
    (package,) = guest_dir.glob("linux-image-*.deb")
    done = operator.run("approve", "linux", package, "--out", operator.approved)
    assert done.returncode == 0
    return operator
