/* The card's start, and its loop (docs/spec/card-link.md, 3 and 4). */
#include "core.h"

/* What a command may ask for; indexed by ps_link_op. */
typedef struct {
    uint32_t count_min, count_max;
    uint16_t flags; /* that it may have */
    bool kinds;     /* whether it takes any */
    bool engine;    /* whether it reads the target */
} command_rule;

static const command_rule rules[] = {
    [PS_LINK_OP_NOP] = {0, 0, 0, false, false},
    [PS_LINK_OP_MAP] = {0, PS_LINK_REGIONS_MAX, 0, false, false},
    [PS_LINK_OP_DIGEST] = {1, PS_LINK_PAGES_MAX, PS_LINK_RANGE, true, true},
    [PS_LINK_OP_READ] = {1, PS_LINK_READ_MAX, PS_LINK_RANGE, false, true},
    [PS_LINK_OP_LOCAL] = {1, PS_LINK_LOCAL_MAX, 0, true, false},
};
enum { RULES = sizeof rules / sizeof *rules };

/* ---- start ---- */

/* The boot and the seed of the poison are of other entropy than the key: they tell nothing of it,
 * and the boot nothing of the poison. */
static bool draw_boot(ps_card *card)
{
    uint8_t seed[PS_SECRET_SIZE];
    bool drawn = card->hal->entropy(card->hal->context, seed);
    __builtin_memcpy(&card->page.boot, seed, sizeof card->page.boot);
    __builtin_memcpy(&card->poison, seed + sizeof card->page.boot, sizeof card->poison);
    card->page.boot |= 1; /* never 0 */
    ps_wipe(seed, sizeof seed);
    return drawn;
}

static bool take_limits(ps_card *card)
{
    const ps_hal_limits *limits = &card->hal->limits;
    if (limits->engine == PS_LINK_ENGINE_DMA) {
        card->buffers = limits->buffers;
        card->gather_max = limits->gather_max;
    } else {
        card->buffers = 1;
        card->gather_max = PS_HAL_GATHER_MAX;
    }
    return card->buffers >= 1 && card->buffers <= PS_HAL_BUFFERS_MAX && card->gather_max >= 1 &&
           card->gather_max <= PS_HAL_GATHER_MAX && limits->engine <= PS_LINK_ENGINE_WINDOW;
}

void ps_card_init(ps_card *card, const ps_hal *hal)
{
    static const char *const engines[] = {"up: no engine", "up: dma", "up: window"};
    ps_wipe(card, sizeof *card);
    card->hal = hal;
    ps_link_open(card);
    if (!take_limits(card)) {
        ps_card_log(card, "down: the board's limits make no sense");
    } else if (!ps_key_draw(card) || !draw_boot(card)) {
        ps_wipe(&card->key, sizeof card->key);
        ps_card_log(card, "down: no entropy for the key");
    } else {
        ps_card_log(card, engines[hal->limits.engine]);
        ps_card_log_number(card, "boot ", card->page.boot);
        ps_link_announce(card);
    }
}

/* ---- commands ---- */

static ps_link_result examine(const ps_link_submission *command)
{
    if (command->op == 0 || command->op >= RULES) {
        return PS_LINK_BAD_OP;
    }
    const command_rule *rule = &rules[command->op];
    if (command->count < rule->count_min || command->count > rule->count_max) {
        return PS_LINK_BAD_COUNT;
    }
    bool fits = rule->kinds ? command->kinds >= 1 &&
                                  command->kinds <= (PS_LINK_SHA256 | PS_LINK_NH4AES)
                            : command->kinds == 0;
    return fits && (command->flags & ~rule->flags) == 0 ? PS_LINK_OK : PS_LINK_BAD_ARGUMENT;
}

static void take_map(ps_card *card)
{
    ps_job *job = &card->job;
    const ps_hal_limits *limits = &card->hal->limits;
    bool window = limits->engine == PS_LINK_ENGINE_WINDOW;
    if (ps_map_read(&card->map_new, ps_link_data(card) + PS_LINK_FRAMES_IN_SLOT,
                    job->command.count, window ? limits->window_size : 0)) {
        card->map = card->map_new;
    } else {
        job->result = PS_LINK_BAD_ARGUMENT;
    }
}

/* A batch of pages of the card's own memory. */
static void digest_local(ps_card *card)
{
    ps_job *job = &card->job;
    const uint8_t *pages[PS_BATCH_MAX + PS_LANES];
    uint64_t frames[PS_BATCH_MAX];
    uint32_t left = job->command.count - job->next;
    uint32_t count = left < PS_BATCH_MAX ? left : PS_BATCH_MAX;
    for (uint32_t i = 0; i < PS_BATCH_MAX + PS_LANES; i++) {
        pages[i] = card->copies[i % PS_BATCH_MAX];
    }
    for (uint32_t i = 0; i < count; i++) {
        frames[i] = job->next + i;
    }
    ps_card_digest(card, pages, frames, count, job->command.kinds);
    job->next += count;
}

static void begin(ps_card *card, ps_link_result result)
{
    ps_job *job = &card->job;
    job->active = true;
    job->abandoned = false;
    job->result = result == PS_LINK_OK ? examine(&job->command) : result;
    job->lost = PS_PAGE_OK;
    job->failures = job->next = job->ok = job->gathers = 0;
    job->started_us = card->hal->now_us(card->hal->context);
    if (job->result != PS_LINK_OK) {
        return;
    }
    if (job->command.op == PS_LINK_OP_MAP) {
        take_map(card);
    } else if (rules[job->command.op].engine &&
               card->hal->limits.engine == PS_LINK_ENGINE_NONE) {
        ps_card_log(card, "failed: no engine reads the target");
        job->result = PS_LINK_FAILED;
    }
}

static void finish(ps_card *card)
{
    ps_job *job = &card->job;
    bool pages = job->result == PS_LINK_OK && rules[job->command.op].engine;
    uint64_t elapsed_us = card->hal->now_us(card->hal->context) - job->started_us;
    ps_link_completion completion = {
        .op = job->command.op,
        .result = (uint16_t)job->result,
        .count = pages ? job->command.count : 0,
        .ok = pages ? job->ok : 0,
        .elapsed_us = elapsed_us < UINT32_MAX ? (uint32_t)elapsed_us : UINT32_MAX,
        .gathers = job->gathers,
    };
    ps_link_complete(card, &completion);
}

/* Goes one step on with the command under way; whether there was anything to do. */
static bool go_on(ps_card *card)
{
    ps_job *job = &card->job;
    bool moved = true;
    bool local = job->command.op == PS_LINK_OP_LOCAL && job->result == PS_LINK_OK;
    bool done = !local || job->abandoned || job->next == job->command.count;
    if (!done) {
        digest_local(card);
    } else if (job->command.op == PS_LINK_OP_DIGEST || job->command.op == PS_LINK_OP_READ) {
        done = ps_plan_done(card);
        moved = done || ps_plan_step(card);
    }
    if (done) {
        job->active = false;
        if (!job->abandoned) {
            finish(card);
        }
    }
    return moved;
}

/* Begins with the next command, if there is one. */
static bool take(ps_card *card)
{
    ps_job *job = &card->job;
    switch (ps_link_take(card, &job->command)) {
    case PS_TAKEN_WHOLE:
        begin(card, PS_LINK_OK);
        return true;
    case PS_TAKEN_TORN:
        job->command = (ps_link_submission){.sequence = card->page.completed + 1};
        begin(card, PS_LINK_TORN);
        return true;
    default:
        return false;
    }
}

bool ps_card_turn(ps_card *card)
{
    card->hal->kick(card->hal->context);
    if (card->page.state == PS_LINK_STATE_STARTING) {
        return false;
    }
    card->page.heartbeat++;
    ps_link_show(card);
    ps_link_watch(card);
    bool waiting = ps_link_pending(card);
    if (card->job.active) {
        return go_on(card);
    }
    return waiting && take(card);
}
