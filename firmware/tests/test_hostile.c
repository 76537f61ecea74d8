/* A host that writes anything anywhere: the card goes on, stays within its places, and does not
 * call a page read that it has not read. */
#include <stdlib.h>
#include <string.h>

#include "host.h"

enum { ROUNDS = 400, TURNS = 40 };

static uint64_t state = 20240229;

static uint64_t below(uint64_t bound)
{
    return next_random(&state) % bound;
}

static void scribble(uint8_t *at, size_t size)
{
    for (size_t i = 0; i < size; i++) {
        at[i] = (uint8_t)next_random(&state);
    }
}

/* ---- what it may do ---- */

static void spoil_host_page(bench *on)
{
    scribble(on->mailbox + PS_LINK_HOST_AT + below(49), below(16));
}

static void spoil_session(bench *on)
{
    bench_host(on)->session = below(4);
}

static void spoil_submissions(bench *on)
{
    scribble(on->mailbox + PS_LINK_SUBMISSIONS_AT + below(960), 64);
}

static void spoil_arguments(bench *on)
{
    scribble(bench_slot(on, (uint32_t)below(16) + 1) + below(0x7f00), 256);
}

/* Even what only the card writes. */
static void spoil_answers(bench *on)
{
    scribble(on->mailbox + PS_LINK_CARD_AT + below(121), 8);
    scribble(on->mailbox + PS_LINK_COMPLETIONS_AT + below(1000), 24);
    scribble(bench_slot(on, (uint32_t)below(16) + 1) + PS_LINK_STATUSES_IN_SLOT, 4096);
}

/* Entries with a check that fits, and wild values. */
static void submit_wild(bench *on)
{
    ps_link_submission asked = {
        .op = (uint16_t)below(7),
        .flags = (uint16_t)(below(8) == 0 ? next_random(&state) : below(2)),
        .count = (uint32_t)(below(4) == 0 ? next_random(&state) : below(700)),
        .kinds = (uint32_t)below(5),
        .first = below(2) == 0 ? next_random(&state) : below(2 * LOW_PAGES),
    };
    bench_submit(on, asked);
}

static void jump(bench *on)
{
    bench_host(on)->submitted += (uint32_t)below(40);
}

static void greet(bench *on)
{
    bench_greet(on, PS_LINK_HOST_MAGIC, PS_LINK_VERSION);
}

static void add_fault(bench *on)
{
    static const char *const faults[] = {"lost-doorbell:1:3", "late-completion:2:3",
                                         "refused-dma:0x5000:40", "stale-completion:1:2",
                                         "half-page:1:9",      "link-down:2:1",
                                         "engine-reset:1:2",   "blocked:3:1"};
    on->board.faults_count = 0;
    on->board.gathers = 0;
    require(sim_add_fault(&on->board, faults[below(sizeof faults / sizeof *faults)]), "fault");
}

/* ---- what must hold ---- */

/* Fills what the host has no business in with a pattern, and leaves it at that. */
static const struct {
    size_t from, to;
} forbidden[] = {
    {PS_LINK_HOST_AT + sizeof(ps_link_host), PS_LINK_CARD_AT},
    {PS_LINK_CARD_AT + sizeof(ps_link_card), PS_LINK_SUBMISSIONS_AT},
    {PS_LINK_SUBMISSIONS_AT + PS_LINK_SLOTS * 64, PS_LINK_COMPLETIONS_AT},
    {PS_LINK_COMPLETIONS_AT + PS_LINK_SLOTS * 64, PS_LINK_LOG_AT},
    {PS_LINK_LOG_AT + PS_LINK_LOG_SIZE, PS_LINK_DATA_AT},
    {PS_LINK_DATA_AT + PS_LINK_SLOTS * PS_LINK_SLOT_SIZE, PS_LINK_MAILBOX_SIZE},
};
enum { FORBIDDEN = sizeof forbidden / sizeof *forbidden };

static bool is_untouched(bench *on)
{
    for (size_t i = 0; i < FORBIDDEN; i++) {
        for (size_t at = forbidden[i].from; at < forbidden[i].to; at++) {
            if (on->mailbox[at] != 0) {
                return false;
            }
        }
    }
    return true;
}

/* An honest command after all that is carried out. */
static void check_alive(bench *on)
{
    on->board.faults_count = 0;
    memset(on->mailbox + PS_LINK_HOST_AT, 0, 64);
    bench_turns(on, 2);
    bench_begin(on);
    ps_link_submission asked = {.op = PS_LINK_OP_DIGEST, .count = 300, .kinds = 3};
    CHECK(bench_pages(on, asked, all_frames() + 450, NULL).ok == 300);
}

static void test_scribbling(void)
{
    static void (*const moves[])(bench *) = {spoil_host_page, spoil_session, spoil_submissions,
                                             spoil_arguments, spoil_answers, submit_wild,
                                             submit_wild,     submit_wild,   jump,
                                             greet,           add_fault};
    bench *on = bench_open(PS_LINK_ENGINE_DMA);
    for (int round = 0; round < ROUNDS; round++) {
        for (int turn = 0; turn < TURNS; turn++) {
            if (below(3) == 0) {
                moves[below(sizeof moves / sizeof *moves)](on);
            }
            bench_turn(on);
        }
        if (round % 20 == 19) {
            check_alive(on);
            CHECK(is_untouched(on));
        }
    }
    bench_close(on);
}

/* Every engine failure there is, in one command after the other: what is OK is true. */
static void test_only_truth(void)
{
    static uint64_t frames[PS_LINK_PAGES_MAX];
    uint64_t ok = 0, not_ok = 0;
    for (int round = 0; round < 60; round++) {
        bench *on = bench_open(PS_LINK_ENGINE_DMA);
        on->board.hal.limits.gather_max = (uint32_t)below(100) + 1;
        sim_start(&on->board);
        add_fault(on);
        bench_begin(on);
        for (int command = 0; command < 4; command++) {
            bool read = below(3) == 0;
            uint32_t count = (uint32_t)below(read ? PS_LINK_READ_MAX : 300) + 1;
            for (uint32_t i = 0; i < count; i++) {
                frames[i] = below(2) == 0 ? below(LOW_PAGES + 9)
                                          : HIGH_FRAME + below(HIGH_PAGES + 9);
            }
            ps_link_submission asked = {.op = read ? PS_LINK_OP_READ : PS_LINK_OP_DIGEST,
                                        .count = count,
                                        .kinds = read ? 0 : (uint32_t)below(3) + 1};
            /* the target's memory changes from one command to the next: nothing old will do */
            scribble(on->ram + below(RAM_PAGES) * PAGE, PAGE);
            ps_link_completion answer = bench_pages(on, asked, frames, NULL);
            CHECK(answer.result == PS_LINK_OK && answer.count == count);
            ok += answer.ok;
            not_ok += answer.count - answer.ok;
        }
        bench_close(on);
    }
    CHECK(ok > 0 && not_ok > 0);
}

void test_hostile(void)
{
    test_scribbling();
    test_only_truth();
}
