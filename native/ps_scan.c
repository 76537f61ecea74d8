/* The fused loop: read, digest, compare, emit, in one pass over the pages.
 *
 * It knows neither the digest nor the instruction set: it gathers readable pages, runs a
 * ps_work_fn over them under the guard, and gives every page its status. Copying is one
 * more kind of work.
 */
#include <string.h>

#include "ps_internal.h"

/* The pages of one call: `offsets[i]` into `length` mapped bytes at `base`. Without
 * offsets the pages stand one behind the other. */
typedef struct {
    const uint8_t *base;
    size_t length;
    const uint64_t *offsets;
    size_t count;
} page_list;

/* What is done to each page, and how many bytes come out. */
typedef struct {
    ps_work_fn *run;
    size_t result_size;
} page_work;

static page_work sha256_work(void)
{
    return (page_work){ps_dispatch_sha256(), PS_SHA256_SIZE};
}

static void copy_pages(const uint8_t *const *pages, size_t count, uint8_t *copies)
{
    for (size_t i = 0; i < count; i++) {
        memcpy(copies + i * PS_PAGE_SIZE, pages[i], PS_PAGE_SIZE);
    }
}

/* Address of page `index`, or NULL where it is a hole. */
static const uint8_t *page_at(const page_list *list, size_t index)
{
    if (list->offsets == NULL) {
        return list->base + index * PS_PAGE_SIZE;
    }
    uint64_t offset = list->offsets[index];
    if (list->length < PS_PAGE_SIZE || offset > list->length - PS_PAGE_SIZE) {
        return NULL;
    }
    return list->base + offset;
}

/* Runs `work` over pages that may fault. The guard tells that one of them did, not which
 * of the others came out well before it: after a fault each runs on its own. */
static void work_on_pages(const page_work *work, const uint8_t *const *pages, size_t count,
                          uint8_t *results, uint8_t *statuses)
{
    if (ps_guard_run(work->run, pages, count, results)) {
        memset(statuses, PS_PAGE_OK, count);
        return;
    }
    for (size_t i = 0; i < count; i++) {
        uint8_t *result = results + i * work->result_size;
        statuses[i] = PS_PAGE_OK;
        if (!ps_guard_run(work->run, pages + i, 1, result)) {
            statuses[i] = PS_PAGE_LINK_DOWN;
            memset(result, PS_POISON, work->result_size);
        }
    }
}

/* One batch: pages `first` to `first + count - 1`, at most PS_BATCH_MAX of them. */
static void work_on_batch(const page_work *work, const page_list *list, size_t first, size_t count,
                          uint8_t *results, uint8_t *statuses)
{
    const uint8_t *pages[PS_BATCH_MAX];
    size_t done = 0;
    while (done < count) {
        size_t run = 0;
        while (done + run < count && (pages[run] = page_at(list, first + done + run)) != NULL) {
            run++;
        }
        uint8_t *result = results + done * work->result_size;
        if (run > 0) {
            work_on_pages(work, pages, run, result, statuses + done);
            done += run;
        } else {
            memset(result, PS_POISON, work->result_size);
            statuses[done++] = PS_PAGE_HOLE;
        }
    }
}

static size_t batch_size(const page_list *list, size_t first)
{
    size_t left = list->count - first;
    return left < PS_BATCH_MAX ? left : PS_BATCH_MAX;
}

/* `count` pages from `pages` on, if there can be that many. */
static int list_from_range(page_list *list, const uint8_t *pages, size_t count)
{
    *list = (page_list){.base = pages, .count = count};
    size_t count_max = (UINTPTR_MAX - (uintptr_t)pages) / PS_PAGE_SIZE;
    return count == 0 || (pages != NULL && count <= count_max) ? PS_OK : PS_ERR_ARGUMENT;
}

static int list_from_offsets(page_list *list, const uint8_t *base, size_t base_length,
                             const uint64_t *offsets, size_t count)
{
    *list = (page_list){.base = base, .length = base_length, .offsets = offsets, .count = count};
    bool given = base != NULL && offsets != NULL;
    bool fits = base_length <= UINTPTR_MAX - (uintptr_t)base;
    return count == 0 || (given && fits) ? PS_OK : PS_ERR_ARGUMENT;
}

/* The results of all pages, one behind the other. */
static int produce(const page_work *work, const page_list *list, uint8_t *results,
                   uint8_t *statuses)
{
    if (list->count > 0 && (results == NULL || statuses == NULL)) {
        return PS_ERR_ARGUMENT;
    }
    int result = ps_guard_install();
    for (size_t at = 0; result == PS_OK && at < list->count; at += PS_BATCH_MAX) {
        work_on_batch(work, list, at, batch_size(list, at), results + at * work->result_size,
                      statuses + at);
    }
    return result;
}

/* What compare() is held against, and where it reports to. */
typedef struct {
    const uint8_t *expected;
    uint8_t *statuses;
    uint64_t *indices;
    size_t indices_max;
    ps_tally *tally;
} comparison;

static bool comparison_complete(const comparison *to, size_t count)
{
    bool per_page = count == 0 || (to->expected != NULL && to->statuses != NULL);
    return per_page && to->tally != NULL && (to->indices_max == 0 || to->indices != NULL);
}

static void emit(const comparison *to, size_t index)
{
    if (to->tally->listed < to->indices_max) {
        to->indices[to->tally->listed++] = index;
    }
}

static void compare_batch(const comparison *to, size_t first, size_t count, const uint8_t *digests)
{
    for (size_t i = 0; i < count; i++) {
        const uint8_t *expected = to->expected + (first + i) * PS_SHA256_SIZE;
        if (to->statuses[first + i] != PS_PAGE_OK) {
            to->tally->unreadable++;
            emit(to, first + i);
        } else if (memcmp(digests + i * PS_SHA256_SIZE, expected, PS_SHA256_SIZE) != 0) {
            to->tally->mismatched++;
            emit(to, first + i);
        } else {
            to->tally->ok++;
        }
    }
}

static int compare(const page_list *list, const comparison *to)
{
    if (!comparison_complete(to, list->count)) {
        return PS_ERR_ARGUMENT;
    }
    *to->tally = (ps_tally){0};
    const page_work work = sha256_work();
    uint8_t digests[PS_BATCH_MAX * PS_SHA256_SIZE];
    int result = ps_guard_install();
    for (size_t at = 0; result == PS_OK && at < list->count; at += PS_BATCH_MAX) {
        size_t count = batch_size(list, at);
        work_on_batch(&work, list, at, count, digests, to->statuses + at);
        compare_batch(to, at, count, digests);
    }
    return result;
}

int ps_digest_range(const uint8_t *pages, size_t count, uint8_t *digests, uint8_t *statuses)
{
    page_list list;
    const page_work work = sha256_work();
    int result = list_from_range(&list, pages, count);
    return result == PS_OK ? produce(&work, &list, digests, statuses) : result;
}

int ps_digest_list(const uint8_t *base, size_t base_length, const uint64_t *offsets, size_t count,
                   uint8_t *digests, uint8_t *statuses)
{
    page_list list;
    const page_work work = sha256_work();
    int result = list_from_offsets(&list, base, base_length, offsets, count);
    return result == PS_OK ? produce(&work, &list, digests, statuses) : result;
}

int ps_compare_range(const uint8_t *pages, size_t count, const uint8_t *expected,
                     uint8_t *statuses, uint64_t *indices, size_t indices_max, ps_tally *tally)
{
    page_list list;
    const comparison to = {expected, statuses, indices, indices_max, tally};
    int result = list_from_range(&list, pages, count);
    return result == PS_OK ? compare(&list, &to) : result;
}

int ps_compare_list(const uint8_t *base, size_t base_length, const uint64_t *offsets, size_t count,
                    const uint8_t *expected, uint8_t *statuses, uint64_t *indices,
                    size_t indices_max, ps_tally *tally)
{
    page_list list;
    const comparison to = {expected, statuses, indices, indices_max, tally};
    int result = list_from_offsets(&list, base, base_length, offsets, count);
    return result == PS_OK ? compare(&list, &to) : result;
}

int ps_copy_list(const uint8_t *base, size_t base_length, const uint64_t *offsets, size_t count,
                 uint8_t *pages, uint8_t *statuses)
{
    page_list list;
    const page_work work = {copy_pages, PS_PAGE_SIZE};
    int result = list_from_offsets(&list, base, base_length, offsets, count);
    return result == PS_OK ? produce(&work, &list, pages, statuses) : result;
}
