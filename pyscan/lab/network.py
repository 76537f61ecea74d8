"""A peer on a guest's network that sees the frames which really arrive there.

`BridgePeer` listens on an interface of a process's network namespace (packet(7), setns(2)).
`DatagramPeer` is the other end of QEMU's `-netdev socket,udp=...`, one frame a datagram
(QEMU net/socket.c), and needs no privilege.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import threading
from time import monotonic
from typing import Final, Self

from pyscan.errors import LabError

#: linux/if_ether.h and linux/sched.h.
_ETH_P_ALL: Final = 0x0003
_CLONE_NEWNET: Final = 0x4000_0000
_FRAME_BYTES_MAX: Final = 65536
_LOOPBACK: Final = "127.0.0.1"


class Peer:
    """Receives Ethernet frames; leaving the context stops it."""

    def __init__(self, receiver: socket.socket) -> None:
        receiver.setblocking(False)
        self._receiver = receiver

    def frames(self, sender: str, seconds: float, enough: int = 0) -> int:
        """How many frames from a MAC address arrive from now on.

        Ends after `seconds`, or at once when there are `enough`.
        """
        self._forget()
        wanted = bytes.fromhex(sender.replace(":", ""))
        count, deadline = 0, monotonic() + seconds
        while (left := deadline - monotonic()) > 0:
            if select.select([self._receiver], [], [], left)[0]:
                frame = self._receiver.recv(_FRAME_BYTES_MAX)
                count += frame[6:12] == wanted
                if enough and count >= enough:
                    break
        return count

    def _forget(self) -> None:
        while select.select([self._receiver], [], [], 0)[0]:
            self._receiver.recv(_FRAME_BYTES_MAX)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._receiver.close()


class BridgePeer(Peer):
    """Everything on one interface of another network namespace."""

    def __init__(self, pid: int, interface: str) -> None:
        """Listen in the namespace of process `pid`. Raises LabError."""
        problem: list[OSError] = []
        opened: list[socket.socket] = []

        def enter() -> None:
            # A thread of its own: the others stay in the namespace that they are in.
            try:
                descriptor = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    libc = ctypes.CDLL(None, use_errno=True)
                    if libc.setns(descriptor, _CLONE_NEWNET):
                        number = ctypes.get_errno()
                        raise OSError(number, os.strerror(number))
                finally:
                    os.close(descriptor)
                opened.append(
                    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
                )
                opened[0].bind((interface, _ETH_P_ALL))
            except OSError as error:
                problem.append(error)

        thread = threading.Thread(target=enter, name="network-namespace")
        thread.start()
        thread.join()
        if problem:
            for receiver in opened:
                receiver.close()
            raise LabError(f"cannot listen on {interface} of process {pid}: {problem[0]}")
        super().__init__(opened[0])


class DatagramPeer(Peer):
    """The other end of a QEMU network backend over UDP on the loopback interface."""

    def __init__(self) -> None:
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        receiver.bind((_LOOPBACK, 0))
        # QEMU's end needs an address of its own; one that was free just now.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind((_LOOPBACK, 0))
            self.backend: dict[str, str | int | bool] = {
                "type": "socket",
                "udp": f"{_LOOPBACK}:{receiver.getsockname()[1]}",
                "localaddr": f"{_LOOPBACK}:{other.getsockname()[1]}",
            }
        super().__init__(receiver)

    def netdev(self, name: str) -> str:
        """The backend as an argument of `-netdev`."""
        pairs = ",".join(f"{key}={value}" for key, value in self.backend.items() if key != "type")
        return f"socket,id={name},{pairs}"
