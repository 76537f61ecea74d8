"""A private PostgreSQL for tests: a directory and a socket in it, no port, no root."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from itertools import count
from pathlib import Path
from typing import Self

import psycopg

from pyscan.lab.process import Child

START_TIMEOUT_S = 30.0


class Postgres:
    """A running server; leaving the context ends it and removes its directory."""

    def __init__(self) -> None:
        """Make a cluster and start it, as the user `postgres` when we are root."""
        self.path = Path(tempfile.mkdtemp(prefix="pyscan-pg-", dir="/tmp"))
        self._numbers = count(1)
        self._as_user: list[str] = []
        if os.geteuid() == 0:  # which PostgreSQL refuses to be
            user = pwd.getpwnam("postgres")
            os.chown(self.path, user.pw_uid, user.pw_gid)
            self._as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}"]
            self._as_user += ["--clear-groups", "--pdeathsig", "KILL"]
        self._data = self.path / "data"
        initdb = [self._program("initdb"), "-D", self._data, "-U", "pyscan", "-A", "trust"]
        initdb += ["--no-sync", "--encoding=UTF8", "--locale=C"]
        subprocess.run([*self._as_user, *initdb], check=True, capture_output=True, cwd=self.path)
        self._child: Child | None = None
        self.start()

    def start(self) -> None:
        """Start, with what is there."""
        postgres = [self._program("postgres"), "-D", self._data, "-k", self.path]
        postgres += ["-c", "listen_addresses=", "-c", "fsync=off"]
        # In its directory, not in /dev/shm, where a crash would leave it behind.
        postgres += ["-c", "dynamic_shared_memory_type=mmap"]
        log = self.path / "log"
        self._child = Child("postgres", [*self._as_user, *map(str, postgres)], log)
        self._child.wait_until(self._answers, START_TIMEOUT_S, "its socket")

    def stop(self) -> None:
        """End it at once, as a crash would. Idempotent."""
        if self._child is not None:
            self._child.kill()
            self._child.close()
            self._child = None
            for left in (self._data / "postmaster.pid", *self.path.glob(".s.PGSQL*")):
                left.unlink(missing_ok=True)

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://pyscan@/{database}?host={self.path}"

    def create(self) -> str:
        """The URL of a new, empty database."""
        name = f"test_{next(self._numbers)}"
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self.url(name)

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url()).close()
        except psycopg.OperationalError:
            return False
        return True

    @staticmethod
    def _program(name: str) -> Path:
        found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
        assert found, "PostgreSQL is not installed: run `make setup`"
        return found[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._child.signal(signal.SIGINT)  # its "fast shutdown", which leaves nothing behind
            self._child.wait(START_TIMEOUT_S)
        self.stop()
        shutil.rmtree(self.path, ignore_errors=True)
