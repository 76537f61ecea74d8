/* DIGEST and READ: every page has its status, and what belongs to it. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "host.h"

enum { LIST = 1500 };

/* Frames at random: inside, at the edges, far outside, and again and again. */
static void fill_list(uint64_t *frames, uint32_t count)
{
    static const uint64_t edges[] = {0, LOW_PAGES - 1, LOW_PAGES, HIGH_FRAME - 1, HIGH_FRAME,
                                     HIGH_FRAME + HIGH_PAGES - 1, HIGH_FRAME + HIGH_PAGES,
                                     (UINT64_C(1) << 40) - 1, UINT64_C(1) << 40, UINT64_C(1) << 52,
                                     UINT64_MAX, UINT64_MAX / 4096, UINT64_C(1) << 63};
    static uint64_t state = 4711;
    for (uint32_t i = 0; i < count; i++) {
        uint64_t random = next_random(&state);
        frames[i] = random % 4 == 0   ? edges[(random >> 8) % (sizeof edges / sizeof *edges)]
                    : random % 4 == 1 ? (random >> 8) % (2 * LOW_PAGES)
                                      : HIGH_FRAME + (random >> 8) % (HIGH_PAGES + 10);
    }
}

static uint32_t pages_inside(bench *on, const uint64_t *frames, uint32_t count)
{
    uint32_t inside = 0;
    for (uint32_t i = 0; i < count; i++) {
        inside += bench_page(on, frames[i]) != NULL;
    }
    return inside;
}

static void check_lists(bench *on)
{
    static uint64_t frames[LIST];
    static const uint32_t counts[] = {1, 2, 63, 64, 65, 511, 512, 513, 1025, LIST};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        for (uint32_t kinds = 1; kinds <= 3; kinds++) {
            fill_list(frames, counts[i]);
            ps_link_submission asked = {
                .op = PS_LINK_OP_DIGEST, .count = counts[i], .kinds = kinds};
            uint64_t pages = bench_card(on)->pages, unread = bench_card(on)->unread;
            ps_link_completion answer = bench_pages(on, asked, frames, NULL);
            CHECK(answer.result == PS_LINK_OK && answer.count == counts[i]);
            CHECK(answer.ok == pages_inside(on, frames, counts[i]));
            CHECK(bench_card(on)->pages - pages == answer.ok);
            CHECK(bench_card(on)->unread - unread == answer.count - answer.ok);
        }
        uint32_t count = counts[i] < PS_LINK_READ_MAX ? counts[i] : PS_LINK_READ_MAX;
        fill_list(frames, count);
        ps_link_submission asked = {.op = PS_LINK_OP_READ, .count = count};
        CHECK(bench_pages(on, asked, frames, NULL).ok == pages_inside(on, frames, count));
    }
}

static void check_range(bench *on, uint64_t first, uint32_t count, uint32_t ok)
{
    static uint64_t frames[PS_LINK_PAGES_MAX];
    for (uint32_t i = 0; i < count; i++) {
        frames[i] = first <= UINT64_MAX - i ? first + i : UINT64_MAX;
    }
    ps_link_submission asked = {.op = PS_LINK_OP_DIGEST, .flags = PS_LINK_RANGE, .count = count,
                                .kinds = PS_LINK_NH4AES, .first = first};
    uint32_t sequence = bench_submit(on, asked);
    ps_link_completion answer = bench_await(on, sequence);
    CHECK(answer.result == PS_LINK_OK && answer.count == count && answer.ok == ok);
    CHECK(bench_true(on, &asked, sequence, frames));
}

static void check_ranges(bench *on)
{
    check_range(on, 0, PS_LINK_PAGES_MAX, LOW_PAGES);
    check_range(on, HIGH_FRAME - 1, PS_LINK_PAGES_MAX, HIGH_PAGES);
    check_range(on, HIGH_FRAME + 50, 600, 600);
    check_range(on, LOW_PAGES - 1, 2, 1);
    check_range(on, UINT64_MAX - 1, 5, 0); /* does not begin again at 0 */
    check_range(on, (UINT64_C(1) << 52) - 2, 4, 0);
}

static void test_engine(uint32_t engine)
{
    bench *on = bench_open(engine);
    bench_begin(on);
    check_lists(on);
    check_ranges(on);
    bench_close(on);
}

static void test_limits(void)
{
    static const uint32_t limits[][2] = {{512, 1}, {1, 1}, {1, 2}, {7, 2}, {64, 2}};
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++) {
        bench *on = bench_open(PS_LINK_ENGINE_DMA);
        on->board.hal.limits.gather_max = limits[i][0];
        on->board.hal.limits.buffers = limits[i][1];
        sim_start(&on->board);
        bench_begin(on);
        ps_link_submission asked = {.op = PS_LINK_OP_DIGEST, .count = RAM_PAGES, .kinds = 1};
        ps_link_completion answer = bench_pages(on, asked, all_frames(), NULL);
        CHECK(answer.ok == RAM_PAGES);
        CHECK(answer.gathers == (RAM_PAGES + limits[i][0] - 1) / limits[i][0]);
        bench_close(on);
    }
}

/* While one buffer is digested the engine fills the other. */
static void test_overlap(void)
{
    bench *on = bench_open(PS_LINK_ENGINE_DMA);
    bench_begin(on);
    memcpy(bench_slot(on, 2), all_frames(), RAM_PAGES * sizeof(uint64_t));
    uint32_t sequence = bench_submit(
        on, (ps_link_submission){.op = PS_LINK_OP_DIGEST, .count = RAM_PAGES, .kinds = 1});
    const ps_gather *gather = on->board.card.job.gather;
    bool both = false, overlap = false;
    while (bench_card(on)->completed < sequence) {
        bench_turns(on, 1);
        both |= gather[0].state == PS_GATHER_FLYING && gather[1].state == PS_GATHER_FLYING;
        overlap |= (gather[0].state == PS_GATHER_FLYING && gather[1].state == PS_GATHER_LANDED) ||
                   (gather[1].state == PS_GATHER_FLYING && gather[0].state == PS_GATHER_LANDED);
    }
    CHECK(both);
    CHECK(overlap);
    bench_close(on);
}

/* A page that looks like what stands for unread pages is a page like any other. */
static void test_poison_like(void)
{
    bench *on = bench_open(PS_LINK_ENGINE_DMA);
    memset(on->ram, PS_POISON, 10 * PAGE);
    memset(on->ram + 10 * PAGE, 0, 10 * PAGE);
    bench_begin(on);
    ps_link_submission asked = {.op = PS_LINK_OP_DIGEST, .count = 20, .kinds = 3};
    CHECK(bench_pages(on, asked, all_frames(), NULL).ok == 20);
    asked = (ps_link_submission){.op = PS_LINK_OP_READ, .count = 20};
    CHECK(bench_pages(on, asked, all_frames(), NULL).ok == 20);
    bench_close(on);
}

/* ---- memory that changes while it is read ---- */

static volatile bool toggling;

static void *toggle(void *word)
{
    for (uint64_t value = 0; toggling; value = ~value) {
        __atomic_store_n((uint64_t *)word, value, __ATOMIC_RELAXED);
    }
    return NULL;
}

/* One word of the page changes between two values: both digests tell of the same one. */
static void test_same_bytes(uint32_t engine)
{
    enum { PAGES = 512 };
    bench *on = bench_open(engine);
    static uint64_t frames[PAGES]; /* frame 0, again and again */
    static uint8_t wanted[2][48];
    const uint8_t *page = on->ram;
    uint64_t *word = (uint64_t *)(void *)(on->ram + PAGE / 2);
    bench_begin(on);
    for (int value = 0; value < 2; value++) {
        *word = value == 0 ? 0 : UINT64_MAX;
        ps_batch batch = {&page, frames, 1, &on->board.card.key, ps_aes_encrypt_portable,
                          wanted[value]};
        ps_digest_sha256_portable(&batch);
        batch.results += PS_SHA256_SIZE;
        ps_digest_nh4aes_portable(&batch);
    }
    pthread_t thread;
    toggling = true;
    require(pthread_create(&thread, NULL, toggle, word) == 0, "pthread_create");
    memset(bench_slot(on, on->submitted + 1), 0, sizeof frames);
    uint32_t sequence = bench_submit(
        on, (ps_link_submission){.op = PS_LINK_OP_DIGEST, .count = PAGES, .kinds = 3});
    CHECK(bench_await(on, sequence).ok == PAGES);
    toggling = false;
    pthread_join(thread, NULL);
    uint32_t seen[2] = {0, 0};
    for (size_t i = 0; i < PAGES; i++) {
        const uint8_t *result = bench_slot(on, sequence) + PS_LINK_RESULTS_IN_SLOT + i * 48;
        seen[0] += memcmp(result, wanted[0], 48) == 0;
        seen[1] += memcmp(result, wanted[1], 48) == 0;
    }
    CHECK(seen[0] + seen[1] == PAGES);
    bench_close(on);
}

void test_plan(void)
{
    test_engine(PS_LINK_ENGINE_DMA);
    test_engine(PS_LINK_ENGINE_WINDOW);
    test_limits();
    test_overlap();
    test_poison_like();
    test_same_bytes(PS_LINK_ENGINE_DMA);
    test_same_bytes(PS_LINK_ENGINE_WINDOW);
}
