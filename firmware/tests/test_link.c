/* Start, sessions, the ring, and what each command answers (docs/spec/card-link.md, 3 and 4). */
#define _GNU_SOURCE
#include <string.h>

#include "host.h"

enum { TURN_US = 20 /* at least */, PATIENCE_TURNS = 600 /* above 10 ms */ };

/* ---- start ---- */

static bool log_has(bench *on, const char *text)
{
    static char lines[PS_LINK_LOG_SIZE + 1];
    memcpy(lines, on->mailbox + PS_LINK_LOG_AT, PS_LINK_LOG_SIZE);
    return strstr(lines, text) != NULL;
}

static void test_start(void)
{
    bench *on = bench_open(PS_LINK_ENGINE_DMA);
    const ps_link_card *card = bench_card(on);
    CHECK(card->magic == PS_LINK_CARD_MAGIC && card->boot != 0 && card->session == 0);
    CHECK(card->version_min == PS_LINK_VERSION && card->version_max == PS_LINK_VERSION);
    CHECK(card->state == PS_LINK_STATE_READY && card->engine == PS_LINK_ENGINE_DMA);
    CHECK(card->firmware == PS_FIRMWARE_VERSION && card->log_end > 0 && log_has(on, "up: dma\n"));
    uint32_t heartbeat = card->heartbeat;
    bench_turns(on, 3);
    CHECK(card->heartbeat == heartbeat + 3);
    bench_close(on);
}

/* A card that starts anew has another name and another key, and does not serve what is left of the
 * session before. */
static void test_restart(void)
{
    bench *on = bench_open(PS_LINK_ENGINE_DMA);
    bench_begin(on);
    uint64_t boot = bench_card(on)->boot;
    static uint8_t key[PS_NH_WORDS_SIZE];
    memcpy(key, on->board.card.key.stream, sizeof key);
    bench_submit(on, (ps_link_submission){.op = PS_LINK_OP_NOP});
    sim_start(&on->board);
    bench_turns(on, PATIENCE_TURNS);
    const ps_link_card *card = bench_card(on);
    CHECK(card->magic == PS_LINK_CARD_MAGIC && card->boot != boot && card->session == 0);
    CHECK(card->refused == on->session && card->completed == 0);
    CHECK(bench_completion(on, 1)->sequence == 0); /* that of the map */
    CHECK(memcmp(key, on->board.card.key.stream, sizeof key) != 0);
    bench_begin(on);
    CHECK(bench_do(on, (ps_link_submission){.op = PS_LINK_OP_NOP}).result == PS_LINK_OK);
    bench_close(on);
}

static void check_down(bench *on)
{
    sim_start(&on->board);
    bench_greet(on, PS_LINK_HOST_MAGIC, PS_LINK_VERSION);
    bench_turns(on, PATIENCE_TURNS);
    CHECK(bench_card(on)->magic == 0 && bench_card(on)->session == 0);
    CHECK(log_has(on, "down: "));
}

static void test_down(void)
{
    bench *on = bench_open(PS_LINK_ENGINE_DMA);
    on->board.no_entropy = true;
    check_down(on);
    on->board.no_entropy = false;
    static const uint32_t limits[][3] = {
        {PS_LINK_ENGINE_DMA, 0, 2}, {PS_LINK_ENGINE_DMA, 513, 2}, {PS_LINK_ENGINE_DMA, 512, 0},
        {PS_LINK_ENGINE_DMA, 512, 3}, {PS_LINK_ENGINE_WINDOW + 1, 512, 2}};
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++) {
        on->board.hal.limits.engine = limits[i][0];
        on->board.hal.limits.gather_max = limits[i][1];
        on->board.hal.limits.buffers = limits[i][2];
        check_down(on);
    }
    bench_close(on);
}

/* The key is nowhere in the mailbox, nor is the seed that it is made of. */
static void test_key_stays(void)
{
    static uint8_t secret[PS_SECRET_SIZE] = {0x5e, 0xc4, 0xe7, 0x01, 0x99, 0x42, 0x13, 0x77};
    bench *on = bench_open(PS_LINK_ENGINE_DMA);
    on->board.secret = secret;
    sim_start(&on->board);
    CHECK(memmem(&on->board.card, sizeof on->board.card, secret, 8) == NULL);
    bench_begin(on);
    bench_pages(on, (ps_link_submission){.op = PS_LINK_OP_DIGEST, .count = RAM_PAGES, .kinds = 3},
                all_frames(), NULL);
    const struct ps_key *key = &on->board.card.key;
    const uint8_t *const hidden[] = {secret, key->stream, key->round_keys, key->stream + 4192};
    const uint8_t *end = on->mailbox + PS_LINK_MAILBOX_SIZE;
    for (size_t i = 0; i < sizeof hidden / sizeof *hidden; i++) {
        CHECK(memmem(on->mailbox, (size_t)(end - on->mailbox), hidden[i], 8) == NULL);
    }
    bench_close(on);
}

/* ---- sessions ---- */

static void check_refused(bench *on, uint64_t magic, uint32_t version)
{
    bench_begin(on);
    bench_greet(on, magic, version);
    bench_turns(on, PATIENCE_TURNS);
    const ps_link_card *card = bench_card(on);
    CHECK(card->refused == on->session && card->session == 0);
    bench_submit(on, (ps_link_submission){.op = PS_LINK_OP_NOP});
    bench_turns(on, PATIENCE_TURNS);
    CHECK(card->completed == 0 && card->state == PS_LINK_STATE_READY);
}

static void test_sessions(void)
{
    bench *on = bench_open(PS_LINK_ENGINE_DMA);
    check_refused(on, PS_LINK_HOST_MAGIC, PS_LINK_VERSION + 1);
    check_refused(on, PS_LINK_HOST_MAGIC, 0);
    check_refused(on, 0, PS_LINK_VERSION);
    check_refused(on, PS_LINK_CARD_MAGIC, PS_LINK_VERSION);
    CHECK(log_has(on, "session refused: version 0x2\n"));

    bench_begin(on);
    CHECK(bench_card(on)->completed == 1 && on->board.card.map.count == 2);
    bench_host(on)->session = 0;
    bench_turns(on, 2);
    CHECK(bench_card(on)->session == 0 && bench_card(on)->completed == 0);

    /* a new session has no map */
    bench_begin(on);
    bench_greet(on, PS_LINK_HOST_MAGIC, PS_LINK_VERSION);
    bench_turns(on, 2);
    ps_link_submission asked = {.op = PS_LINK_OP_DIGEST, .flags = PS_LINK_RANGE, .count = 5,
                                .kinds = PS_LINK_SHA256};
    uint32_t sequence = bench_submit(on, asked);
    ps_link_completion answer = bench_await(on, sequence);
    CHECK(answer.result == PS_LINK_OK && answer.count == 5 && answer.ok == 0);
    CHECK(bench_slot(on, sequence)[PS_LINK_STATUSES_IN_SLOT + 4] == PS_PAGE_HOLE);
    bench_close(on);
}

/* A session that ends in the midst of a command: nothing more of it is written. */
static void test_abandoned(uint32_t op, const char *fault)
{
    bench *on = bench_open(PS_LINK_ENGINE_DMA);
    require(fault == NULL || sim_add_fault(&on->board, fault), "fault");
    bench_begin(on);
    memcpy(bench_slot(on, 2), all_frames(), PS_LINK_READ_MAX * sizeof(uint64_t));
    ps_link_submission asked = {.op = (uint16_t)op, .flags = op == PS_LINK_OP_LOCAL ? 0 : 1,
                                .count = op == PS_LINK_OP_READ ? 48 : RAM_PAGES,
                                .kinds = op == PS_LINK_OP_READ ? 0 : 3};
    uint32_t sequence = bench_submit(on, asked);
    bench_turns(on, 3);
    CHECK(on->board.card.job.active);
    bench_greet(on, PS_LINK_HOST_MAGIC, PS_LINK_VERSION);
    bench_turns(on, 1);
    CHECK(bench_card(on)->session == on->session);
    uint8_t *slot = bench_slot(on, sequence);
    memset(slot + PS_LINK_STATUSES_IN_SLOT, UNTOUCHED,
           PS_LINK_SLOT_SIZE - PS_LINK_STATUSES_IN_SLOT);
    bench_turns(on, 2 * SIM_TIMEOUT_US / TURN_US);
    CHECK(!on->board.card.job.active && bench_card(on)->completed == 0);
    size_t untouched = PS_LINK_STATUSES_IN_SLOT;
    while (untouched < PS_LINK_SLOT_SIZE && slot[untouched] == UNTOUCHED) {
        untouched++;
    }
    CHECK(untouched == PS_LINK_SLOT_SIZE);
    CHECK(bench_do(on, (ps_link_submission){.op = PS_LINK_OP_NOP}).result == PS_LINK_OK);
    bench_close(on);
}

/* ---- the ring ---- */

typedef struct {
    ps_link_submission asked;
    ps_link_result result;
} answer_case;

static const answer_case answers[] = {
    {{.op = 1}, PS_LINK_OK},
    {{.op = 0}, PS_LINK_BAD_OP},
    {{.op = 6}, PS_LINK_BAD_OP},
    {{.op = 0xffff}, PS_LINK_BAD_OP},
    {{.op = 1, .count = 1}, PS_LINK_BAD_COUNT},
    {{.op = 2, .count = 513}, PS_LINK_BAD_COUNT},
    {{.op = 2, .count = UINT32_MAX}, PS_LINK_BAD_COUNT},
    {{.op = 3, .count = 0, .kinds = 1}, PS_LINK_BAD_COUNT},
    {{.op = 3, .count = 4097, .kinds = 1}, PS_LINK_BAD_COUNT},
    {{.op = 3, .count = UINT32_MAX, .kinds = 1}, PS_LINK_BAD_COUNT},
    {{.op = 4, .count = 0}, PS_LINK_BAD_COUNT},
    {{.op = 4, .count = 49}, PS_LINK_BAD_COUNT},
    {{.op = 5, .count = 0, .kinds = 1}, PS_LINK_BAD_COUNT},
    {{.op = 5, .count = (1 << 20) + 1, .kinds = 1}, PS_LINK_BAD_COUNT},
    {{.op = 3, .count = 1, .kinds = 0}, PS_LINK_BAD_ARGUMENT},
    {{.op = 3, .count = 1, .kinds = 4}, PS_LINK_BAD_ARGUMENT},
    {{.op = 3, .count = 1, .kinds = UINT32_MAX}, PS_LINK_BAD_ARGUMENT},
    {{.op = 3, .count = 1, .kinds = 1, .flags = 2}, PS_LINK_BAD_ARGUMENT},
    {{.op = 4, .count = 1, .kinds = 1}, PS_LINK_BAD_ARGUMENT},
    {{.op = 4, .count = 1, .flags = 0x8001}, PS_LINK_BAD_ARGUMENT},
    {{.op = 1, .flags = 1}, PS_LINK_BAD_ARGUMENT},
    {{.op = 1, .kinds = 1}, PS_LINK_BAD_ARGUMENT},
    {{.op = 2, .flags = 1}, PS_LINK_BAD_ARGUMENT},
    {{.op = 5, .count = 1, .kinds = 0}, PS_LINK_BAD_ARGUMENT},
    {{.op = 5, .count = 1, .kinds = 1, .flags = 1}, PS_LINK_BAD_ARGUMENT},
    {{.op = 5, .count = 130, .kinds = 3}, PS_LINK_OK},
    {{.op = 3, .count = 4096, .kinds = 3, .flags = 1}, PS_LINK_OK},
    {{.op = 4, .count = 48, .flags = 1}, PS_LINK_OK},
};

static void test_answers(void)
{
    bench *on = bench_open(PS_LINK_ENGINE_DMA);
    bench_begin(on);
    for (size_t i = 0; i < sizeof answers / sizeof *answers; i++) {
        const ps_link_submission *asked = &answers[i].asked;
        uint32_t sequence = bench_submit(on, *asked);
        ps_link_completion answer = bench_await(on, sequence);
        CHECK(answer.result == answers[i].result && answer.op == asked->op);
        bool pages = answer.result == PS_LINK_OK && (asked->op == 3 || asked->op == 4);
        CHECK(answer.count == (pages ? asked->count : 0));
        CHECK(pages || bench_slot(on, sequence)[PS_LINK_STATUSES_IN_SLOT] == UNTOUCHED);
    }
    bench_close(on);

    on = bench_open(PS_LINK_ENGINE_NONE);
    bench_begin(on);
    for (uint16_t op = PS_LINK_OP_DIGEST; op <= PS_LINK_OP_READ; op++) {
        ps_link_submission asked = {.op = op, .count = 1, .kinds = op == PS_LINK_OP_DIGEST};
        CHECK(bench_do(on, asked).result == PS_LINK_FAILED);
    }
    CHECK(log_has(on, "failed: no engine"));
    bench_close(on);
}

/* As many commands as can be under way, several times around the ring. */
static void test_ring(void)
{
    bench *on = bench_open(PS_LINK_ENGINE_DMA);
    bench_begin(on);
    for (int round = 0; round < 5; round++) {
        uint32_t first = on->submitted + 1;
        for (uint32_t i = 0; i < PS_LINK_SLOTS; i++) {
            memcpy(bench_slot(on, on->submitted + 1), all_frames() + 10 * i, 10 * sizeof(uint64_t));
            bench_submit(
                on, (ps_link_submission){.op = PS_LINK_OP_DIGEST, .count = 10, .kinds = 2});
        }
        for (uint32_t i = 0; i < PS_LINK_SLOTS; i++) {
            ps_link_completion answer = bench_await(on, first + i);
            CHECK(answer.ok == 10 && bench_card(on)->completed == first + i);
            CHECK(bench_true(on, &(ps_link_submission){.count = 10, .kinds = 2}, first + i,
                             all_frames() + 10 * i));
        }
    }
    CHECK(bench_card(on)->completed == 1 + 5 * PS_LINK_SLOTS);
    CHECK(bench_card(on)->pages == 5 * PS_LINK_SLOTS * 10 && bench_card(on)->unread == 0);
    bench_close(on);
}

/* `submitted` may be wrong for a moment, and not for longer. */
static void check_numbers(bench *on, uint32_t submitted)
{
    bench_begin(on);
    bench_host(on)->submitted = submitted;
    bench_turns(on, 10);
    CHECK(bench_card(on)->state == PS_LINK_STATE_READY);
    bench_host(on)->submitted = 1;
    bench_turns(on, PATIENCE_TURNS);
    CHECK(bench_card(on)->state == PS_LINK_STATE_READY);
    bench_host(on)->submitted = submitted;
    bench_turns(on, PATIENCE_TURNS);
    CHECK(bench_card(on)->state == PS_LINK_STATE_FAULT && bench_card(on)->completed == 1);
    bench_submit(on, (ps_link_submission){.op = PS_LINK_OP_NOP});
    bench_turns(on, PATIENCE_TURNS);
    CHECK(bench_card(on)->state == PS_LINK_STATE_FAULT && bench_card(on)->completed == 1);
    bench_begin(on);
}

static void test_numbers(void)
{
    bench *on = bench_open(PS_LINK_ENGINE_DMA);
    check_numbers(on, 0);
    check_numbers(on, 18);
    check_numbers(on, UINT32_MAX);
    CHECK(log_has(on, "fault: "));
    /* in the midst of a command, too */
    uint64_t done = bench_card(on)->pages;
    bench_submit(on, (ps_link_submission){.op = PS_LINK_OP_LOCAL, .count = 1 << 20, .kinds = 2});
    bench_turns(on, 3);
    bench_host(on)->submitted = 1000;
    bench_turns(on, PATIENCE_TURNS);
    CHECK(bench_card(on)->state == PS_LINK_STATE_FAULT && !on->board.card.job.active);
    CHECK(bench_card(on)->pages == done);
    bench_close(on);
}

/* The last numbers that there are. */
static void test_last_numbers(void)
{
    bench *on = bench_open(PS_LINK_ENGINE_DMA);
    bench_begin(on);
    on->board.card.page.completed = on->submitted = UINT32_MAX - 2;
    CHECK(bench_do(on, (ps_link_submission){.op = PS_LINK_OP_NOP}).result == PS_LINK_OK);
    CHECK(bench_do(on, (ps_link_submission){.op = PS_LINK_OP_NOP}).result == PS_LINK_OK);
    bench_host(on)->submitted = 0;
    bench_turns(on, PATIENCE_TURNS);
    CHECK(bench_card(on)->state == PS_LINK_STATE_FAULT);
    bench_close(on);
}

/* ---- torn ---- */

static void spoil_check(ps_link_submission *submission)
{
    submission->check ^= 1;
}

static void spoil_sequence(ps_link_submission *submission)
{
    submission->sequence += PS_LINK_SLOTS;
    bench_seal(submission);
}

static void spoil_session(ps_link_submission *submission)
{
    submission->session ^= 1;
    bench_seal(submission);
}

static void spoil_end(ps_link_submission *submission)
{
    submission->reserved[6] ^= 0x80000000;
}

static void spoil_all(ps_link_submission *submission)
{
    memset(submission, 0, sizeof *submission);
}

static void test_torn(void)
{
    static void (*const spoil[])(ps_link_submission *) = {spoil_check, spoil_sequence,
                                                          spoil_session, spoil_end, spoil_all};
    bench *on = bench_open(PS_LINK_ENGINE_DMA);
    bench_begin(on);
    for (uint32_t i = 0; i < sizeof spoil / sizeof *spoil; i++) {
        ps_link_submission asked = {.op = PS_LINK_OP_READ, .flags = PS_LINK_RANGE, .count = 1};
        uint32_t sequence = bench_submit(on, asked);
        ps_link_submission whole = *bench_submission(on, sequence);
        spoil[i](bench_submission(on, sequence));
        bench_turns(on, 10);
        CHECK(bench_card(on)->completed == sequence - 1);
        *bench_submission(on, sequence) = whole; /* it was in the midst of being written */
        CHECK(bench_await(on, sequence).result == PS_LINK_OK && bench_card(on)->torn == i);

        sequence = bench_submit(on, asked);
        spoil[i](bench_submission(on, sequence));
        ps_link_completion answer = bench_await(on, sequence);
        CHECK(answer.result == PS_LINK_TORN && answer.count == 0 && answer.ok == 0);
        CHECK(bench_slot(on, sequence)[PS_LINK_STATUSES_IN_SLOT] == UNTOUCHED);
        CHECK(bench_card(on)->torn == i + 1);
    }
    bench_close(on);
}

/* ---- heartbeat and log ---- */

static void test_heartbeat(void)
{
    bench *on = bench_open(PS_LINK_ENGINE_DMA);
    bench_begin(on);
    uint32_t before = bench_card(on)->heartbeat;
    ps_link_completion answer = bench_pages(
        on, (ps_link_submission){.op = PS_LINK_OP_DIGEST, .count = RAM_PAGES, .kinds = 2},
        all_frames(), NULL);
    CHECK(answer.gathers == 3 && bench_card(on)->heartbeat - before >= 2 * answer.gathers);
    before = bench_card(on)->heartbeat;
    answer = bench_do(on, (ps_link_submission){.op = PS_LINK_OP_LOCAL, .count = 640, .kinds = 2});
    CHECK(answer.elapsed_us > 0 && bench_card(on)->heartbeat - before >= 10);
    bench_close(on);
}

static void test_log(void)
{
    bench *on = bench_open(PS_LINK_ENGINE_DMA);
    for (int i = 0; i < 1000; i++) {
        bench_greet(on, PS_LINK_HOST_MAGIC, PS_LINK_VERSION + 1);
        bench_turns(on, 1);
    }
    uint32_t end = bench_card(on)->log_end;
    CHECK(end < 34 * 40);
    on->board.clock_us += 1000000;
    ps_card_log(&on->board.card, "later");
    CHECK(log_has(on, "lines of log left out: 0x3") && log_has(on, "\nlater\n"));

    char line[256];
    memset(line, 'x', sizeof line - 1);
    line[sizeof line - 1] = '\0';
    for (int i = 0; i < 100; i++) {
        on->board.clock_us += 1000000;
        ps_card_log_number(&on->board.card, line, UINT64_MAX);
    }
    CHECK(bench_card(on)->log_end > PS_LINK_LOG_SIZE);
    CHECK(bench_card(on)->log_end - end < 101 * 96);
    ps_card_log_number(&on->board.card, "number ", 0);
    static const char last[] = "number 0x0\n";
    bool there = true;
    for (uint32_t i = 0; i < sizeof last - 1; i++) {
        uint32_t at = bench_card(on)->log_end - (uint32_t)(sizeof last - 1) + i;
        there &= on->mailbox[PS_LINK_LOG_AT + at % PS_LINK_LOG_SIZE] == (uint8_t)last[i];
    }
    CHECK(there);
    bench_close(on);
}

void test_link(void)
{
    test_start();
    test_restart();
    test_down();
    test_key_stays();
    test_sessions();
    test_abandoned(PS_LINK_OP_DIGEST, NULL);
    test_abandoned(PS_LINK_OP_DIGEST, "lost-doorbell:1:2");
    test_abandoned(PS_LINK_OP_DIGEST, "refused-dma:0:1");
    test_abandoned(PS_LINK_OP_READ, NULL);
    test_abandoned(PS_LINK_OP_READ, "lost-doorbell");
    test_abandoned(PS_LINK_OP_LOCAL, NULL);
    test_answers();
    test_ring();
    test_numbers();
    test_last_numbers();
    test_torn();
    test_heartbeat();
    test_log();
}
