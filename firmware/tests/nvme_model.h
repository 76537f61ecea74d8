/* A model of an NVMe controller, with faults, and a driver that has it. */
#ifndef PS_NVME_MODEL_H
#define PS_NVME_MODEL_H

#include <stdio.h>
#include <string.h>

#include "engine/nvme.h"

enum {
    PAGE = 4096,
    MEMORY_AT = 0x40000000, /* bus address of engine memory */
    GATHER_MAX = PS_HAL_GATHER_MAX,
    TIMEOUT_US = 500000,
    ENTRIES = PS_NVME_ENTRIES,
    HOLES_MAX = 4,
    LANDING_SIZE = PS_HAL_BUFFERS_MAX * GATHER_MAX * PAGE,
    COMPLETIONS = 0x2000, /* places of the queues and lists in engine memory */
    SUBMISSIONS = 0x6000,
    LISTS = 0x16000,
    LENGTH_INVALID = 0x400f, /* what QEMU says of zeros, with Do Not Retry */
    TRANSFER_ERROR = 0x4004
};

#define CHECK(condition) check((condition), #condition, __FILE__, __LINE__)
void check(bool holds, const char *condition, const char *file, int line);

extern int passed, failed; /* checks */

/* ---- the model ---- */

typedef struct {
    /* faults */
    bool down;             /* the link says so */
    bool mute;             /* the link answers nothing */
    bool ones;             /* registers read as ones */
    bool unreachable;      /* queues cannot be fetched: CSTS.CFS, as QEMU does it */
    bool silent_admin;     /* admin commands are swallowed, and CSTS stays well */
    bool silent;           /* gathers are swallowed */
    bool silent_proofs;    /* proofs are swallowed */
    bool stuck;            /* never gets ready */
    bool endless;          /* never gets disabled */
    uint32_t status;       /* of the next completions of gathers */
    uint32_t proof_status; /* of the next proofs, but for holes */
    uint32_t admin_status;
    uint64_t content[3];       /* first, second and last word of every page */
    uint64_t holes[HOLES_MAX]; /* addresses where nothing answers */
    uint64_t cap;
    uint64_t memory_at;

    uint8_t *memory;
    uint64_t *landing;
    uint64_t now_us;
    uint32_t generation;
    bool asked;
    ps_nvme_access access;
    uint32_t cc, csts, aqa;
    uint64_t asq, acq, isq, icq;
    uint32_t isq_size, icq_size;
    uint32_t asq_head, acq_tail, isq_head, icq_tail, icq_head;
    uint32_t acq_phase, icq_phase;

    /* what was seen */
    uint64_t commands, accesses, enabled;
    uint64_t first[8]; /* words of the gather fetched last */
    uint64_t gathered[GATHER_MAX];
    uint32_t gathered_count;
    uint64_t proven[GATHER_MAX]; /* addresses of the proofs fetched, as far as they fit */
    uint32_t proofs, proof_ids[GATHER_MAX];
} model;

extern model world;
extern ps_nvme nvme;
extern uint64_t pages[PS_HAL_BUFFERS_MAX][GATHER_MAX]; /* addresses, all different */

/* Completes a command of the I/O queues, as the controller does it. */
void complete_io(model *m, uint32_t id, uint32_t status);

/* Writes any completion anywhere, as others on the target's bus can. */
void complete(model *m, uint64_t queue, uint32_t slot, uint32_t phase, uint32_t sqid, uint32_t id,
              uint32_t status);

/* The controller forgets its queues. */
void reset(model *m);

/* A new model and a new driver, not started. */
void begin(void);

/* The end of a gather that was begun; a gather of the first `count` of `pages`. */
ps_hal_state finish(uint32_t buffer);
ps_hal_state gather(uint32_t buffer, uint32_t count);

/* A gather of two pages right after set-up: brings the engine up. */
void bring_up(void);

/* The engine works (again). */
void check_alive(void);

/* test_nvme_proofs.c */
void test_proofs(void);

#endif
