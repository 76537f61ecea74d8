/* The fault guard: a page that cannot be loaded is a result, not the end of the process.
 *
 * A mapping faults when its file was truncated or its device went away (SIGBUS), or when
 * it was unmapped (SIGSEGV). One handler for the whole process, and one pointer per thread
 * that says which memory the thread is loading right now. A fault inside that memory jumps
 * back to ps_guard_run(); every other signal belongs to whoever handled it before us.
 *
 * The jump saves no signal mask, as that is a system call per batch. While the handler
 * runs, the kernel blocks exactly the guarded signals, and it ends a thread that faults
 * while it has the signal blocked (sigprocmask(2)): unblocking both before the jump restores
 * the mask.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "ps_internal.h"

typedef struct {
    sigjmp_buf jump;
    const uint8_t *base;
    size_t length;
} load_guard;

/* What this thread is loading; NULL outside ps_guard_run(). The jump buffer stands on the
 * stack of ps_guard_run(), so the handler needs one pointer of static thread-local storage:
 * the dynamic kind may allocate at its first use, which a handler must not. */
static _Thread_local load_guard *volatile current __attribute__((tls_model("initial-exec")));

enum { GUARDED = 2 };
static const int guarded_signals[GUARDED] = {SIGBUS, SIGSEGV};

/* Who handled each signal before us: static zeros are SIG_DFL. Under `previous_lock`,
 * which is only held with the guarded signals blocked, so a handler can never wait for its
 * own thread. */
static struct sigaction previous[GUARDED];
static atomic_flag previous_lock = ATOMIC_FLAG_INIT;

static void previous_acquire(void)
{
    while (atomic_flag_test_and_set_explicit(&previous_lock, memory_order_acquire)) {
    }
}

static void previous_release(void)
{
    atomic_flag_clear_explicit(&previous_lock, memory_order_release);
}

static sigset_t guarded_set(void)
{
    sigset_t set;
    sigemptyset(&set);
    for (int i = 0; i < GUARDED; i++) {
        sigaddset(&set, guarded_signals[i]);
    }
    return set;
}

static bool guard_owns(const load_guard *guard, const siginfo_t *info)
{
    if (info->si_code <= 0) {
        return false; /* sent by a process: it has a sender instead of an address */
    }
    return (uintptr_t)info->si_addr - (uintptr_t)guard->base < guard->length;
}

static void handle_fault(int number, siginfo_t *info, void *context);

static bool is_ours(const struct sigaction *action)
{
    return (action->sa_flags & SA_SIGINFO) && action->sa_sigaction == handle_fault;
}

/* Steps aside for the previous handler and sends the signal to this thread again. It stays
 * pending until handle_fault() returns, and then meets that handler exactly as if we had
 * never been here: mask, stack, flags and the interrupted place are its own. The next scan
 * puts the guard back. `previous` is used up by that: a handler that restores ours and
 * raises the signal anew (CPython's faulthandler does) then meets SIG_DFL, not a loop. */
static void forward(int number, siginfo_t *info)
{
    int saved_errno = errno;
    struct sigaction *target = &previous[number == guarded_signals[0] ? 0 : 1];
    struct sigaction now;

    previous_acquire();
    if (sigaction(number, NULL, &now) == 0 && is_ours(&now)) {
        sigaction(number, target, NULL);
        *target = (struct sigaction){.sa_handler = SIG_DFL};
    }
    previous_release();
    syscall(SYS_rt_tgsigqueueinfo, getpid(), syscall(SYS_gettid), number, info);
    errno = saved_errno;
}

static void handle_fault(int number, siginfo_t *info, void *context)
{
    (void)context;
    load_guard *guard = current;
    if (guard == NULL || !guard_owns(guard, info)) {
        forward(number, info);
        return;
    }
    current = NULL;
    sigset_t set = guarded_set();
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    siglongjmp(guard->jump, 1);
}

/* Takes a signal over and remembers who had it. */
static bool take_over(int index)
{
    struct sigaction ours = {.sa_flags = SA_SIGINFO | SA_ONSTACK, .sa_mask = guarded_set()};
    ours.sa_sigaction = handle_fault;
    struct sigaction before;
    sigset_t mask;

    pthread_sigmask(SIG_BLOCK, &ours.sa_mask, &mask);
    previous_acquire();
    bool taken = sigaction(guarded_signals[index], &ours, &before) == 0;
    if (taken && !is_ours(&before)) {
        previous[index] = before;
    }
    previous_release();
    pthread_sigmask(SIG_SETMASK, &mask, NULL);
    return taken;
}

int ps_guard_install(void)
{
    for (int i = 0; i < GUARDED; i++) {
        /* Asked every time, at some 100 ns: a library loaded later may have replaced us. */
        struct sigaction now;
        if (sigaction(guarded_signals[i], NULL, &now) != 0 || (!is_ours(&now) && !take_over(i))) {
            return PS_ERR_GUARD;
        }
    }
    return PS_OK;
}

bool ps_guard_run(const uint8_t *base, size_t length, ps_guarded_fn *run, void *job)
{
    load_guard guard = {.base = base, .length = length};
    if (sigsetjmp(guard.jump, 0) != 0) {
        return false; /* handle_fault() has cleared `current` */
    }
    current = &guard;
    atomic_signal_fence(memory_order_seq_cst);
    run(job);
    atomic_signal_fence(memory_order_seq_cst);
    current = NULL;
    return true;
}
