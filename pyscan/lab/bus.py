"""What a server with a monitoring card on its bus has beside pci-testdev.

The card's hand is an NVMe controller: a stock bus master whose *Write* command gathers
guest pages. Its queues lie in the card's own memory (the BAR of an ivshmem device), the
pages land in the file behind it. Doorbells are rung over QEMU's qtest socket
(pyscan/sources/nvme.py).

    bus = ServerBus(CardBus(iommu=True), run, "guest")
    command += bus.arguments()
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyscan.lab.process import RunDirectory
from pyscan.sources import build_uri

#: Where the functions sit; other devices take the lowest free slots, which end below these.
MEMORY_SLOT = "00:07.0"
EDU_SLOT = "00:08.0"
ENGINE_SLOT = "00:09.0"


@dataclass(frozen=True, slots=True)
class CardBus:
    """A card with a DMA engine. Sizes in MiB; `engine_mib` must be a power of two."""

    engine_mib: int = 1  # queues and PRP lists; with a card machine also its mailbox
    landing_mib: int = 4
    edu: bool = False
    iommu: bool = False  # the guest's kernel translates, and permits the card nothing


class ServerBus:
    """The files and sockets of a card on one server's bus; the files end with `run`."""

    def __init__(self, card: CardBus, run: RunDirectory, name: str) -> None:
        """Make the files. Raises LabError."""
        self.card = card
        self.qtest_socket = run.path / f"{name}-qtest"
        self.engine_memory = run.ram_file(f"{name}.card", card.engine_mib << 20)
        self.landing = run.ram_file(f"{name}.landing", card.landing_mib << 20)

    @property
    def kernel_append(self) -> str:
        """For the guest's command line: its own NVMe driver would claim the engine."""
        words = ["initcall_blacklist=nvme_init"]
        if self.card.iommu:
            words.append("intel_iommu=on")
        return " ".join(words)

    def arguments(self) -> list[str]:
        """QEMU's options, without the qtest socket's."""
        command = ["-device", "intel-iommu,intremap=off"] if self.card.iommu else []
        command += [
            "-object",
            f"memory-backend-file,id=card,size={self.card.engine_mib}M,share=on,"
            f"mem-path={comma_safe(self.engine_memory)}",
            *("-device", f"ivshmem-plain,memdev=card,addr={_address(MEMORY_SLOT)}"),
            "-blockdev",
            "driver=raw,node-name=landing0,file.driver=file,file.aio=threads,"
            f"file.filename={comma_safe(self.landing)}",
            "-device",
            # mdts=0: no limit to a command's length.
            f"nvme,drive=landing0,serial=CARD,mdts=0,addr={_address(ENGINE_SLOT)}",
        ]
        if self.card.edu:
            command += ["-device", f"edu,addr={_address(EDU_SLOT)},dma_mask=0xffffffffffffffff"]
        return command

    def nvme_uri(self, **layout: str) -> str:
        """URI of the server's memory through the engine; `layout` is machine and size, or map."""
        return build_uri(
            "nvme-dma",
            self.qtest_socket,
            memory=str(self.engine_memory),
            landing=str(self.landing),
            **layout,
        )

    def edu_uri(self, **layout: str) -> str:
        """URI of the server's memory through the edu device."""
        return build_uri("edu", self.qtest_socket, memory=str(self.engine_memory), **layout)


def qtest_arguments(socket: Path) -> list[str]:
    """QEMU's options for a qtest socket beside a running machine."""
    return ["-qtest", f"unix:{comma_safe(socket)},server=on,wait=off", "-qtest-log", "none"]


def comma_safe(path: Path) -> str:
    """A path for a QEMU option whose parts are separated by commas."""
    return str(path).replace(",", ",,")


def _address(slot: str) -> str:
    """The device and function of `slot`, as QEMU's addr= takes them."""
    return slot.partition(":")[2]
