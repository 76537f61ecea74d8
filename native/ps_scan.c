/* The fused loop: read, digest, compare, emit, in one pass over the pages.
 *
 * It knows neither the digest nor the instruction set: it gathers readable pages, runs a
 * ps_work_fn over them under the guard, and gives every page its status. Copying and mere
 * reading are more kinds of work. A call is cut into parts that the threads of a pool take one
 * by one; each writes to its own pages' places, so the results are the same for any number.
 */
#include <stdatomic.h>
#include <string.h>

#include "ps_internal.h"

/* Pages that a thread takes at once, one MiB: long enough for a stream, short enough that the
 * threads end together. A multiple of PS_BATCH_MAX. */
enum { PART_PAGES = 256 };

/* While a comparison runs, this status marks a page that was read and differs. It is none of
 * ps_page_status, and it is gone when the call returns. */
enum { DIFFERS = 0xFF };

/* The pages of one call: `offsets[i]` into `length` mapped bytes at `base`. Without
 * offsets the pages stand one behind the other. */
typedef struct {
    const uint8_t *base;
    size_t length;
    const uint64_t *offsets;
    const uint64_t *frames;
    size_t count;
} page_list;

/* What is done to each page, and how many bytes come out. */
typedef struct {
    ps_work_fn *run;
    ps_aes_fn *aes;
    const ps_key *key;
    size_t result_size;
    ps_pool *pool;
} page_work;

/* One call. `results` are kept, or else held against `expected`. */
typedef struct {
    const page_work *work;
    const page_list *list;
    uint8_t *results;
    const uint8_t *expected;
    uint8_t *statuses;
    atomic_size_t ok, mismatched, unreadable;
} page_job;

/* The work of a method, if the method and the list fit together. */
static int work_from_method(page_work *work, const ps_method *method, const page_list *list)
{
    if (method == NULL) {
        return PS_ERR_ARGUMENT;
    }
    int form = ps_form_pick(method->digest, method->form);
    if (form < 0) {
        return form;
    }
    bool keyed = ps_key_words_size(method->digest) > 0;
    bool key_fits = method->key != NULL && method->key->digest == method->digest;
    if (keyed && !(key_fits && (list->frames != NULL || list->count == 0))) {
        return PS_ERR_ARGUMENT;
    }
    *work = (page_work){ps_dispatch_work(method->digest, form), ps_dispatch_aes(form),
                        keyed ? method->key : NULL, ps_digest_size(method->digest), method->pool};
    return PS_OK;
}

static void copy_pages(const ps_batch *batch)
{
    for (size_t i = 0; i < batch->count; i++) {
        memcpy(batch->results + i * PS_PAGE_SIZE, batch->pages[i], PS_PAGE_SIZE);
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

/* What ps_guard_run() runs. */
typedef struct {
    ps_work_fn *run;
    ps_batch batch;
} guarded_batch;

static void run_batch(void *job)
{
    const guarded_batch *guarded = job;
    guarded->run(&guarded->batch);
}

static bool run_guarded(const page_list *list, guarded_batch *guarded)
{
    return ps_guard_run(list->base, list->length, run_batch, guarded);
}

/* Runs the work over pages that may fault. The guard tells that one of them did, not which
 * of the others came out well before it: after a fault each runs on its own. */
static void work_on_pages(const page_job *job, guarded_batch *guarded, uint8_t *statuses)
{
    const ps_batch all = guarded->batch;
    if (run_guarded(job->list, guarded)) {
        memset(statuses, PS_PAGE_OK, all.count);
        return;
    }
    for (size_t i = 0; i < all.count; i++) {
        const uint8_t *const page = all.pages[i];
        const uint8_t *const pages[1 + PS_LANES] = {page, page, page, page, page};
        guarded->batch.pages = pages;
        guarded->batch.frames = all.frames != NULL ? all.frames + i : NULL;
        guarded->batch.count = 1;
        guarded->batch.results = all.results + i * job->work->result_size;
        statuses[i] = PS_PAGE_OK;
        if (!run_guarded(job->list, guarded)) {
            statuses[i] = PS_PAGE_LINK_DOWN;
            memset(guarded->batch.results, PS_POISON, job->work->result_size);
        }
    }
}

/* The pages from `index` on, to be prefetched; where there are none, those before again. */
static void add_pages_ahead(const page_list *list, size_t index, const uint8_t **pages)
{
    for (size_t i = 0; i < PS_LANES; i++) {
        const uint8_t *ahead = i < list->count - index ? page_at(list, index + i) : NULL;
        pages[i] = ahead != NULL ? ahead : pages[-1];
    }
}

/* One batch: pages `first` to `first + count - 1`, at most PS_BATCH_MAX of them. */
static void work_on_batch(const page_job *job, size_t first, size_t count, uint8_t *results)
{
    const page_list *list = job->list;
    const page_work *work = job->work;
    const uint8_t *pages[PS_BATCH_MAX + PS_LANES];
    size_t done = 0;
    while (done < count) {
        size_t at = first + done, run = 0;
        while (done + run < count && (pages[run] = page_at(list, at + run)) != NULL) {
            run++;
        }
        uint8_t *result = results + done * work->result_size;
        if (run > 0) {
            add_pages_ahead(list, at + run, pages + run);
            guarded_batch guarded = {
                work->run,
                {pages, list->frames != NULL ? list->frames + at : NULL, run, work->key, work->aes,
                 result}};
            work_on_pages(job, &guarded, job->statuses + at);
            done += run;
        } else {
            memset(result, PS_POISON, work->result_size);
            job->statuses[at] = PS_PAGE_HOLE;
            done++;
        }
    }
}

/* Tells ok, mismatched and unreadable pages of a batch apart, and marks the second. */
static void compare_batch(page_job *job, size_t first, size_t count, const uint8_t *digests)
{
    size_t size = job->work->result_size, mismatched = 0, unreadable = 0;
    const uint8_t *expected = job->expected + first * size;
    uint8_t *statuses = job->statuses + first;
    for (size_t i = 0; i < count; i++) {
        if (statuses[i] != PS_PAGE_OK) {
            unreadable++;
        } else if (memcmp(digests + i * size, expected + i * size, size) != 0) {
            statuses[i] = DIFFERS;
            mismatched++;
        }
    }
    atomic_fetch_add_explicit(&job->ok, count - mismatched - unreadable, memory_order_relaxed);
    atomic_fetch_add_explicit(&job->mismatched, mismatched, memory_order_relaxed);
    atomic_fetch_add_explicit(&job->unreadable, unreadable, memory_order_relaxed);
}

static void do_part(void *context, size_t part)
{
    page_job *job = context;
    size_t first = part * PART_PAGES;
    size_t left = job->list->count - first;
    size_t end = first + (left < PART_PAGES ? left : PART_PAGES);
    uint8_t digests[PS_BATCH_MAX * PS_DIGEST_SIZE_MAX];
    for (size_t at = first; at < end; at += PS_BATCH_MAX) {
        size_t count = end - at < PS_BATCH_MAX ? end - at : PS_BATCH_MAX;
        if (job->expected != NULL) {
            work_on_batch(job, at, count, digests);
            compare_batch(job, at, count, digests);
        } else {
            work_on_batch(job, at, count, job->results + at * job->work->result_size);
        }
    }
}

static int do_job(page_job *job)
{
    int result = ps_guard_install();
    if (result == PS_OK) {
        size_t count = job->list->count;
        ps_pool_run(job->work->pool, do_part, job, count / PART_PAGES + (count % PART_PAGES > 0));
    }
    return result;
}

/* `count` pages from `pages` on, if there can be that many. */
static int list_from_range(page_list *list, const uint8_t *pages, size_t count,
                           const uint64_t *frames)
{
    size_t count_max = (UINTPTR_MAX - (uintptr_t)pages) / PS_PAGE_SIZE;
    bool fits = count == 0 || (pages != NULL && count <= count_max);
    *list = (page_list){pages, fits ? count * PS_PAGE_SIZE : 0, NULL, frames, count};
    return fits ? PS_OK : PS_ERR_ARGUMENT;
}

static int list_from_offsets(page_list *list, const uint8_t *base, size_t base_length,
                             const uint64_t *offsets, size_t count, const uint64_t *frames)
{
    *list = (page_list){base, base_length, offsets, frames, count};
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
    page_job job = {.work = work, .list = list, .results = results, .statuses = statuses};
    return do_job(&job);
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

/* Lists what is not equal, in order whatever the threads did, and takes the marks away. */
static void emit(const comparison *to, size_t count)
{
    size_t unequal = to->tally->mismatched + to->tally->unreadable;
    for (size_t i = 0; unequal > 0 && i < count; i++) {
        if (to->statuses[i] == PS_PAGE_OK) {
            continue;
        }
        unequal--;
        if (to->statuses[i] == DIFFERS) {
            to->statuses[i] = PS_PAGE_OK;
        }
        if (to->tally->listed < to->indices_max) {
            to->indices[to->tally->listed++] = i;
        }
    }
}

static int compare(const page_work *work, const page_list *list, const comparison *to)
{
    if (!comparison_complete(to, list->count)) {
        return PS_ERR_ARGUMENT;
    }
    page_job job = {
        .work = work, .list = list, .expected = to->expected, .statuses = to->statuses};
    int result = do_job(&job);
    *to->tally = (ps_tally){job.ok, job.mismatched, job.unreadable, 0};
    emit(to, list->count);
    return result;
}

int ps_digest_range(const ps_method *method, const uint8_t *pages, size_t count,
                    const uint64_t *frames, uint8_t *digests, uint8_t *statuses)
{
    page_list list;
    page_work work;
    int result = list_from_range(&list, pages, count, frames);
    result = result == PS_OK ? work_from_method(&work, method, &list) : result;
    return result == PS_OK ? produce(&work, &list, digests, statuses) : result;
}

int ps_digest_list(const ps_method *method, const uint8_t *base, size_t base_length,
                   const uint64_t *offsets, size_t count, const uint64_t *frames,
                   uint8_t *digests, uint8_t *statuses)
{
    page_list list;
    page_work work;
    int result = list_from_offsets(&list, base, base_length, offsets, count, frames);
    result = result == PS_OK ? work_from_method(&work, method, &list) : result;
    return result == PS_OK ? produce(&work, &list, digests, statuses) : result;
}

int ps_compare_range(const ps_method *method, const uint8_t *pages, size_t count,
                     const uint64_t *frames, const uint8_t *expected, uint8_t *statuses,
                     uint64_t *indices, size_t indices_max, ps_tally *tally)
{
    page_list list;
    page_work work;
    const comparison to = {expected, statuses, indices, indices_max, tally};
    int result = list_from_range(&list, pages, count, frames);
    result = result == PS_OK ? work_from_method(&work, method, &list) : result;
    return result == PS_OK ? compare(&work, &list, &to) : result;
}

int ps_compare_list(const ps_method *method, const uint8_t *base, size_t base_length,
                    const uint64_t *offsets, size_t count, const uint64_t *frames,
                    const uint8_t *expected, uint8_t *statuses, uint64_t *indices,
                    size_t indices_max, ps_tally *tally)
{
    page_list list;
    page_work work;
    const comparison to = {expected, statuses, indices, indices_max, tally};
    int result = list_from_offsets(&list, base, base_length, offsets, count, frames);
    result = result == PS_OK ? work_from_method(&work, method, &list) : result;
    return result == PS_OK ? compare(&work, &list, &to) : result;
}

int ps_copy_list(ps_pool *pool, const uint8_t *base, size_t base_length, const uint64_t *offsets,
                 size_t count, uint8_t *pages, uint8_t *statuses)
{
    page_list list;
    const page_work work = {.run = copy_pages, .result_size = PS_PAGE_SIZE, .pool = pool};
    int result = list_from_offsets(&list, base, base_length, offsets, count, NULL);
    return result == PS_OK ? produce(&work, &list, pages, statuses) : result;
}

int ps_nh4aes_finish(const ps_key *key, const uint64_t *sums, const uint64_t *frames,
                     size_t count, uint8_t *digests)
{
    bool given = key != NULL && key->digest == PS_DIGEST_NH4AES;
    if (!given || (count > 0 && (sums == NULL || frames == NULL || digests == NULL))) {
        return PS_ERR_ARGUMENT;
    }
    ps_batch batch = {.key = key, .aes = ps_dispatch_aes(PS_FORM_AUTO)};
    for (size_t at = 0; at < count; at += PS_BATCH_MAX) {
        batch.count = count - at < PS_BATCH_MAX ? count - at : PS_BATCH_MAX;
        batch.frames = frames + at;
        batch.results = digests + at * PS_KEYED_SIZE;
        ps_nh4aes_finish_batch(&batch, sums + at * PS_NH_PASSES);
    }
    return PS_OK;
}

typedef struct {
    page_job job;
    _Atomic uint64_t sum;
    atomic_bool failed;
} read_job;

static void read_part(void *context, size_t part)
{
    read_job *reading = context;
    size_t first = part * PART_PAGES, left = reading->job.list->count - first;
    size_t end = first + (left < PART_PAGES ? left : PART_PAGES);
    uint64_t words[PS_BATCH_MAX];
    for (size_t at = first; at < end; at += PS_BATCH_MAX) {
        size_t count = end - at < PS_BATCH_MAX ? end - at : PS_BATCH_MAX;
        const uint8_t *pages[PS_BATCH_MAX];
        bool present = true;
        for (size_t i = 0; i < count; i++) {
            pages[i] = page_at(reading->job.list, at + i);
            present &= pages[i] != NULL;
        }
        guarded_batch guarded = {reading->job.work->run,
                                 {.pages = pages, .count = count, .results = (uint8_t *)words}};
        if (!present || !run_guarded(reading->job.list, &guarded)) {
            reading->failed = true;
            return;
        }
        for (size_t i = 0; i < count; i++) {
            atomic_fetch_xor_explicit(&reading->sum, words[i], memory_order_relaxed);
        }
    }
}

int ps_read_limit(ps_pool *pool, const uint8_t *base, size_t base_length, const uint64_t *offsets,
                  size_t count, int interleaved, uint64_t *sum)
{
    page_list list;
    int result = list_from_offsets(&list, base, base_length, offsets, count, NULL);
    if (result != PS_OK || sum == NULL) {
        return PS_ERR_ARGUMENT;
    }
    result = ps_guard_install();
    if (result != PS_OK) {
        return result;
    }
    const page_work work = {
        .run = ps_dispatch_read(interleaved != 0), .result_size = sizeof *sum, .pool = pool};
    read_job reading = {.job = {.work = &work, .list = &list}};
    ps_pool_run(pool, read_part, &reading, count / PART_PAGES + (count % PART_PAGES > 0));
    *sum = reading.sum;
    return reading.failed ? PS_ERR_ARGUMENT : PS_OK;
}
