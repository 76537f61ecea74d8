/* The other side of the link. */
#define _GNU_SOURCE
#include "host.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { TURNS_MAX = 200000, NAP_US = 100 };

uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* ---- the bench ---- */

static void *map_shared(int file, size_t size)
{
    void *mapped = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    require(mapped != MAP_FAILED, "mmap");
    return mapped;
}

static int new_file(const char *name, size_t size)
{
    int file = memfd_create(name, MFD_CLOEXEC);
    require(file >= 0 && ftruncate(file, (off_t)size) == 0, "memfd_create");
    return file;
}

bench *bench_open(uint32_t engine)
{
    static bench on;
    memset(&on, 0, sizeof on);
    uint64_t state = 88172645463325252;
    on.ram_file = new_file("ram", RAM_PAGES * PAGE);
    on.ram = map_shared(on.ram_file, RAM_PAGES * PAGE);
    for (size_t at = 0; at < RAM_PAGES * PAGE; at += sizeof state) {
        next_random(&state);
        memcpy(on.ram + at, &state, sizeof state);
    }
    int mailbox_file = new_file("mailbox", PS_LINK_MAILBOX_SIZE);
    on.mailbox = map_shared(mailbox_file, PS_LINK_MAILBOX_SIZE);
    close(mailbox_file);
    require(sim_open(&on.board, engine, on.ram_file, RAM_PAGES * PAGE, on.mailbox), "sim_open");
    on.board.own_clock = true;
    on.board.regions[0] = (ps_link_region){0, LOW_PAGES * PAGE, 0};
    on.board.regions[1] =
        (ps_link_region){HIGH_FRAME * PAGE, HIGH_PAGES * PAGE, LOW_PAGES * PAGE};
    on.board.regions_count = 2;
    sim_start(&on.board);
    return &on;
}

void bench_close(bench *on)
{
    sim_close(&on->board);
    munmap(on->ram, RAM_PAGES * PAGE);
    munmap(on->mailbox, PS_LINK_MAILBOX_SIZE);
    close(on->ram_file);
}

void bench_turn(bench *on)
{
    if (!sim_turn(&on->board)) {
        on->board.hal.idle(&on->board, NAP_US);
    }
}

void bench_turns(bench *on, int turns)
{
    while (turns-- > 0) {
        bench_turn(on);
    }
}

/* ---- the mailbox ---- */

ps_link_host *bench_host(bench *on)
{
    return (ps_link_host *)(void *)(on->mailbox + PS_LINK_HOST_AT);
}

const ps_link_card *bench_card(bench *on)
{
    return (const ps_link_card *)(const void *)(on->mailbox + PS_LINK_CARD_AT);
}

static size_t slot_of(uint32_t sequence)
{
    return (sequence - 1) % PS_LINK_SLOTS;
}

uint8_t *bench_slot(bench *on, uint32_t sequence)
{
    return on->mailbox + PS_LINK_DATA_AT + slot_of(sequence) * PS_LINK_SLOT_SIZE;
}

ps_link_submission *bench_submission(bench *on, uint32_t sequence)
{
    return (ps_link_submission *)(void *)(on->mailbox + PS_LINK_SUBMISSIONS_AT) +
           slot_of(sequence);
}

const ps_link_completion *bench_completion(bench *on, uint32_t sequence)
{
    return (const ps_link_completion *)(const void *)(on->mailbox + PS_LINK_COMPLETIONS_AT) +
           slot_of(sequence);
}

/* ---- sessions and commands ---- */

void bench_greet(bench *on, uint64_t magic, uint32_t version)
{
    static uint64_t sessions = 0x5e55;
    ps_link_host *host = bench_host(on);
    host->submitted = on->submitted = 0;
    host->magic = magic;
    host->version = version;
    host->session = on->session = next_random(&sessions);
}

void bench_begin(bench *on)
{
    static const ps_link_region all[] = {
        {0, LOW_PAGES * PAGE, 0},
        {HIGH_FRAME * PAGE, HIGH_PAGES * PAGE, LOW_PAGES * PAGE},
    };
    bench_greet(on, PS_LINK_HOST_MAGIC, PS_LINK_VERSION);
    for (int turn = 0; turn < TURNS_MAX && bench_card(on)->session != on->session; turn++) {
        bench_turn(on);
    }
    CHECK(bench_card(on)->session == on->session);
    CHECK(bench_card(on)->completed == 0 && bench_card(on)->state == PS_LINK_STATE_READY);
    CHECK(bench_map(on, all, 2) == PS_LINK_OK);
}

void bench_seal(ps_link_submission *submission)
{
    submission->check = ps_crc32c(submission, offsetof(ps_link_submission, check));
}

uint32_t bench_submit(bench *on, ps_link_submission asked)
{
    asked.sequence = ++on->submitted;
    asked.session = on->session;
    bench_seal(&asked);
    *bench_submission(on, asked.sequence) = asked;
    uint8_t *slot = bench_slot(on, asked.sequence);
    memset(slot + PS_LINK_STATUSES_IN_SLOT, UNTOUCHED,
           PS_LINK_SLOT_SIZE - PS_LINK_STATUSES_IN_SLOT);
    bench_host(on)->submitted = asked.sequence;
    return asked.sequence;
}

ps_link_completion bench_await(bench *on, uint32_t sequence)
{
    const ps_link_card *card = bench_card(on);
    for (int turn = 0; turn < TURNS_MAX && card->completed < sequence; turn++) {
        bench_turn(on);
    }
    if (card->completed < sequence) {
        CHECK(!"completed in time");
        return (ps_link_completion){0};
    }
    ps_link_completion answer = *bench_completion(on, sequence);
    CHECK(answer.sequence == sequence && answer.session == on->session);
    CHECK(answer.boot == card->boot && answer.ok <= answer.count);
    CHECK(answer.check == ps_crc32c(&answer, offsetof(ps_link_completion, check)));
    return answer;
}

ps_link_completion bench_do(bench *on, ps_link_submission asked)
{
    return bench_await(on, bench_submit(on, asked));
}

ps_link_result bench_map(bench *on, const ps_link_region *regions, uint32_t count)
{
    memcpy(bench_slot(on, on->submitted + 1), regions, count * sizeof *regions);
    ps_link_submission asked = {.op = PS_LINK_OP_MAP, .count = count};
    return (ps_link_result)bench_do(on, asked).result;
}

ps_link_completion bench_pages(bench *on, ps_link_submission asked, const uint64_t *frames,
                               uint8_t *statuses)
{
    memcpy(bench_slot(on, on->submitted + 1), frames, asked.count * sizeof *frames);
    uint32_t sequence = bench_submit(on, asked);
    ps_link_completion answer = bench_await(on, sequence);
    CHECK(bench_true(on, &asked, sequence, frames));
    if (statuses != NULL) {
        memcpy(statuses, bench_slot(on, sequence) + PS_LINK_STATUSES_IN_SLOT, asked.count);
    }
    return answer;
}

/* ---- what must come out ---- */

const uint64_t *all_frames(void)
{
    static uint64_t frames[RAM_PAGES];
    for (uint64_t i = 0; i < RAM_PAGES; i++) {
        frames[i] = i < LOW_PAGES ? i : HIGH_FRAME + i - LOW_PAGES;
    }
    return frames;
}

uint8_t *bench_page(bench *on, uint64_t frame)
{
    if (frame < LOW_PAGES) {
        return on->ram + frame * PAGE;
    }
    if (frame >= HIGH_FRAME && frame - HIGH_FRAME < HIGH_PAGES) {
        return on->ram + (LOW_PAGES + frame - HIGH_FRAME) * PAGE;
    }
    return NULL;
}

static uint32_t expect(bench *on, const ps_link_submission *asked, uint64_t frame,
                       uint8_t result[PAGE])
{
    const uint8_t *page = bench_page(on, frame);
    if (asked->op == PS_LINK_OP_READ) {
        if (page != NULL) {
            memcpy(result, page, PAGE);
        }
        return PAGE;
    }
    uint32_t width = 0;
    ps_batch batch = {&page, &frame, 1, &on->board.card.key, ps_aes_encrypt_portable, result};
    if (asked->kinds & PS_LINK_SHA256) {
        if (page != NULL) {
            ps_digest_sha256_portable(&batch);
        }
        width += PS_SHA256_SIZE;
    }
    if (asked->kinds & PS_LINK_NH4AES) {
        batch.results = result + width;
        if (page != NULL) {
            ps_digest_nh4aes_portable(&batch);
        }
        width += PS_KEYED_SIZE;
    }
    return width;
}

bool bench_true(bench *on, const ps_link_submission *asked, uint32_t sequence,
                const uint64_t *frames)
{
    static uint8_t poison[PAGE], wanted[PAGE];
    memset(poison, PS_POISON, sizeof poison);
    const uint8_t *slot = bench_slot(on, sequence);
    const uint8_t *results = slot + PS_LINK_RESULTS_IN_SLOT;
    for (uint32_t i = 0; i < asked->count; i++) {
        uint8_t status = slot[PS_LINK_STATUSES_IN_SLOT + i];
        uint32_t width = expect(on, asked, frames[i], wanted);
        bool hole = bench_page(on, frames[i]) == NULL;
        const uint8_t *right = status == PS_PAGE_OK ? wanted : poison;
        if (status > PS_PAGE_TORN || hole != (status == PS_PAGE_HOLE) ||
            memcmp(results + (size_t)i * width, right, width) != 0) {
            return false;
        }
    }
    /* nothing behind them */
    return slot[PS_LINK_STATUSES_IN_SLOT + asked->count] == UNTOUCHED;
}
