/* The functions that a compiler calls by itself. Built without the optimisation that would turn
 * their loops into calls of themselves. */
#include <stddef.h>
#include <stdint.h>

void *memcpy(void *restrict to, const void *restrict from, size_t size);
void *memmove(void *to, const void *from, size_t size);
void *memset(void *to, int value, size_t size);
int memcmp(const void *left, const void *right, size_t size);

/* Words of the machine that may alias anything and lie anywhere. */
typedef uint64_t __attribute__((may_alias, aligned(1))) word;

void *memcpy(void *restrict to, const void *restrict from, size_t size)
{
    size_t at = 0;
    for (; at + sizeof(word) <= size; at += sizeof(word)) {
        *(word *)((uint8_t *)to + at) = *(const word *)((const uint8_t *)from + at);
    }
    for (; at < size; at++) {
        ((uint8_t *)to)[at] = ((const uint8_t *)from)[at];
    }
    return to;
}

void *memmove(void *to, const void *from, size_t size)
{
    if ((uintptr_t)to - (uintptr_t)from >= size) {
        return memcpy(to, from, size);
    }
    while (size-- > 0) {
        ((uint8_t *)to)[size] = ((const uint8_t *)from)[size];
    }
    return to;
}

void *memset(void *to, int value, size_t size)
{
    uint64_t filled = (uint8_t)value * UINT64_C(0x0101010101010101);
    size_t at = 0;
    for (; at + sizeof(word) <= size; at += sizeof(word)) {
        *(word *)((uint8_t *)to + at) = filled;
    }
    for (; at < size; at++) {
        ((uint8_t *)to)[at] = (uint8_t)value;
    }
    return to;
}

int memcmp(const void *left, const void *right, size_t size)
{
    const uint8_t *a = left, *b = right;
    for (size_t at = 0; at < size; at++) {
        if (a[at] != b[at]) {
            return a[at] < b[at] ? -1 : 1;
        }
    }
    return 0;
}
