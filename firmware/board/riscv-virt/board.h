/* What the files of this board share: QEMU's riscv64 machine "virt", hw/riscv/virt.c. */
#ifndef PS_BOARD_H
#define PS_BOARD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/nvme.h"
#include "hal.h"
#include "ps_link.h"

enum { BOARD_PAGE = 4096, BOARD_SEED_SIZE = 32 };

/* ---- fdt.c: the device tree, Devicetree specification 0.3, chapter 5 ---- */

/* What the board needs of it; addresses and sizes in bytes. */
typedef struct {
    uint64_t ecam, ecam_size;     /* configuration space of the card's PCI bus */
    uint64_t window, window_size; /* its 64-bit memory window */
    uint64_t uart;
    uint64_t clint;
    uint64_t finisher;
    uint64_t ram, ram_size;
    uint32_t timebase_hz;
    uint8_t *seed; /* BOARD_SEED_SIZE bytes in the tree, to be wiped; NULL: none */
} board_machine;

/* What it finds; a part that is not there is zero. False when `tree` is no device tree. */
bool fdt_read(board_machine *machine, uint8_t *tree);

/* ---- uart.c ---- */

void uart_init(uint64_t base);
void uart_line(const char *line);

/* ---- timer.c: the clock, sleep, and the watchdog ---- */

/* Starts the clock and the watchdog. False when the timebase is not whole microseconds. */
bool timer_init(const board_machine *machine);
uint64_t timer_us(void);
void timer_sleep(uint32_t us);
void timer_kick(void);

/* Why the board reset itself the last time, and at which instruction; told once. NULL when
 * it did not. */
const char *timer_last_words(uint64_t *address);

/* ---- entropy.c ---- */

/* Takes the seed and wipes it where it lies. */
void entropy_init(uint8_t *seed);
void entropy_draw(uint8_t seed[BOARD_SEED_SIZE]);

/* ---- pci.c ---- */

typedef struct {
    uint64_t ecam;
    uint64_t next, end; /* of the window: what is still free */
} pci_bus;

/* Memory of an ivshmem-plain device, docs/specs/ivshmem-spec.txt of QEMU. */
typedef struct {
    uint8_t *memory; /* NULL: there is no such device */
    uint64_t size;
} pci_memory;

/* The bus; false when the machine has none. */
bool pci_init(pci_bus *bus, const board_machine *machine);

/* Sizes, places and enables the memory of device `device`, function 0. False when there is a device
 * and it cannot be used. */
bool pci_take_memory(pci_bus *bus, uint32_t device, pci_memory *memory);

/* ---- bus.c: the emulated bus, docs/spec/card-link.md, 7 ---- */

typedef struct {
    volatile ps_link_bus_request *request;
    const volatile ps_link_bus_reply *reply;
    uint32_t sequence;
} link_bus;

/* `sequence` is random, so that no answer from before a restart fits. */
void bus_init(link_bus *bus, uint8_t *mailbox, uint32_t sequence);
void bus_begin(link_bus *bus, const ps_nvme_access *access);
ps_nvme_reply bus_answer(const link_bus *bus);

/* ---- board.c ---- */

/* Fills in `hal`; NULL, or what is wrong with this machine. */
const char *board_open(ps_hal *hal, uint8_t *tree);

/* What has newly gone wrong with the engine, or NULL. */
const char *board_news(void);

#endif
