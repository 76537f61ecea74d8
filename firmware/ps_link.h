/* The link between the card's firmware and its host program: the mailbox, byte by byte.
 *
 * This is docs/spec/card-link.md in C. pyscan/sources/link.py is the other side, and a test holds
 * the two together. Both sides are little-endian. Neither trusts the other: each copies what the
 * other wrote before it looks at it, checks it, and takes no offset or length from it, since
 * every place in the mailbox follows from a sequence number.
 */
#ifndef PS_LINK_H
#define PS_LINK_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

enum {
    PS_LINK_VERSION = 1,
    PS_LINK_SLOTS = 16,            /* commands that can be under way */
    PS_LINK_PAGES_MAX = 4096,      /* frames of one DIGEST */
    PS_LINK_READ_MAX = 48,         /* frames of one READ */
    PS_LINK_REGIONS_MAX = 512,     /* regions of one MAP */
    PS_LINK_LOCAL_MAX = 1 << 20,   /* pages of one LOCAL */
    PS_LINK_RESULT_SIZE = 48,      /* bytes for a page: SHA-256, then the keyed digest */
    PS_LINK_LOG_SIZE = 8192
};

/* "PSCARD01" and "PSHOST01", little-endian. */
#define PS_LINK_CARD_MAGIC UINT64_C(0x3130445241435350)
#define PS_LINK_HOST_MAGIC UINT64_C(0x313054534F485350)

/* Where things lie in the mailbox; bytes. */
enum {
    PS_LINK_HOST_AT = 0x0000,        /* ps_link_host, written by the host */
    PS_LINK_CARD_AT = 0x1000,        /* ps_link_card, written by the card */
    PS_LINK_SUBMISSIONS_AT = 0x2000, /* PS_LINK_SLOTS ps_link_submission, by the host */
    PS_LINK_COMPLETIONS_AT = 0x3000, /* PS_LINK_SLOTS ps_link_completion, by the card */
    PS_LINK_BUS_REQUEST_AT = 0x4000, /* ps_link_bus_request, by the card; emulated cards only */
    PS_LINK_BUS_REPLY_AT = 0x5000,   /* ps_link_bus_reply, by the emulated link */
    PS_LINK_LOG_AT = 0x6000,         /* the last PS_LINK_LOG_SIZE bytes of log, by the card */
    PS_LINK_DATA_AT = 0x100000,      /* PS_LINK_SLOTS times PS_LINK_SLOT_SIZE */
    PS_LINK_SLOT_SIZE = 0x40000,
    PS_LINK_FRAMES_IN_SLOT = 0x00000,   /* arguments, by the host: frames or regions */
    PS_LINK_STATUSES_IN_SLOT = 0x08000, /* one byte a page, by the card */
    PS_LINK_RESULTS_IN_SLOT = 0x10000,  /* digests or pages, by the card */
    PS_LINK_MAILBOX_SIZE = 0x800000
};

typedef enum {
    PS_LINK_OP_NOP = 1,    /* nothing: measures the round trip */
    PS_LINK_OP_MAP = 2,    /* the target's memory map: `count` ps_link_region */
    PS_LINK_OP_DIGEST = 3, /* digests of `count` frames */
    PS_LINK_OP_READ = 4,   /* `count` whole pages, as evidence */
    PS_LINK_OP_LOCAL = 5   /* digests `count` pages of the card's own memory: a yardstick */
} ps_link_op;

/* Flags of a submission. */
enum {
    PS_LINK_RANGE = 1 /* frames are `first`, `first` + 1, ...; none are in the slot */
};

/* Digests wanted; results stand one behind the other a page, in this order. */
enum {
    PS_LINK_SHA256 = 1, /* 32 bytes */
    PS_LINK_NH4AES = 2  /* 16 bytes, under the card's key */
};

typedef enum {
    PS_LINK_OK = 0,           /* carried out; what became of each page is in its status */
    PS_LINK_TORN = 1,         /* the submission's check never fitted */
    PS_LINK_BAD_OP = 2,
    PS_LINK_BAD_COUNT = 3,
    PS_LINK_BAD_ARGUMENT = 4, /* kinds, flags, or a region that is none */
    PS_LINK_FAILED = 5        /* the card could not, and its log says why */
} ps_link_result;

/* What reads the target's memory. */
typedef enum {
    PS_LINK_ENGINE_NONE = 0,
    PS_LINK_ENGINE_DMA = 1,   /* a bus master gathers pages into the card's memory */
    PS_LINK_ENGINE_WINDOW = 2 /* the target's RAM is a window: no bus, no IOMMU in between */
} ps_link_engine;

typedef enum {
    PS_LINK_STATE_STARTING = 0,
    PS_LINK_STATE_READY = 1,
    PS_LINK_STATE_FAULT = 2 /* the host broke the protocol; a new session is awaited */
} ps_link_state;

/* The host's page. `session` is written last; a new one ends the session before it. */
typedef struct {
    uint64_t magic;
    uint32_t version;   /* that the host has chosen, within the card's bounds */
    uint32_t heartbeat; /* rises while the host lives */
    uint64_t session;   /* random; 0: none */
    uint32_t submitted; /* sequence number of the last submission */
    uint32_t reserved[9];
} ps_link_host;

/* The card's page. */
typedef struct {
    uint64_t magic; /* written last, once the card is up */
    uint32_t version_min;
    uint32_t version_max;
    uint64_t boot;      /* random; names the card's start, and so its key */
    uint64_t session;   /* that the card serves */
    uint64_t refused;   /* the last session that it would not serve */
    uint32_t completed; /* sequence number of the last completion */
    uint32_t heartbeat; /* rises while the card lives, in the midst of commands too */
    uint32_t state;     /* ps_link_state */
    uint32_t engine;    /* ps_link_engine */
    uint32_t log_end;   /* bytes ever logged; the next goes to log_end % PS_LINK_LOG_SIZE */
    uint32_t firmware;  /* version: major << 16 | minor */
    uint64_t pages;     /* pages read since the start */
    uint64_t unread;    /* pages asked for and not read */
    uint64_t torn;      /* submissions whose check did not fit */
    uint64_t resets;    /* times the engine was started anew */
    uint32_t reserved[8];
} ps_link_card;

/* A command. Sequence number n (1, 2, ...) is in slot (n - 1) % PS_LINK_SLOTS. */
typedef struct {
    uint32_t sequence;
    uint16_t op;
    uint16_t flags;
    uint32_t count;
    uint32_t kinds;
    uint64_t session;
    uint64_t first;
    uint32_t reserved[7];
    uint32_t check; /* CRC-32C of the 60 bytes before it */
} ps_link_submission;

/* Its answer, in the same slot. Answers come in the order of the commands. */
typedef struct {
    uint32_t sequence;
    uint16_t op;
    uint16_t result; /* ps_link_result */
    uint32_t count;  /* pages that have a status */
    uint32_t ok;     /* of them read */
    uint64_t session;
    uint64_t boot;
    uint32_t elapsed_us;
    uint32_t gathers; /* commands to the engine */
    uint32_t reserved[5];
    uint32_t check; /* CRC-32C of the 60 bytes before it */
} ps_link_completion;

/* A range of the target's guest-physical addresses that is RAM or ROM; bytes. */
typedef struct {
    uint64_t gpa;
    uint64_t length;
    uint64_t offset; /* in the window, where there is one */
} ps_link_region;

/* Emulated cards are on no bus of the target: what a real one does there by itself, reads and
 * writes of the engine's registers, goes through these two. `sequence` is written last. */
typedef enum { PS_LINK_BUS_READ = 1, PS_LINK_BUS_WRITE = 2 } ps_link_bus_op;

typedef struct {
    uint32_t sequence;
    uint16_t op;     /* ps_link_bus_op */
    uint16_t width;  /* 4 or 8 */
    uint64_t offset; /* in the engine's register window */
    uint64_t value;
} ps_link_bus_request;

typedef struct {
    uint32_t sequence; /* of the request that is answered */
    uint32_t up;       /* 0: the link is down */
    uint64_t value;
    uint64_t engine_memory; /* bus address at which the engine finds the card's memory */
    uint32_t generation;    /* changes when the link has come back */
    uint32_t reserved;
} ps_link_bus_reply;

static_assert(sizeof(ps_link_host) == 64, "docs/spec/card-link.md, 3");
static_assert(offsetof(ps_link_host, session) == 16, "docs/spec/card-link.md, 3");
static_assert(offsetof(ps_link_host, submitted) == 24, "docs/spec/card-link.md, 3");
static_assert(sizeof(ps_link_card) == 128, "docs/spec/card-link.md, 3");
static_assert(offsetof(ps_link_card, completed) == 40, "docs/spec/card-link.md, 3");
static_assert(offsetof(ps_link_card, pages) == 64, "docs/spec/card-link.md, 3");
static_assert(sizeof(ps_link_submission) == 64, "docs/spec/card-link.md, 4");
static_assert(offsetof(ps_link_submission, check) == 60, "docs/spec/card-link.md, 4");
static_assert(sizeof(ps_link_completion) == 64, "docs/spec/card-link.md, 4");
static_assert(offsetof(ps_link_completion, check) == 60, "docs/spec/card-link.md, 4");
static_assert(sizeof(ps_link_region) == 24, "docs/spec/card-link.md, 5");
static_assert(sizeof(ps_link_bus_request) == 24, "docs/spec/card-link.md, 7");
static_assert(sizeof(ps_link_bus_reply) == 32, "docs/spec/card-link.md, 7");
static_assert(PS_LINK_PAGES_MAX * 8 <= PS_LINK_STATUSES_IN_SLOT, "frames fit");
static_assert(PS_LINK_REGIONS_MAX * 24 <= PS_LINK_STATUSES_IN_SLOT, "regions fit");
static_assert(PS_LINK_STATUSES_IN_SLOT + PS_LINK_PAGES_MAX <= PS_LINK_RESULTS_IN_SLOT,
              "statuses fit");
static_assert(PS_LINK_RESULTS_IN_SLOT + PS_LINK_PAGES_MAX * PS_LINK_RESULT_SIZE
                  <= PS_LINK_SLOT_SIZE, "digests fit");
static_assert(PS_LINK_RESULTS_IN_SLOT + PS_LINK_READ_MAX * 4096 <= PS_LINK_SLOT_SIZE, "pages fit");
static_assert(PS_LINK_DATA_AT + PS_LINK_SLOTS * PS_LINK_SLOT_SIZE <= PS_LINK_MAILBOX_SIZE,
              "slots fit");

#endif
