/* The card's own PCI bus, by ECAM (PCI Express base specification, 7.2.2; the header is that of PCI
 * local bus 3.0, 6.1). Nothing has placed the BARs: there is no firmware below this one. */
#include "board.h"

enum {
    ID = 0x00,
    COMMAND = 0x04,
    COMMAND_MEMORY = 2,
    BAR2 = 0x18,
    BAR_KIND_MASK = 7,
    BAR_MEMORY_64 = 4,
    BAR_FLAGS = 15,
    DEVICES_MAX = 32
};

#define IVSHMEM_PLAIN UINT32_C(0x11101af4) /* device, vendor */

static volatile uint32_t *config(const pci_bus *bus, uint32_t device, uint32_t offset)
{
    return (volatile uint32_t *)(bus->ecam + ((uint64_t)device << 15) + offset);
}

bool pci_init(pci_bus *bus, const board_machine *machine)
{
    *bus = (pci_bus){.ecam = machine->ecam,
                     .next = machine->window,
                     .end = machine->window + machine->window_size};
    return machine->ecam != 0 && machine->ecam_size >= (uint64_t)DEVICES_MAX << 15 &&
           machine->window != 0 && bus->end > bus->next;
}

/* Bytes of a 64-bit BAR: those of its bits that can be written. 0 when it is none. */
static uint64_t size_bar(volatile uint32_t *bar)
{
    if ((bar[0] & BAR_KIND_MASK) != BAR_MEMORY_64) {
        return 0;
    }
    bar[0] = UINT32_MAX;
    bar[1] = UINT32_MAX;
    uint64_t mask = (uint64_t)bar[1] << 32 | (bar[0] & ~(uint32_t)BAR_FLAGS);
    return ~mask + 1;
}

bool pci_take_memory(pci_bus *bus, uint32_t device, pci_memory *memory)
{
    volatile uint32_t *command = config(bus, device, COMMAND), *bar = config(bus, device, BAR2);
    *memory = (pci_memory){0};
    if (*config(bus, device, ID) == UINT32_MAX) {
        return true;
    }
    if (*config(bus, device, ID) != IVSHMEM_PLAIN) {
        return false;
    }
    uint64_t size = size_bar(bar), room = bus->end - bus->next;
    if (size < BOARD_PAGE || (size & (size - 1)) != 0 || size > room) {
        return false;
    }
    uint64_t place = (bus->next + size - 1) & ~(size - 1);
    if (place > bus->end - size) {
        return false;
    }
    bar[0] = (uint32_t)place;
    bar[1] = (uint32_t)(place >> 32);
    *command = (*command & 0xffff) | COMMAND_MEMORY;
    bus->next = place + size;
    *memory = (pci_memory){.memory = (uint8_t *)place, .size = size};
    return true;
}
