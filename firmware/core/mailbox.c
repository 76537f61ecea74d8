/* Access to memory that another machine reads and writes: every word once, and in order. */
#include "core.h"

void ps_mailbox_read(void *to, const uint8_t *from, size_t words)
{
    const volatile uint64_t *shared = (const volatile uint64_t *)(const void *)from;
    uint64_t *private = to;
    for (size_t i = 0; i < words; i++) {
        private[i] = shared[i];
    }
}

void ps_mailbox_write(uint8_t *to, const void *from, size_t words)
{
    volatile uint64_t *shared = (volatile uint64_t *)(void *)to;
    const uint64_t *private = from;
    __atomic_thread_fence(__ATOMIC_RELEASE);
    for (size_t i = 0; i < words; i++) {
        shared[i] = private[i];
    }
}

uint32_t ps_mailbox_load32(const uint8_t *from)
{
    return __atomic_load_n((const uint32_t *)(const void *)from, __ATOMIC_ACQUIRE);
}

uint64_t ps_mailbox_load64(const uint8_t *from)
{
    return __atomic_load_n((const uint64_t *)(const void *)from, __ATOMIC_ACQUIRE);
}

void ps_mailbox_fill(uint8_t *to, uint8_t value, size_t size)
{
    volatile uint8_t *shared = to;
    for (size_t i = 0; i < size; i++) {
        shared[i] = value;
    }
}
