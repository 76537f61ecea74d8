/* Threads that wait for work. They are made once; a job wakes them, and they take part after
 * part of it until none is left, so a thread that was held up costs one part and not a
 * whole share.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "ps_internal.h"

struct ps_pool {
    pthread_mutex_t busy; /* held by the call that uses the pool */
    pthread_mutex_t lock; /* the rest, but for `next` */
    pthread_cond_t wake, idle;
    uint64_t generation; /* of the job: a thread works on each once */
    unsigned working;    /* threads that have not finished the job */
    bool ending;
    ps_part_fn *run;
    void *job;
    size_t parts;
    atomic_size_t next; /* the first part that nobody has taken */
    unsigned threads;
    pthread_t thread[];
};

static void take_parts(ps_pool *pool)
{
    size_t part;
    while ((part = atomic_fetch_add_explicit(&pool->next, 1, memory_order_relaxed)) < pool->parts) {
        pool->run(pool->job, part);
    }
}

static void *thread_main(void *argument)
{
    ps_pool *pool = argument;
    uint64_t seen = 0;
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        while (!pool->ending && pool->generation == seen) {
            pthread_cond_wait(&pool->wake, &pool->lock);
        }
        if (pool->ending) {
            break;
        }
        seen = pool->generation;
        pthread_mutex_unlock(&pool->lock);
        take_parts(pool);
        pthread_mutex_lock(&pool->lock);
        if (--pool->working == 0) {
            pthread_cond_signal(&pool->idle);
        }
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

/* With every signal blocked but those of the fault guard: signals to the process are for the
 * threads of the program. */
static bool start_thread(ps_pool *pool)
{
    sigset_t blocked, before;
    sigfillset(&blocked);
    sigdelset(&blocked, SIGBUS);
    sigdelset(&blocked, SIGSEGV);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    bool started = pthread_create(&pool->thread[pool->threads], NULL, thread_main, pool) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pool->threads += started;
    return started;
}

ps_pool *ps_pool_new(unsigned threads)
{
    if (threads < 1 || threads > PS_POOL_THREADS_MAX) {
        return NULL;
    }
    ps_pool *pool = calloc(1, sizeof *pool + (threads - 1) * sizeof(pthread_t));
    if (pool == NULL) {
        return NULL;
    }
    pthread_mutex_init(&pool->busy, NULL);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->idle, NULL);
    while (pool->threads < threads - 1) {
        if (!start_thread(pool)) {
            ps_pool_free(pool);
            return NULL;
        }
    }
    return pool;
}

void ps_pool_free(ps_pool *pool)
{
    if (pool == NULL) {
        return;
    }
    pthread_mutex_lock(&pool->lock);
    pool->ending = true;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    for (unsigned i = 0; i < pool->threads; i++) {
        pthread_join(pool->thread[i], NULL);
    }
    pthread_cond_destroy(&pool->idle);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->lock);
    pthread_mutex_destroy(&pool->busy);
    free(pool);
}

static void run_in_pool(ps_pool *pool, ps_part_fn *run, void *job, size_t parts)
{
    pthread_mutex_lock(&pool->lock);
    pool->run = run;
    pool->job = job;
    pool->parts = parts;
    atomic_store_explicit(&pool->next, 0, memory_order_relaxed);
    pool->working = pool->threads;
    pool->generation++;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    take_parts(pool);
    pthread_mutex_lock(&pool->lock);
    while (pool->working > 0) {
        pthread_cond_wait(&pool->idle, &pool->lock);
    }
    pthread_mutex_unlock(&pool->lock);
}

void ps_pool_run(ps_pool *pool, ps_part_fn *run, void *job, size_t parts)
{
    bool shared = pool != NULL && pool->threads > 0 && parts > 1;
    if (shared && pthread_mutex_trylock(&pool->busy) == 0) {
        run_in_pool(pool, run, job, parts);
        pthread_mutex_unlock(&pool->busy);
        return;
    }
    for (size_t part = 0; part < parts; part++) {
        run(job, part);
    }
}
