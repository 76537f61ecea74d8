/* A board that is none: the firmware's core on the host, with a file as the target's memory, an
 * engine that gathers pages out of it, and faults. One in a process: it wraps the functions by
 * which the core reads and writes the mailbox, as a bad bus would.
 */
#ifndef PS_SIM_H
#define PS_SIM_H

#include <stdio.h>

#include "core/card.h"

enum {
    SIM_FAULTS_MAX = 16,
    SIM_REGIONS_MAX = 64,
    SIM_CRASH_STATUS = 70, /* exit status */
    SIM_WATCHDOG_US = 2000000,
    SIM_TIMEOUT_US = 100000 /* of a gather */
};

typedef enum {
    SIM_LOST_DOORBELL = 0,
    SIM_LATE_COMPLETION,
    SIM_REFUSED_DMA,
    SIM_BLOCKED,
    SIM_STALE_COMPLETION,
    SIM_HALF_PAGE,
    SIM_LINK_DOWN,
    SIM_LINK_DOWN_MS,
    SIM_ENGINE_RESET,
    SIM_TORN_SUBMISSION,
    SIM_TORN_COMPLETION,
    SIM_HANG,
    SIM_CRASH,
    SIM_FAULT_KINDS
} sim_fault_kind;

/* KIND[:FIRST[:COUNT]]; what the two count hangs on the kind (sim_help()). */
typedef struct {
    sim_fault_kind kind;
    uint64_t first;
    uint64_t count;
    uint64_t since_us; /* since it has struck; 0: it has not */
    bool over;
} sim_fault;

/* A gather under way. */
typedef struct {
    bool active;
    bool looked_at; /* the first look finds it under way */
    bool late;      /* ended by its time limit, and yet to come */
    uint64_t number;
    uint64_t started_us;
    uint32_t count;
    uint64_t addresses[PS_HAL_GATHER_MAX];
} sim_flight;

typedef struct {
    ps_hal hal;
    ps_card card;

    int ram; /* file descriptor */
    uint64_t ram_size;
    const uint8_t *window; /* the same, mapped; NULL without */
    uint32_t regions_count;
    ps_link_region regions[SIM_REGIONS_MAX]; /* of the bus: address, length, offset in the file */

    uint8_t *landing[PS_HAL_BUFFERS_MAX];
    sim_flight flights[PS_HAL_BUFFERS_MAX];
    uint64_t gathers; /* started so far */
    uint64_t resets;

    uint32_t faults_count;
    sim_fault faults[SIM_FAULTS_MAX];
    uint64_t struck[SIM_FAULT_KINDS]; /* times */
    bool link_down;                   /* by hand */

    bool own_clock; /* time passes only when it is looked at */
    uint64_t clock_us;
    uint64_t epoch_us;
    uint64_t kicked_us;
    const uint8_t *secret; /* of the key; NULL: drawn */
    bool no_entropy;
    FILE *log; /* NULL: nowhere */
} sim;

/* Fills in everything but the maps and faults: an engine (ps_link_engine) over `ram`, a file that
 * is only read; false when memory cannot be had. The card is not started. */
bool sim_open(sim *board, uint32_t engine, int ram, uint64_t ram_size, uint8_t *mailbox);
void sim_close(sim *board);

/* Starts the card (anew): what was under way in the engine is lost. */
void sim_start(sim *board);

/* A turn of the loop, unless the card hangs: then its watchdog starts it anew in time. */
bool sim_turn(sim *board);

/* Adds "KIND[:FIRST[:COUNT]]" or "GPA:LENGTH:OFFSET"; false when it is none. */
bool sim_add_fault(sim *board, const char *text);
bool sim_add_region(sim *board, const char *text);

const char *sim_fault_name(sim_fault_kind kind);
void sim_help(FILE *to);

/* ---- between sim.c and faults.c ---- */

/* Whether gather `number` meets a fault of this kind, which is then counted. */
bool sim_gather_meets(sim *board, sim_fault_kind kind, uint64_t number);
bool sim_page_refused(sim *board, uint64_t address);
bool sim_link_is_down(sim *board, uint64_t number);
bool sim_hangs(sim *board);
uint64_t sim_now_us(void *board);

/* The simulation that entries of the mailbox belong to, for the bad bus. */
extern sim *sim_on_bus;

#endif
