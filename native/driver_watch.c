/* Native test driver: watch lists, the read limit, the pool. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "driver.h"

/* ---- watch lists ---- */

enum { VALUES_MAX = 1100, MEMORY = 4 * PAGE };

typedef struct {
    uint8_t *memory;
    uint64_t offsets[VALUES_MAX], expected[VALUES_MAX], indices[VALUES_MAX];
    uint8_t statuses[VALUES_MAX];
    ps_tally tally;
} watch_list;

static int compare_list(watch_list *list, size_t count, size_t indices_max)
{
    memset(list->statuses, 0xff, sizeof list->statuses);
    return ps_watch_compare(list->memory, MEMORY, list->offsets, list->expected, count,
                            list->statuses, list->indices, indices_max, &list->tally);
}

static bool tally_is(const watch_list *list, size_t ok, size_t mismatched, size_t unreadable)
{
    const ps_tally *tally = &list->tally;
    return tally->ok == ok && tally->mismatched == mismatched && tally->unreadable == unreadable;
}

/* A list whose values are as expected, aligned and not, up to the last byte. */
static void fill_list(watch_list *list)
{
    for (size_t i = 0; i < VALUES_MAX; i++) {
        bool in_table = i / 16 % 2 && i > 3;
        list->offsets[i] = in_table ? list->offsets[i - 1] + 8 : i * 7919 % (MEMORY - 200);
        if (i == 3) {
            list->offsets[i] = MEMORY - 8;
        }
        memcpy(&list->expected[i], list->memory + list->offsets[i], 8);
    }
}

static void check_watch(watch_list *list)
{
    static const size_t counts[] = {0, 1, 3, 4, 7, 8, 9, 511, 512, 513, VALUES_MAX};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        size_t count = counts[i];
        fill_list(list);
        CHECK(compare_list(list, count, VALUES_MAX) == PS_OK && tally_is(list, count, 0, 0));
        CHECK(all_equal(list->statuses, PS_PAGE_OK, count) && list->tally.listed == 0);
        if (count == 0) {
            continue;
        }
        list->expected[count - 1] ^= UINT64_C(1) << 63;
        CHECK(compare_list(list, count, VALUES_MAX) == PS_OK && tally_is(list, count - 1, 1, 0));
        CHECK(list->tally.listed == 1 && list->indices[0] == count - 1);
        list->offsets[count - 1] = MEMORY - 7;
        CHECK(compare_list(list, count, VALUES_MAX) == PS_OK && tally_is(list, count - 1, 0, 1));
        list->offsets[count / 2] = UINT64_MAX;
        list->offsets[0] = UINT64_C(1) << 63;
        CHECK(compare_list(list, count, 1) == PS_OK && list->tally.mismatched == 0);
        CHECK(list->tally.listed == 1 && list->indices[0] == 0);
        CHECK(list->statuses[count - 1] == PS_PAGE_HOLE && list->statuses[0] == PS_PAGE_HOLE);
    }
    CHECK(ps_watch_compare(list->memory, 7, list->offsets, list->expected, 4, list->statuses, NULL,
                           0, &list->tally) == PS_OK);
    CHECK(tally_is(list, 0, 0, 4) && all_equal(list->statuses, PS_PAGE_HOLE, 4));
}

/* Pages that are gone, and a value that reaches into one. */
static void check_watch_faults(watch_list *list)
{
    fill_list(list);
    require(mprotect(list->memory + 2 * PAGE, PAGE, PROT_NONE) == 0, "mprotect");
    size_t gone = 0;
    for (size_t i = 0; i < VALUES_MAX; i++) {
        gone += list->offsets[i] > 2 * PAGE - 8 && list->offsets[i] < 3 * PAGE;
    }
    CHECK(compare_list(list, VALUES_MAX, VALUES_MAX) == PS_OK);
    CHECK(tally_is(list, VALUES_MAX - gone, 0, gone) && list->tally.listed == gone);
    for (size_t i = 1; i < gone; i++) {
        CHECK(list->indices[i - 1] < list->indices[i]);
    }
    CHECK(list->statuses[list->indices[0]] == PS_PAGE_LINK_DOWN);
    require(mprotect(list->memory + 2 * PAGE, PAGE, PROT_READ | PROT_WRITE) == 0, "mprotect");
}

void test_watch(void)
{
    static const uint32_t features[] = {0, PS_CPU_AVX2};
    static watch_list list;
    list.memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    require(list.memory != MAP_FAILED, "mmap");
    fill_pages(list.memory, MEMORY / PAGE);
    for (size_t i = 0; i < sizeof features / sizeof *features; i++) {
        ps_cpu_restrict(features[i]);
        check_watch(&list);
        check_watch_faults(&list);
    }
    ps_cpu_restrict(PS_CPU_ALL);
    ps_tally *tally = &list.tally;
    const uint8_t *memory = list.memory;
    CHECK(ps_watch_compare(NULL, 8, list.offsets, list.expected, 1, list.statuses, NULL, 0,
                           tally) == PS_ERR_ARGUMENT);
    CHECK(ps_watch_compare(memory, 8, NULL, list.expected, 1, list.statuses, NULL, 0, tally) ==
          PS_ERR_ARGUMENT);
    CHECK(ps_watch_compare(memory, 8, list.offsets, NULL, 1, list.statuses, NULL, 0, tally) ==
          PS_ERR_ARGUMENT);
    CHECK(ps_watch_compare(memory, 8, list.offsets, list.expected, 1, NULL, NULL, 0, tally) ==
          PS_ERR_ARGUMENT);
    CHECK(ps_watch_compare(memory, 8, list.offsets, list.expected, 1, list.statuses, NULL, 1,
                           tally) == PS_ERR_ARGUMENT);
    CHECK(ps_watch_compare(memory, 8, list.offsets, list.expected, 1, list.statuses, NULL, 0,
                           NULL) == PS_ERR_ARGUMENT);
    CHECK(ps_watch_compare(memory, SIZE_MAX, list.offsets, list.expected, 1, list.statuses, NULL, 0,
                           tally) == PS_ERR_ARGUMENT);
    munmap(list.memory, MEMORY);
}

/* ---- the read limit ---- */

void test_read_limit(void)
{
    enum { COUNT = 9 };
    void *block;
    uint64_t offsets[COUNT], expected = 0, sum;
    const uint8_t *pages = make_pages(COUNT, 5, &block);
    for (size_t i = 0; i < COUNT; i++) {
        offsets[i] = (COUNT - 1 - i) * PAGE;
    }
    for (size_t at = 0; at < COUNT * PAGE; at += sizeof sum) {
        memcpy(&sum, pages + at, sizeof sum);
        expected ^= sum;
    }
    for (int i = 0; i < 4; i++) {
        ps_cpu_restrict(i / 2 ? PS_CPU_ALL : 0);
        sum = 0;
        CHECK(ps_read_limit(NULL, pages, COUNT * PAGE, offsets, COUNT, i % 2, &sum) == PS_OK);
        CHECK(sum == expected);
        CHECK(ps_read_limit(NULL, pages, PAGE, offsets, COUNT, i % 2, &sum) == PS_ERR_ARGUMENT);
    }
    CHECK(ps_read_limit(NULL, pages, PAGE, offsets + COUNT - 1, 1, 0, NULL) == PS_ERR_ARGUMENT);
    free(block);
}

/* ---- the pool ---- */

enum { PARTS = 5000 };

typedef struct {
    atomic_uchar done[PARTS];
} counted_job;

static void count_part(void *job, size_t part)
{
    atomic_fetch_add(&((counted_job *)job)->done[part], 1);
}

static bool all_once(counted_job *job, size_t parts)
{
    bool right = true;
    for (size_t i = 0; i < PARTS; i++) {
        right &= job->done[i] == (i < parts);
        job->done[i] = 0;
    }
    return right;
}

/* Users of one pool at the same time: one of them has it, the others run alone. */
static void *use_pool(void *pool)
{
    counted_job *job = calloc(1, sizeof *job);
    require(job != NULL, "calloc");
    bool right = true;
    for (int i = 0; i < 50; i++) {
        ps_pool_run(pool, count_part, job, PARTS);
        right &= all_once(job, PARTS);
    }
    free(job);
    return right ? pool : NULL;
}

void test_pool(void)
{
    static counted_job job;
    CHECK(ps_pool_new(0) == NULL && ps_pool_new(PS_POOL_THREADS_MAX + 1) == NULL);
    ps_pool_free(NULL);
    for (unsigned threads = 1; threads <= 4; threads++) {
        ps_pool *pool = ps_pool_new(threads);
        require(pool != NULL, "ps_pool_new");
        for (size_t parts = 0; parts <= PARTS; parts = parts * 3 + 1) {
            ps_pool_run(pool, count_part, &job, parts);
            CHECK(all_once(&job, parts));
        }
        pthread_t users[3];
        for (int i = 0; i < 3; i++) {
            require(pthread_create(&users[i], NULL, use_pool, pool) == 0, "thread");
        }
        for (int i = 0; i < 3; i++) {
            void *result;
            pthread_join(users[i], &result);
            CHECK(result == pool);
        }
        ps_pool_free(pool);
    }
}
