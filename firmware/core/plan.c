/* Reading the target: pages are asked for in gathers, one a landing buffer, and digested out of
 * one while the other is filled (docs/spec/card-link.md, 6).
 *
 * Each buffer goes its own way from FREE to LANDED and back, a small step a turn. What a step
 * costs is bounded: a gather is planned, started or looked at, or one batch of pages is digested.
 */
#include "core.h"

enum {
    PAGE_WORDS = PS_PAGE_SIZE / sizeof(uint64_t),
    FAILURES_MAX = 3 /* both buffers of one event, and once more: a dead engine must not hold up
                        a command for longer than the host waits */
};

/* The pages that are handed on at once. */
typedef struct {
    uint32_t count;
    const uint8_t *pages[PS_BATCH_MAX + PS_LANES];
    uint64_t frames[PS_BATCH_MAX];
    uint16_t places[PS_BATCH_MAX];
} batch_of_pages;

static bool is_window(const ps_card *card)
{
    return card->hal->limits.engine == PS_LINK_ENGINE_WINDOW;
}

static bool is_stopped(const ps_job *job)
{
    return job->abandoned || job->result != PS_LINK_OK;
}

/* ---- what the host gets ---- */

static uint32_t width_of(const ps_link_submission *command)
{
    return command->op == PS_LINK_OP_READ ? PS_PAGE_SIZE : ps_digests_width(command->kinds);
}

static uint8_t *result_of(const ps_card *card, uint32_t place)
{
    return ps_link_data(card) + PS_LINK_RESULTS_IN_SLOT +
           (size_t)place * width_of(&card->job.command);
}

static void put_status(ps_card *card, uint32_t place, uint8_t status)
{
    ps_mailbox_fill(ps_link_data(card) + PS_LINK_STATUSES_IN_SLOT + place, status, 1);
}

static void put_unread(ps_card *card, uint32_t place, uint8_t status)
{
    put_status(card, place, status);
    ps_mailbox_fill(result_of(card, place), PS_POISON, width_of(&card->job.command));
    card->page.unread++;
}

static void put_ok(ps_card *card, uint32_t place)
{
    put_status(card, place, PS_PAGE_OK);
    card->page.pages++;
    card->job.ok++;
}

/* ---- poison ---- */

/* Another one for every gather, and nothing that the target could write into a page: splitmix64
 * (Steele, Lea, Flood, 2014) from a seed that the card has drawn. */
static uint64_t next_poison(ps_card *card)
{
    uint64_t mixed = card->poison += UINT64_C(0x9e3779b97f4a7c15);
    mixed = (mixed ^ mixed >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    mixed = (mixed ^ mixed >> 27) * UINT64_C(0x94d049bb133111eb);
    return mixed ^ mixed >> 31;
}

static void poison_edges(uint8_t *page, uint64_t poison)
{
    ps_mailbox_write(page, &poison, 1);
    ps_mailbox_write(page + PS_PAGE_SIZE - sizeof poison, &poison, 1);
}

static bool has_poison(const uint8_t *page, uint64_t poison)
{
    uint64_t first, last;
    ps_mailbox_read(&first, page, 1);
    ps_mailbox_read(&last, page + PS_PAGE_SIZE - sizeof last, 1);
    return first == poison || last == poison;
}

/* ---- FREE to READY ---- */

static uint64_t frame_at(const ps_card *card, uint32_t place)
{
    const ps_link_submission *command = &card->job.command;
    if (command->flags & PS_LINK_RANGE) {
        return command->first <= UINT64_MAX - place ? command->first + place : UINT64_MAX;
    }
    return ps_mailbox_load64(ps_link_data(card) + PS_LINK_FRAMES_IN_SLOT +
                             place * sizeof(uint64_t));
}

static uint64_t address_of(const ps_card *card, const ps_link_region *region, uint64_t frame)
{
    uint64_t gpa = frame * PS_PAGE_SIZE;
    return is_window(card) ? region->offset + (gpa - region->gpa) : gpa;
}

/* Fills a gather with the next pages that are in the map; the others have their status at once. */
static void plan(ps_card *card, ps_gather *gather)
{
    ps_job *job = &card->job;
    gather->count = 0;
    while (job->next < job->command.count && gather->count < card->gather_max) {
        uint32_t place = job->next++;
        uint64_t frame = frame_at(card, place);
        const ps_link_region *region = ps_map_find(&card->map, frame);
        if (region == NULL) {
            put_unread(card, place, PS_PAGE_HOLE);
        } else if (job->lost != PS_PAGE_OK) {
            put_unread(card, place, job->lost);
        } else {
            uint32_t i = gather->count++;
            gather->frames[i] = frame;
            gather->addresses[i] = address_of(card, region, frame);
            gather->places[i] = (uint16_t)place;
        }
    }
    gather->at = 0;
    gather->span = gather->count;
    gather->delivered = 0;
    if (gather->count > 0) {
        gather->state = is_window(card) ? PS_GATHER_LANDED : PS_GATHER_READY;
    }
}

/* ---- READY to FLYING, FLYING to LANDED ---- */

/* Goes on behind the part that was under way. */
static void advance(ps_gather *gather)
{
    gather->at += gather->span;
    gather->delivered = 0;
    gather->state = gather->at < gather->count ? PS_GATHER_READY : PS_GATHER_FREE;
}

/* What is left of the gather gets one status, and is not asked for again. */
static void give_up(ps_card *card, ps_gather *gather, uint8_t status)
{
    for (uint32_t i = gather->at; i < gather->count; i++) {
        put_unread(card, gather->places[i], status);
    }
    gather->state = PS_GATHER_FREE;
}

/* Logs how the engine is when that changes; `trouble` is a literal, or NULL when all is well. */
static void note_trouble(ps_card *card, const char *trouble)
{
    if (card->trouble != trouble) {
        card->trouble = trouble;
        ps_card_log(card, trouble != NULL ? trouble : "gather: the engine works again");
    }
}

/* The engine has failed as a whole; after some of that the rest of the command is not tried. */
static void fail(ps_card *card, ps_gather *gather, uint8_t status, const char *trouble)
{
    ps_job *job = &card->job;
    note_trouble(card, trouble);
    give_up(card, gather, status);
    job->failures++;
    if (job->failures >= FAILURES_MAX || status == PS_PAGE_BLOCKED) {
        job->lost = status;
    }
}

/* 6.2: after a refusal the pages are asked for one by one. */
static void repeat_singly(ps_card *card, ps_gather *gather)
{
    if (gather->span > 1) {
        gather->span = 1;
        gather->state = PS_GATHER_READY;
    } else {
        put_unread(card, gather->places[gather->at], PS_PAGE_BLOCKED);
        advance(gather);
    }
}

/* What has become of the part under way. */
static void settle(ps_card *card, ps_gather *gather, ps_hal_state state)
{
    if (is_stopped(&card->job)) {
        gather->state = PS_GATHER_FREE;
        return;
    }
    switch (state) {
    case PS_HAL_DONE:
        note_trouble(card, NULL);
        gather->state = PS_GATHER_LANDED;
        break;
    case PS_HAL_REFUSED:
        repeat_singly(card, gather);
        break;
    case PS_HAL_BLOCKED:
        fail(card, gather, PS_PAGE_BLOCKED, "gather: the engine is kept from its own queues");
        break;
    case PS_HAL_LINK_DOWN:
        fail(card, gather, PS_PAGE_LINK_DOWN, "gather: the link is down");
        break;
    case PS_HAL_TIMEOUT:
        fail(card, gather, PS_PAGE_TIMEOUT, "gather: no answer in time");
        break;
    default:
        card->job.result = PS_LINK_FAILED;
        gather->state = PS_GATHER_FREE;
        ps_card_log_number(card, "gather: the board says ", state);
    }
}

static void launch(ps_card *card, ps_gather *gather, uint32_t buffer)
{
    const ps_hal *hal = card->hal;
    if (card->job.lost != PS_PAGE_OK) {
        give_up(card, gather, card->job.lost);
        return;
    }
    gather->poison = next_poison(card);
    uint8_t *landing = hal->landing(hal->context, buffer);
    for (uint32_t i = 0; i < gather->span; i++) {
        poison_edges(landing + (size_t)i * PS_PAGE_SIZE, gather->poison);
    }
    card->job.gathers++;
    ps_hal_state state = hal->gather_start(hal->context, buffer, gather->addresses + gather->at,
                                           gather->span);
    if (state == PS_HAL_BUSY) {
        gather->state = PS_GATHER_FLYING;
    } else {
        settle(card, gather, state);
    }
}

static bool look(ps_card *card, ps_gather *gather, uint32_t buffer)
{
    const ps_hal *hal = card->hal;
    ps_hal_state state = hal->gather_poll(hal->context, buffer);
    if (state == PS_HAL_BUSY) {
        return false;
    }
    settle(card, gather, state);
    return true;
}

/* ---- LANDED to FREE ---- */

/* The page of the part under way; NULL when it is not there (any more). */
static const uint8_t *page_at(const ps_card *card, const ps_gather *gather, uint32_t buffer,
                              uint32_t index)
{
    const ps_hal *hal = card->hal;
    if (is_window(card)) {
        return hal->window(hal->context, gather->addresses[gather->at + index]);
    }
    return hal->landing(hal->context, buffer) + (size_t)index * PS_PAGE_SIZE;
}

/* The next pages that can be believed; the others have their status at once. */
static void collect(ps_card *card, ps_gather *gather, uint32_t buffer, batch_of_pages *batch)
{
    batch->count = 0;
    while (gather->delivered < gather->span && batch->count < PS_BATCH_MAX) {
        uint32_t index = gather->delivered++;
        uint16_t place = gather->places[gather->at + index];
        const uint8_t *page = page_at(card, gather, buffer, index);
        if (page == NULL) {
            put_unread(card, place, PS_PAGE_LINK_DOWN);
        } else if (!is_window(card) && has_poison(page, gather->poison)) {
            put_unread(card, place, PS_PAGE_TORN);
        } else {
            uint32_t i = batch->count++;
            batch->pages[i] = page;
            batch->frames[i] = gather->frames[gather->at + index];
            batch->places[i] = place;
        }
    }
}

/* Two digests of a page must be of the same bytes, and what lies in a window may be changing. */
static void copy_pages(ps_card *card, batch_of_pages *batch)
{
    for (uint32_t i = 0; i < batch->count; i++) {
        ps_mailbox_read(card->copies[i], batch->pages[i], PAGE_WORDS);
        batch->pages[i] = card->copies[i];
    }
}

static void put_digests(ps_card *card, batch_of_pages *batch)
{
    const uint32_t kinds = card->job.command.kinds;
    if (kinds == (PS_LINK_SHA256 | PS_LINK_NH4AES)) {
        copy_pages(card, batch);
    }
    for (uint32_t i = 0; i < PS_LANES; i++) {
        batch->pages[batch->count + i] = batch->pages[0];
    }
    ps_card_digest(card, batch->pages, batch->frames, batch->count, kinds);
    for (uint32_t i = 0; i < batch->count; i++) {
        uint8_t *to = result_of(card, batch->places[i]);
        if (kinds & PS_LINK_SHA256) {
            ps_mailbox_write(to, card->sha256 + i * PS_SHA256_SIZE,
                             PS_SHA256_SIZE / sizeof(uint64_t));
            to += PS_SHA256_SIZE;
        }
        if (kinds & PS_LINK_NH4AES) {
            ps_mailbox_write(to, card->keyed + i * PS_KEYED_SIZE,
                             PS_KEYED_SIZE / sizeof(uint64_t));
        }
    }
}

/* One batch. */
static void deliver(ps_card *card, ps_gather *gather, uint32_t buffer)
{
    batch_of_pages batch;
    collect(card, gather, buffer, &batch);
    if (card->job.command.op == PS_LINK_OP_READ) {
        copy_pages(card, &batch);
        for (uint32_t i = 0; i < batch.count; i++) {
            ps_mailbox_write(result_of(card, batch.places[i]), batch.pages[i], PAGE_WORDS);
        }
    } else if (batch.count > 0) {
        put_digests(card, &batch);
    }
    for (uint32_t i = 0; i < batch.count; i++) {
        put_ok(card, batch.places[i]);
    }
    if (gather->delivered == gather->span) {
        advance(gather);
    }
}

/* ---- */

/* The buffer whose pages come first: while it is emptied, the other one can be filled. */
static bool comes_first(const ps_card *card, const ps_gather *gather)
{
    for (uint32_t i = 0; i < card->buffers; i++) {
        const ps_gather *other = &card->job.gather[i];
        if (other->state == PS_GATHER_LANDED &&
            other->places[other->at] < gather->places[gather->at]) {
            return false;
        }
    }
    return true;
}

static bool step(ps_card *card, ps_gather *gather, uint32_t buffer)
{
    ps_job *job = &card->job;
    if (gather->state == PS_GATHER_FLYING) {
        return look(card, gather, buffer);
    }
    if (is_stopped(job)) {
        gather->state = PS_GATHER_FREE;
        return true;
    }
    switch (gather->state) {
    case PS_GATHER_FREE:
        if (job->next == job->command.count) {
            return false;
        }
        plan(card, gather);
        return true;
    case PS_GATHER_READY:
        launch(card, gather, buffer);
        return true;
    default:
        if (comes_first(card, gather)) {
            deliver(card, gather, buffer);
        }
        return true;
    }
}

bool ps_plan_step(ps_card *card)
{
    bool moved = false;
    for (uint32_t buffer = 0; buffer < card->buffers; buffer++) {
        moved |= step(card, &card->job.gather[buffer], buffer);
    }
    return moved;
}

bool ps_plan_done(const ps_card *card)
{
    const ps_job *job = &card->job;
    bool done = is_stopped(job) || job->next == job->command.count;
    for (uint32_t buffer = 0; buffer < card->buffers; buffer++) {
        done &= job->gather[buffer].state == PS_GATHER_FREE;
    }
    return done;
}
