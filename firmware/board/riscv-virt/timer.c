/* The machine timer (SiFive CLINT; RISC-V privileged architecture, 3.1.10 and 3.2.1). It has one
 * comparator, which serves two ends: it wakes a sleeper, and it is the watchdog. */
#include "board.h"

enum {
    MTIMECMP = 0x4000, /* of hart 0, from the CLINT's base */
    WATCHDOG_US = 2000000, /* docs/spec/card-link.md, 3.6 */
    INTERRUPT_TIMER = 7,
    MSTATUS_MIE = 1 << 3,
    MIE_MTIE = 1 << 7,
    FINISHER_RESET = 0x7777 /* hw/misc/sifive_test.h of QEMU */
};

#define LAST_WORDS_MAGIC UINT64_C(0x2173647257747351)

/* Outlives a reset; link.ld. Volatile: nobody is seen to read it. */
extern volatile struct {
    uint64_t magic, cause, address, sum;
} ps_last_words;

static volatile uint64_t *comparator;
static volatile uint32_t *finisher;
static uint64_t ticks_per_us, kicked;

void ps_trap(void);

static uint64_t ticks(void)
{
    uint64_t now;
    __asm__ volatile("csrr %0, time" : "=r"(now));
    return now;
}

uint64_t timer_us(void)
{
    return ticks() / ticks_per_us;
}

void timer_kick(void)
{
    *(volatile uint64_t *)&kicked = ticks();
}

static uint64_t bite(void)
{
    return *(volatile uint64_t *)&kicked + WATCHDOG_US * ticks_per_us;
}

/* The machine starts anew. It tells why on the next start, when it has a log again. */
static void reset(uint64_t cause, uint64_t address)
{
    ps_last_words.cause = cause;
    ps_last_words.address = address;
    ps_last_words.sum = ~(cause ^ address);
    ps_last_words.magic = LAST_WORDS_MAGIC;
    for (;;) {
        *finisher = FINISHER_RESET;
    }
}

/* All traps: the watchdog's interrupt, and faults of the firmware. */
__attribute__((interrupt("machine"), aligned(4))) void ps_trap(void)
{
    uint64_t cause, address;
    __asm__ volatile("csrr %0, mcause" : "=r"(cause));
    __asm__ volatile("csrr %0, mepc" : "=r"(address));
    bool timer = cause == (UINT64_C(1) << 63 | INTERRUPT_TIMER);
    if (!timer || ticks() >= bite()) {
        reset(cause, address);
    }
    *comparator = bite();
}

bool timer_init(const board_machine *machine)
{
    if (machine->timebase_hz == 0 || machine->timebase_hz % 1000000 != 0) {
        return false;
    }
    comparator = (volatile uint64_t *)(machine->clint + MTIMECMP);
    finisher = (volatile uint32_t *)machine->finisher;
    ticks_per_us = machine->timebase_hz / 1000000;
    timer_kick();
    *comparator = bite();
    __asm__ volatile("csrs mie, %0" ::"r"((uint64_t)MIE_MTIE));
    __asm__ volatile("csrs mstatus, %0" ::"r"((uint64_t)MSTATUS_MIE));
    return true;
}

/* With interrupts off, wfi still wakes by the timer, and no wake-up falls between the check and
 * the sleep. */
void timer_sleep(uint32_t us)
{
    uint64_t wake = ticks() + us * ticks_per_us, limit = bite();
    __asm__ volatile("csrc mstatus, %0" ::"r"((uint64_t)MSTATUS_MIE));
    *comparator = wake < limit ? wake : limit;
    __asm__ volatile("wfi" ::: "memory");
    *comparator = limit;
    __asm__ volatile("csrs mstatus, %0" ::"r"((uint64_t)MSTATUS_MIE));
}

const char *timer_last_words(uint64_t *address)
{
    bool whole = ps_last_words.magic == LAST_WORDS_MAGIC &&
                 ps_last_words.sum == ~(ps_last_words.cause ^ ps_last_words.address);
    bool watchdog = ps_last_words.cause >> 63;
    *address = ps_last_words.address;
    ps_last_words.magic = 0;
    if (!whole) {
        return NULL;
    }
    return watchdog ? "reset by the watchdog: no turn of the loop for 2 s; it was at "
                    : "reset after a fault of the firmware, at ";
}
