/* The card's firmware without its hardware: a loop that serves the mailbox.
 *
 * A board fills in a ps_hal, calls ps_card_init() once and ps_card_turn() for ever. All state is in
 * the caller's ps_card; there are no globals and no allocation.
 */
#ifndef PS_CARD_H
#define PS_CARD_H

#include "hal.h"
#include "ps_internal.h"
#include "ps_link.h"

enum {
    PS_FIRMWARE_VERSION = 1 << 16 | 0 /* major << 16 | minor */
};

/* The target's memory map; the regions ascend and are disjoint. */
typedef struct {
    uint32_t count;
    ps_link_region regions[PS_LINK_REGIONS_MAX];
} ps_map;

typedef enum {
    PS_GATHER_FREE = 0,
    PS_GATHER_READY = 1,  /* planned, and to be started */
    PS_GATHER_FLYING = 2, /* the engine works on it */
    PS_GATHER_LANDED = 3  /* in the landing buffer, to be digested */
} ps_gather_state;

/* Pages that are asked for together; each landing buffer has one. After a refusal they are asked
 * for again one by one: `at` and `span` say which of them are under way. */
typedef struct {
    ps_gather_state state;
    uint32_t count;
    uint32_t at;
    uint32_t span;
    uint32_t delivered; /* of `span` */
    uint64_t poison;    /* what stood at the edges of each page before */
    uint64_t frames[PS_HAL_GATHER_MAX];
    uint64_t addresses[PS_HAL_GATHER_MAX]; /* physical, or offsets in the window */
    uint16_t places[PS_HAL_GATHER_MAX];    /* of the pages in the command */
} ps_gather;

/* The command under way. */
typedef struct {
    bool active;
    bool abandoned; /* its session is over: nothing is written any more */
    ps_link_submission command;
    ps_link_result result;
    uint8_t lost;      /* ps_page_status of pages that are not asked for any more; or OK */
    uint32_t failures; /* gathers that the engine failed to carry out */
    uint32_t next;     /* first page that is not planned */
    uint32_t ok;
    uint32_t gathers;
    uint64_t started_us;
    ps_gather gather[PS_HAL_BUFFERS_MAX];
} ps_job;

/* Since when something in the mailbox has been odd: it may be in the midst of being written. */
typedef struct {
    bool odd;
    uint64_t since_us;
} ps_patience;

typedef struct {
    const ps_hal *hal;
    ps_link_card page;   /* the card's own; the mailbox has a copy */
    uint32_t buffers;    /* landing buffers in use */
    uint32_t gather_max; /* pages of one gather */
    ps_patience numbers; /* `submitted` */
    ps_patience entry;   /* the next submission */
    ps_map map;
    ps_map map_new;
    ps_job job;

    uint32_t log_lines; /* in the second that began at log_since_us */
    uint32_t log_left_out;
    const char *trouble; /* of the engine, as it was logged last; NULL when it works */
    uint64_t log_since_us;

    uint64_t poison;   /* state of the generator of poison */
    struct ps_key key; /* never copied out */
    uint8_t sha256[PS_BATCH_MAX * PS_SHA256_SIZE];
    uint8_t keyed[PS_BATCH_MAX * PS_KEYED_SIZE];
    uint8_t copies[PS_BATCH_MAX][PS_PAGE_SIZE] __attribute__((aligned(64)));
} ps_card;

/* Draws the key and comes up; without entropy, or with limits that make no sense, it says so in
 * the log and stays down. `hal` must live as long as the card. */
void ps_card_init(ps_card *card, const ps_hal *hal);

/* One turn of the loop, of some milliseconds at most; whether it has done anything. */
bool ps_card_turn(ps_card *card);

/* A line of log, without its end, to the board and into the mailbox; and one that ends with a
 * number. More than 32 a second are left out, and counted. */
void ps_card_log(ps_card *card, const char *text);
void ps_card_log_number(ps_card *card, const char *text, uint64_t number);

#endif
