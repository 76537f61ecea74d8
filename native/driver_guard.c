/* Native test driver, the fault guard: mappings that shrink, threads, handlers of others. */
#define _GNU_SOURCE
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "driver.h"

/* A shared mapping of a file of `count` pages, of which only `kept` are left. */
static uint8_t *map_truncated(size_t count, size_t kept)
{
    FILE *file = tmpfile();
    require(file != NULL, "tmpfile");
    int descriptor = fileno(file);
    require(ftruncate(descriptor, (off_t)(count * PAGE)) == 0, "ftruncate");
    void *map = mmap(NULL, count * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    require(map != MAP_FAILED, "mmap");
    fill_pages(map, count);
    require(ftruncate(descriptor, (off_t)(kept * PAGE)) == 0, "ftruncate");
    fclose(file);
    return map;
}

/* Whether a scan of `map`, whose pages from `kept` on are gone, tells exactly that. */
static bool scan_is_right(const uint8_t *map, size_t count, size_t kept)
{
    uint8_t digests[PAGES_MAX * DIGEST_MAX], statuses[PAGES_MAX];
    uint64_t indices[1] = {0};
    ps_tally tally;
    size_t gone = count - kept;
    bool right = ps_digest_range(&method, map, count, frames(), digests, statuses) == PS_OK;
    right &= memcmp(digests, reference_digests(), kept * digest_size) == 0;
    right &= all_equal(statuses, PS_PAGE_OK, kept);
    right &= all_equal(statuses + kept, PS_PAGE_LINK_DOWN, gone);
    right &= all_equal(digests + kept * digest_size, PS_POISON, gone * digest_size);
    right &= ps_compare_range(&method, map, count, frames(), reference_digests(), statuses,
                              indices, 1, &tally) == PS_OK;
    right &= tally.ok == kept && tally.unreadable == gone && tally.mismatched == 0;
    return right && (gone == 0 || indices[0] == kept);
}

/* A mapping of which nothing is left, twice: the guard holds for the second scan, too. */
static bool all_gone(void)
{
    enum { COUNT = 3 };
    uint8_t *map = map_truncated(COUNT, 0);
    bool right = scan_is_right(map, COUNT, 0) && scan_is_right(map, COUNT, 0);
    munmap(map, COUNT * PAGE);
    return right;
}

void test_truncated(void)
{
    static const size_t kept[] = {63, 64, 130, 250, 256, PAGES_MAX};
    for (size_t i = 0; i < sizeof kept / sizeof *kept; i++) {
        uint8_t *map = map_truncated(PAGES_MAX, kept[i]);
        CHECK(scan_is_right(map, PAGES_MAX, kept[i]));
        munmap(map, PAGES_MAX * PAGE);
    }
    CHECK(all_gone());
    /* Gone and readable pages by turns, one of them half gone, and a protected mapping. */
    uint8_t *map = map_truncated(4, 2), *copies = malloc(5 * PAGE), statuses[5];
    require(copies != NULL, "malloc");
    const uint64_t offsets[5] = {0, 2 * PAGE, PAGE, 3 * PAGE, PAGE + 1};
    const uint8_t expected[5] = {PS_PAGE_OK, PS_PAGE_LINK_DOWN, PS_PAGE_OK, PS_PAGE_LINK_DOWN,
                                 PS_PAGE_LINK_DOWN};
    CHECK(ps_copy_list(method.pool, map, 4 * PAGE, offsets, 5, copies, statuses) == PS_OK);
    CHECK(memcmp(statuses, expected, 5) == 0);
    CHECK(memcmp(copies, map, PAGE) == 0 && memcmp(copies + 2 * PAGE, map + PAGE, PAGE) == 0);
    CHECK(all_equal(copies + PAGE, PS_POISON, PAGE));
    CHECK(all_equal(copies + 3 * PAGE, PS_POISON, 2 * PAGE));
    require(mprotect(map, 4 * PAGE, PROT_NONE) == 0, "mprotect");
    CHECK(ps_copy_list(method.pool, map, 4 * PAGE, offsets, 5, copies, statuses) == PS_OK);
    CHECK(all_equal(statuses, PS_PAGE_LINK_DOWN, 5));
    free(copies);
    munmap(map, 4 * PAGE);

    sigset_t mask;
    pthread_sigmask(SIG_BLOCK, NULL, &mask);
    CHECK(!sigismember(&mask, SIGBUS) && !sigismember(&mask, SIGSEGV));
}

static pthread_barrier_t start_line;

static void *scan_many_times(void *right)
{
    uint8_t *map = map_truncated(PAGES_MAX, 240);
    pthread_barrier_wait(&start_line);
    *(bool *)right = true;
    for (int i = 0; i < 20; i++) {
        *(bool *)right &= scan_is_right(map, PAGES_MAX, 240);
    }
    munmap(map, PAGES_MAX * PAGE);
    return NULL;
}

void test_threads(void)
{
    enum { THREADS = 3 };
    pthread_t threads[THREADS];
    bool right[THREADS];
    reference_digests();
    pthread_barrier_init(&start_line, NULL, THREADS);
    for (int i = 0; i < THREADS; i++) {
        require(pthread_create(&threads[i], NULL, scan_many_times, &right[i]) == 0, "thread");
    }
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        CHECK(right[i]);
    }
    pthread_barrier_destroy(&start_line);
}

/* ---- handlers of others: each case is a child that ends in its own way ---- */

enum { FOREIGN_EXIT = 42 };

static uint8_t *half_gone; /* two pages, the second one gone */
static sigjmp_buf foreign_jump;
static struct sigaction displaced;

static bool scan_half_gone(void)
{
    return scan_is_right(half_gone, 2, 1);
}

static void touch_gone_page(void)
{
    *(volatile uint8_t *)(half_gone + PAGE);
}

static void set_handler(int number, void (*handler)(int, siginfo_t *, void *))
{
    struct sigaction action = {.sa_flags = SA_SIGINFO | SA_NODEFER, .sa_sigaction = handler};
    sigaction(number, &action, &displaced);
}

static void exit_on_fault(int number, siginfo_t *info, void *context)
{
    (void)context;
    bool told = number == SIGBUS && info->si_addr == half_gone + PAGE;
    _exit(told ? FOREIGN_EXIT : 1);
}

static void exit_on_sent(int number, siginfo_t *info, void *context)
{
    (void)context;
    bool told = number == SIGBUS && info->si_code == SI_TKILL && info->si_pid == getpid();
    _exit(told ? FOREIGN_EXIT : 1);
}

static void jump_out(int number, siginfo_t *info, void *context)
{
    (void)info;
    (void)context;
    siglongjmp(foreign_jump, number);
}

/* What CPython's faulthandler does. */
static void restore_and_raise(int number, siginfo_t *info, void *context)
{
    (void)info;
    (void)context;
    sigaction(number, &displaced, NULL);
    raise(number);
}

static void handler_before(void)
{
    set_handler(SIGBUS, exit_on_fault);
    if (scan_half_gone()) {
        touch_gone_page();
    }
}

static void handler_after(void)
{
    bool right = scan_half_gone();
    set_handler(SIGBUS, exit_on_fault);
    if (right && scan_half_gone()) {
        touch_gone_page();
    }
}

static void handler_of_sent_signal(void)
{
    set_handler(SIGBUS, exit_on_sent);
    if (scan_half_gone()) {
        raise(SIGBUS);
    }
}

/* A load that faults, and is not about the guarded page. */
static void touch_elsewhere(void *job)
{
    (void)job;
    touch_gone_page();
}

/* A signal that claims to be about the guarded page, but was sent. */
static void send_about_page(void *job)
{
    siginfo_t info = {.si_code = SI_QUEUE};
    info.si_addr = job;
    syscall(SYS_rt_tgsigqueueinfo, getpid(), gettid(), SIGBUS, &info);
}

static void run_guarded(ps_guarded_fn *run, uint8_t *page)
{
    set_handler(SIGBUS, exit_on_fault);
    if (ps_guard_install() == PS_OK) {
        ps_guard_run(page, PAGE, run, page);
    }
}

static void handler_of_fault_elsewhere(void)
{
    run_guarded(touch_elsewhere, half_gone);
}

static void handler_of_signal_in_scan(void)
{
    run_guarded(send_about_page, half_gone + PAGE);
}

static void handler_that_recovers(void)
{
    volatile int recovered = 0;
    set_handler(SIGBUS, jump_out);
    if (sigsetjmp(foreign_jump, 1) == SIGBUS) {
        recovered++;
    }
    if (scan_half_gone() && recovered < 2) {
        touch_gone_page();
    }
    _exit(recovered == 2 && scan_half_gone() ? FOREIGN_EXIT : 1);
}

static void no_handler(void)
{
    signal(SIGBUS, SIG_DFL);
    if (scan_half_gone()) {
        touch_gone_page();
    }
}

static void no_handler_protected(void)
{
    uint8_t digest[DIGEST_MAX], status;
    signal(SIGSEGV, SIG_DFL);
    mprotect(half_gone, 2 * PAGE, PROT_NONE);
    if (ps_digest_range(&method, half_gone, 1, NULL, digest, &status) == PS_OK &&
        status == PS_PAGE_LINK_DOWN) {
        touch_gone_page();
    }
}

static void handler_that_passes_back(void)
{
    signal(SIGBUS, SIG_DFL);
    bool right = scan_half_gone();
    set_handler(SIGBUS, restore_and_raise);
    if (right && scan_half_gone()) {
        touch_gone_page();
    }
}

/* The wait status of a child that runs `body`. */
static int status_of(void (*body)(void))
{
    fflush(stdout);
    pid_t child = fork();
    require(child >= 0, "fork");
    if (child == 0) {
        setrlimit(RLIMIT_CORE, &(struct rlimit){0, 0});
        alarm(20); /* a loop between handlers must not hang the run */
        body();
        _exit(1);
    }
    int status;
    require(waitpid(child, &status, 0) == child, "waitpid");
    return status;
}

static bool exits_by_handler(void (*body)(void))
{
    int status = status_of(body);
    return WIFEXITED(status) && WEXITSTATUS(status) == FOREIGN_EXIT;
}

static bool dies_by(int number, void (*body)(void))
{
    int status = status_of(body);
    return WIFSIGNALED(status) && WTERMSIG(status) == number;
}

void test_foreign_handlers(void)
{
    method = (ps_method){.digest = PS_DIGEST_SHA256};
    digest_size = PS_SHA256_SIZE;
    half_gone = map_truncated(2, 1);
    CHECK(exits_by_handler(handler_before));
    CHECK(exits_by_handler(handler_after));
    CHECK(exits_by_handler(handler_of_sent_signal));
    CHECK(exits_by_handler(handler_of_fault_elsewhere));
    CHECK(exits_by_handler(handler_of_signal_in_scan));
    CHECK(exits_by_handler(handler_that_recovers));
    CHECK(dies_by(SIGBUS, no_handler));
    CHECK(dies_by(SIGSEGV, no_handler_protected));
    CHECK(dies_by(SIGBUS, handler_that_passes_back));
    munmap(half_gone, 2 * PAGE);
}
