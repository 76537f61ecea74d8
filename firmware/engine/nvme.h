/* A stock NVMe controller as the engine that gathers pages (NVM Express base specification 1.4).
 *
 * Reading pages is a *Write* command of NVMe: the controller fetches `count` pages of the
 * target's memory by its PRP list and stores them on its drive, which is the card's landing
 * memory. Queues and lists lie in engine memory, which the target's bus sees too. So nothing in it
 * is believed: a completion counts only for a command that is under way, and only while that
 * command and its list are still what the driver wrote. Nor is a page of zeros believed: the
 * controller must prove that it can read it at all (nvme_queue.c, proofs).
 *
 * Nothing here waits. Each call makes at most one access to the bus and returns; the engine is
 * started when the first gather needs it, and again after whatever stopped it.
 */
#ifndef PS_NVME_H
#define PS_NVME_H

#include "hal.h"

enum {
    PS_NVME_MEMORY_SIZE = 0x18000, /* bytes of engine memory that the driver uses */
    PS_NVME_ENTRIES = 1024,        /* of the I/O queues */
    PS_NVME_BUS_SIZE = 0x2000      /* registers lie below; docs/spec/card-link.md, 7 */
};

/* One access to a register. */
typedef struct {
    bool write;
    uint32_t width;  /* 4 or 8 */
    uint32_t offset; /* below PS_NVME_BUS_SIZE */
    uint64_t value;  /* to write */
} ps_nvme_access;

typedef enum {
    PS_NVME_ACCESS_BUSY = 0,
    PS_NVME_ACCESS_DONE = 1,
    PS_NVME_ACCESS_DOWN = 2 /* the link is down */
} ps_nvme_access_state;

/* How an access stands; the rest counts only when it is done. */
typedef struct {
    ps_nvme_access_state state;
    uint64_t value;      /* read */
    uint64_t memory;     /* bus address of engine memory */
    uint32_t generation; /* changes when the link has come back */
} ps_nvme_reply;

/* What the driver stands on. */
typedef struct {
    void *context;    /* given to every callback */
    uint8_t *memory;  /* engine memory, PS_NVME_MEMORY_SIZE bytes, aligned to pages */
    const uint8_t *landing; /* landing memory, which is the controller's drive; aligned to pages */
    uint32_t buffers; /* 1 .. PS_HAL_BUFFERS_MAX; buffer b begins at page b * gather_max */
    uint32_t gather_max;        /* pages; 1 .. PS_HAL_GATHER_MAX */
    uint32_t gather_timeout_us; /* without a command of a gather completed */

    /* Microseconds; never goes back. */
    uint64_t (*now_us)(void *context);

    /* Begins an access. One that has not ended by then is abandoned. */
    void (*bus_start)(void *context, const ps_nvme_access *access);

    /* How the access begun last stands. */
    ps_nvme_reply (*bus_poll)(void *context);
} ps_nvme_port;

typedef struct {
    const uint64_t *addresses;
    uint64_t started_us;
    uint64_t moved_us; /* when it began, or a command of it was completed last */
    uint32_t count;
    uint32_t examined; /* pages that landed, and are known not to be zeros or given to proof */
    uint32_t proofs;   /* under way */
    ps_hal_state state;
    bool used;      /* begun, and its end not yet told */
    bool submitted; /* the controller has it, or will when it hears the bell */
    bool landed;    /* the controller says so */
    bool refused;   /* at least one page was not */
} ps_nvme_gather;

/* What stands in a slot of the submission queue. */
typedef struct {
    uint16_t id;
    uint32_t buffer;
    uint32_t page; /* of the buffer, with a proof */
    bool proof;
    bool used; /* not completed yet */
} ps_nvme_command;

typedef struct {
    ps_nvme_port port;
    ps_nvme_gather gathers[PS_HAL_BUFFERS_MAX];
    ps_nvme_command commands[PS_NVME_ENTRIES]; /* by their slot */
    const char *fault; /* what went wrong last, for the log; NULL: nothing ever did */
    uint64_t starts;   /* times that the engine was started */

    int step;           /* what it is doing */
    ps_hal_state cause; /* why it is being stopped */
    uint64_t memory;    /* bus address of engine memory */
    uint32_t generation;
    uint32_t stride; /* bytes between two doorbells */
    uint64_t stop_us; /* when it began to stop */
    bool accessing;    /* an access is under way */
    bool looking;      /* and it reads CSTS */
    uint64_t accessed_us;

    uint16_t last_id;
    uint32_t tail, tail_rung; /* of the submission queue */
    uint32_t head, head_rung; /* of the completion queue */
    uint32_t phase;           /* of the entries that are new */
} ps_nvme;

/* Touches neither bus nor memory. */
void ps_nvme_init(ps_nvme *nvme, const ps_nvme_port *port);

/* As `gather_start` and `gather_poll` of ps_hal. A gather that is polled ends when the controller
 * has completed nothing of it for `gather_timeout_us`, and at four times that at the latest, with
 * 600 ms more. Except with PS_HAL_LINK_DOWN the controller has then been told to stop, so that
 * nothing comes late into the buffer of a gather that failed as a whole. */
ps_hal_state ps_nvme_start(ps_nvme *nvme, uint32_t buffer, const uint64_t *addresses,
                           uint32_t count);
ps_hal_state ps_nvme_poll(ps_nvme *nvme, uint32_t buffer);

/* Times that the engine was started anew. */
uint64_t ps_nvme_resets(const ps_nvme *nvme);

#endif
