/* What the files of the core share; nothing here is for a board. */
#ifndef PS_CORE_H
#define PS_CORE_H

#include "card.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the link is little-endian");

/* ---- mailbox.c: the only code that touches what the host may be writing ---- */

/* Each word is read or written once, in ascending order, and after all that was written before.
 * `words` counts 64-bit words; both are aligned to them. */
void ps_mailbox_read(void *to, const uint8_t *from, size_t words);
void ps_mailbox_write(uint8_t *to, const void *from, size_t words);

/* What the other side wrote before it is seen after it. */
uint32_t ps_mailbox_load32(const uint8_t *from);
uint64_t ps_mailbox_load64(const uint8_t *from);

/* Fills `size` bytes. */
void ps_mailbox_fill(uint8_t *to, uint8_t value, size_t size);

uint32_t ps_crc32c(const void *bytes, size_t size);

/* ---- link.c ---- */

/* Takes the mailbox into possession, not yet with the magic; then tells the host. */
void ps_link_open(ps_card *card);
void ps_link_announce(ps_card *card);

/* Writes the card's page: all of it, so that it does not stay as somebody else has left it. */
void ps_link_show(const ps_card *card);

/* Looks for a new session, or the end of one. */
void ps_link_watch(ps_card *card);

/* Whether a command waits; a host that breaks the protocol puts the card into `fault`. */
bool ps_link_pending(ps_card *card);

typedef enum {
    PS_TAKEN_NOT_YET = 0, /* not whole; it may be in the midst of being written */
    PS_TAKEN_TORN = 1,
    PS_TAKEN_WHOLE = 2
} ps_taken;

/* Copies the next submission. */
ps_taken ps_link_take(ps_card *card, ps_link_submission *submission);

/* Writes the answer to it: sequence, session, boot and check are filled in here. */
void ps_link_complete(ps_card *card, ps_link_completion *completion);

/* The data of the slot that the command under way has. */
uint8_t *ps_link_data(const ps_card *card);

/* ---- map.c ---- */

/* Takes `count` (at most PS_LINK_REGIONS_MAX) regions out of the mailbox; false when one of them
 * is none. `window_size` is 0 without a window. */
bool ps_map_read(ps_map *map, const uint8_t *from, uint32_t count, uint64_t window_size);

/* The region of a frame, or NULL: a hole. */
const ps_link_region *ps_map_find(const ps_map *map, uint64_t frame);

/* ---- digest.c ---- */

/* Draws the key; false without entropy. */
bool ps_key_draw(ps_card *card);

/* Digests `count` (at most PS_BATCH_MAX) pages into card->sha256 and card->keyed, as `kinds`
 * says. */
void ps_card_digest(ps_card *card, const uint8_t *const *pages, const uint64_t *frames,
                    uint32_t count, uint32_t kinds);

/* Bytes of a page's digests. */
uint32_t ps_digests_width(uint32_t kinds);

void ps_wipe(void *memory, size_t size);

/* ---- plan.c: the pages of DIGEST and READ ---- */

/* Goes one step on; whether there was anything to do. */
bool ps_plan_step(ps_card *card);

/* Whether no page is missing, or those under way have come to an end after the command has. */
bool ps_plan_done(const ps_card *card);

#endif
