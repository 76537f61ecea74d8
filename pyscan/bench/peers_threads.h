/* Shares the pages of a call between threads that live as long as the call: tens of
 * microseconds for each, which is little beside a sweep, and far less than threads of Python. */
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { PAGE = 4096, THREADS_MAX = 64 };

/* Goes over `count` pages; `other` is what stands beside them, in the same order. */
typedef size_t work_fn(const uint8_t *base, const uint64_t *offsets, size_t count, uint8_t *other);

typedef struct {
    work_fn *work;
    const uint8_t *base;
    const uint64_t *offsets;
    size_t count;
    uint8_t *other;
    size_t result;
} share;

static const uint8_t *page_at(const uint8_t *base, const uint64_t *offsets, size_t index)
{
    return base + (offsets ? offsets[index] : index * (uint64_t)PAGE);
}

static void *run_share(void *argument)
{
    share *mine = argument;
    mine->result = mine->work(mine->base, mine->offsets, mine->count, mine->other);
    return NULL;
}

/* The sum of what `work` gives for each share; `other_size` bytes of `other` belong to a
 * page. A thread that cannot be had leaves its share to the caller. */
static size_t spread(work_fn *work, const uint8_t *base, const uint64_t *offsets, size_t count,
                     uint8_t *other, size_t other_size, unsigned threads)
{
    share shares[THREADS_MAX];
    pthread_t handles[THREADS_MAX];
    int started[THREADS_MAX];
    size_t total = 0;
    threads = threads < 1 ? 1 : threads > THREADS_MAX ? THREADS_MAX : threads;
    for (unsigned i = threads; i-- > 0;) {
        size_t first = count * i / threads;
        shares[i] = (share){work,
                            offsets ? base : base + first * PAGE,
                            offsets ? offsets + first : NULL,
                            count * (i + 1) / threads - first,
                            other + first * other_size,
                            0};
        started[i] = i > 0 && pthread_create(&handles[i], NULL, run_share, &shares[i]) == 0;
        if (!started[i]) {
            run_share(&shares[i]);
        }
    }
    for (unsigned i = 0; i < threads; i++) {
        if (started[i]) {
            pthread_join(handles[i], NULL);
        }
        total += shares[i].result;
    }
    return total;
}
