"""The qtest client against peers that answer, lie, or say nothing."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_bus import serving

from pyscan.errors import SourceUnavailable
from pyscan.sources.qtest import (
    COMMANDS_MAX,
    LINE_BYTES_MAX,
    QtestClient,
    QtestTimeout,
    load,
    port_in,
    port_out,
    store,
)


def test_commands_are_written_as_qemu_reads_them() -> None:
    lines = [load(0xB000_0000, 4), store(16, 8, 255), port_in(0xCFC, 2), port_out(0xCF8, 4, 1)]
    assert lines == ["readl 0xb0000000", "writeq 0x10 0xff", "inw 0xcfc", "outl 0xcf8 0x1"]


def test_a_full_transaction_is_taken_by_qemu_at_once() -> None:
    longest = store((1 << 52) - 1, 8, (1 << 64) - 1)
    assert COMMANDS_MAX * (len(longest) + 1) <= 1024


def test_values_and_lines_about_interrupts(tmp_path: Path) -> None:
    heard = []

    def answer(line: str) -> str:
        heard.append(line.strip())
        if line.startswith("readq"):
            return "IRQ raise 3\nIRQ lower 3\nOK 0x00000000deadbeef\n"
        return "OK\n"

    with serving(tmp_path / "q", answer), QtestClient(tmp_path / "q") as client:
        assert client.load(0x1000, 8) == 0xDEAD_BEEF
        client.store(0x1000, 4, 7)
        assert client.transact([load(0, 8), store(0, 1, 0), load(8, 8)]) == [
            *(0xDEAD_BEEF, 0, 0xDEAD_BEEF)
        ]
        with pytest.raises(ValueError, match="at most"):
            client.transact([load(0, 1)] * (COMMANDS_MAX + 1))
    assert heard[1:3] == ["readq 0x1000", "writel 0x1000 0x7"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("FAIL Unknown command 'inb'\n", "is no answer to 'inb 0x80'"),
        ("OK 12\n", "not QEMU's qtest"),
        ("OK 0x\n", "not QEMU's qtest"),
        ("OK 0x1 0x2\n", "not QEMU's qtest"),
        ("OK 0x12345678123456789\n", "not QEMU's qtest"),
        ('{"QMP": {"version": {}}}\n', "check that this is the -qtest socket"),
        ("\0" * 10 + "\n", "not QEMU's qtest"),
        ("x" * (LINE_BYTES_MAX + 5000), "a line of more than"),
        ("IRQ raise 1\n" * 3000, "not QEMU's qtest"),
    ],
)
def test_a_peer_that_is_no_qtest(tmp_path: Path, answer: str, message: str) -> None:
    with serving(tmp_path / "q", lambda _line: answer):
        with pytest.raises(SourceUnavailable, match=message) as caught:
            QtestClient(tmp_path / "q", timeout_s=10)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("answer", ["", "OK", "IRQ raise 1\n"], ids=["none", "half", "others"])
def test_a_peer_that_does_not_answer(tmp_path: Path, answer: str) -> None:
    with (
        serving(tmp_path / "q", lambda _line: answer),
        pytest.raises(QtestTimeout, match=r"did not answer within 0\.1 s"),
    ):
        QtestClient(tmp_path / "q", timeout_s=0.1)


@pytest.mark.parametrize("kind", ["missing", "dead", "long"])
def test_no_peer(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("q" * (200 if kind == "long" else 1))
    if kind == "dead":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    with pytest.raises(SourceUnavailable, match="cannot reach QEMU") as caught:
        QtestClient(path)
    assert caught.value.exit_status == 3


def hang_up(after: int) -> Callable[[str], str]:
    """Answer so many lines, then close the connection."""
    left = [after]

    def answer(_line: str) -> str:
        left[0] -= 1
        if left[0] < 0:
            raise EOFError
        return "OK 0x1\n"

    return answer


def test_a_peer_that_goes(tmp_path: Path) -> None:
    with serving(tmp_path / "q", hang_up(2)):
        client = QtestClient(tmp_path / "q")
        assert client.load(0, 1) == 1
        with pytest.raises(SourceUnavailable, match="connection to QEMU lost"):
            client.load(0, 1)
        with pytest.raises(SourceUnavailable, match="closed"):
            client.load(0, 1)
        client.close()


def test_an_answer_that_comes_late_is_not_taken_for_another(tmp_path: Path) -> None:
    answers = iter(["OK\n", "", "OK 0x11\nOK 0x22\n"])
    with serving(tmp_path / "q", lambda _line: next(answers)):
        client = QtestClient(tmp_path / "q", timeout_s=0.1)
        with pytest.raises(QtestTimeout):
            client.load(0, 1)
        with pytest.raises(SourceUnavailable, match="closed"):
            client.load(0, 1)


def test_close_wakes_the_one_who_waits(tmp_path: Path) -> None:
    asked = threading.Event()
    answers = iter(["OK\n", ""])

    def answer(_line: str) -> str:
        text = next(answers)
        if not text:
            asked.set()
        return text

    errors = []
    with serving(tmp_path / "q", answer):
        client = QtestClient(tmp_path / "q", timeout_s=600)

        def ask() -> None:
            with pytest.raises(SourceUnavailable) as caught:
                client.load(0, 1)
            errors.append(caught.value)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        assert asked.wait(timeout=20)
        client.close()
        thread.join(timeout=20)
    assert len(errors) == 1


def test_threads_get_their_own_answers(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "q", lambda line: f"OK {line.split()[1]}\n"),
        QtestClient(tmp_path / "q", timeout_s=20) as client,
    ):
        wrong = []

        def ask(start: int) -> None:
            wrong.extend(n for n in range(start, start + 200) if client.load(n, 4) != n)

        threads = [threading.Thread(target=ask, args=(1000 * n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert wrong == []
