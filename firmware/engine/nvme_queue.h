/* What the files of the driver share; nothing here is for a board. */
#ifndef PS_NVME_QUEUE_H
#define PS_NVME_QUEUE_H

#include "engine/nvme.h"

/* Queues, and the lists: one page for each buffer. */
enum {
    PAGE = 4096,
    ENTRIES = PS_NVME_ENTRIES,
    ADMIN_ENTRIES = 16,
    ADMIN_SUBMISSIONS = 0x0000,
    ADMIN_COMPLETIONS = 0x1000,
    COMPLETIONS = 0x2000,
    SUBMISSIONS = COMPLETIONS + 16 * ENTRIES,
    LISTS = SUBMISSIONS + 64 * ENTRIES,
    QUEUES_SIZE = LISTS,
    COMMAND_WORDS = 8, /* of 64 bits */
    HEAD_LAG = 200     /* completions that are taken before the controller is told */
};

/* The half of a completion that matters, 4.6: submission queue, id, phase and status. */
typedef struct {
    uint32_t queue, id, phase, status;
} ps_nvme_completion;

static inline bool ps_nvme_awaited(const ps_nvme_gather *gather)
{
    return gather->used && gather->state == PS_HAL_BUSY;
}

/* Zeroes the queues. */
void ps_nvme_clear(const ps_nvme *nvme);

/* Writes a command, and reads a completion, at a place in engine memory. */
void ps_nvme_put_command(const ps_nvme *nvme, uint32_t at, const uint64_t command[COMMAND_WORDS]);
ps_nvme_completion ps_nvme_get_completion(const ps_nvme *nvme, uint32_t at);

/* An id for a command. */
uint16_t ps_nvme_next_id(ps_nvme *nvme);

/* Takes what the controller has completed, and puts what waits into the submission queue. */
void ps_nvme_trade(ps_nvme *nvme);

/* The controller begins with empty queues: what was under way is given again. */
void ps_nvme_forget(ps_nvme *nvme);

#endif
