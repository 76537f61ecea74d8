/* What the firmware's core needs of the machine it runs on.
 *
 * Core code calls nothing else: no libc, no registers. A board fills in the structure; sim/ does so
 * on the host, with faults. No callback blocks longer than a few milliseconds, and none is
 * called by two threads.
 */
#ifndef PS_HAL_H
#define PS_HAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    PS_HAL_GATHER_MAX = 512, /* pages of one gather at most, whatever the engine may claim */
    PS_HAL_BUFFERS_MAX = 2
};

/* How a gather stands. */
typedef enum {
    PS_HAL_DONE = 0,
    PS_HAL_BUSY = 1,      /* under way */
    PS_HAL_REFUSED = 2,   /* the engine says that at least one page was not delivered */
    PS_HAL_BLOCKED = 3,   /* the bus refuses the engine its own queues */
    PS_HAL_LINK_DOWN = 4, /* the engine is out of reach */
    PS_HAL_TIMEOUT = 5,   /* the engine does not answer */
    PS_HAL_MISUSED = 6    /* a broken limit; a defect of the core */
} ps_hal_state;

typedef struct {
    uint32_t engine;            /* ps_link_engine */
    uint32_t gather_max;        /* pages of one gather, 1 .. PS_HAL_GATHER_MAX */
    uint32_t buffers;           /* landing buffers, 1 .. PS_HAL_BUFFERS_MAX */
    uint32_t gather_timeout_us; /* without progress, after which `gather_poll` says PS_HAL_TIMEOUT by
                                   itself; four times that in all */
    uint64_t window_size;       /* bytes; 0 without a window */
} ps_hal_limits;

typedef struct {
    void *context; /* given to every callback */
    ps_hal_limits limits;

    /* The mailbox, PS_LINK_MAILBOX_SIZE bytes, shared with the host. */
    uint8_t *mailbox;

    /* Microseconds since the start; never goes back. */
    uint64_t (*now_us)(void *context);

    /* Sleeps at most `us` microseconds. */
    void (*idle)(void *context, uint32_t us);

    /* 32 bytes that nobody else knows, new at every call; false when there are none. */
    bool (*entropy)(void *context, uint8_t seed[32]);

    /* One line of log, without its end. */
    void (*log)(void *context, const char *line);

    /* The loop has made a turn: keeps the watchdog quiet. */
    void (*kick)(void *context);

    /* Begins to gather `count` (1 .. gather_max) pages at page-aligned physical `addresses` into
     * landing buffer `buffer`, one behind the other. The engine owns `addresses` until then.
     * PS_HAL_BUSY when it is under way, otherwise why it is not. */
    ps_hal_state (*gather_start)(void *context, uint32_t buffer, const uint64_t *addresses,
                                 uint32_t count);

    /* How the gather into `buffer` stands. Anything but PS_HAL_BUSY ends it; the engine is then
     * ready for the next one, started anew where it had to be. */
    ps_hal_state (*gather_poll)(void *context, uint32_t buffer);

    /* Landing buffer `buffer`, gather_max * 4096 bytes, aligned to pages. */
    uint8_t *(*landing)(void *context, uint32_t buffer);

    /* Times that the engine was started anew. */
    uint64_t (*engine_resets)(void *context);

    /* A page of the window at a byte offset below window_size; NULL without a window. */
    const uint8_t *(*window)(void *context, uint64_t offset);
} ps_hal;

#endif
