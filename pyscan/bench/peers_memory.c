/* What memory itself can give, for comparison: reading, copying and comparing pages.
 *
 * Compiled on the machine that is measured, for that machine (-march=native), so that no
 * limit is lower than it could be. `offsets` NULL: the pages stand one behind the other.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { PAGE = 4096 };

typedef uint64_t vec32 __attribute__((vector_size(32)));
typedef uint64_t vec64 __attribute__((vector_size(64)));

static const uint8_t *page_at(const uint8_t *base, const uint64_t *offsets, size_t index)
{
    return base + (offsets ? offsets[index] : index * (uint64_t)PAGE);
}

/* Reads `ways` pages at once, a cache line of each in turn: that many streams are in flight. */
#define READER(name, vec, ways)                                                                   \
    uint64_t name(const uint8_t *base, const uint64_t *offsets, size_t count)                     \
    {                                                                                             \
        enum { PER_LINE = 64 / sizeof(vec) };                                                     \
        vec sum[ways] = {{0}};                                                                    \
        for (size_t i = 0; i < count; i += (ways)) {                                              \
            const vec *page[ways];                                                                \
            for (size_t w = 0; w < (ways); w++) {                                                 \
                size_t index = i + w < count ? i + w : count - 1;                                 \
                page[w] = (const vec *)page_at(base, offsets, index);                             \
            }                                                                                     \
            for (size_t at = 0; at < PAGE / sizeof(vec); at += PER_LINE) {                        \
                for (size_t w = 0; w < (ways); w++) {                                             \
                    for (size_t v = 0; v < PER_LINE; v++) {                                       \
                        sum[w] ^= page[w][at + v];                                                \
                    }                                                                             \
                }                                                                                 \
            }                                                                                     \
        }                                                                                         \
        uint64_t total = 0;                                                                       \
        for (size_t w = 0; w < (ways); w++) {                                                     \
            for (size_t v = 0; v < sizeof(vec) / 8; v++) {                                        \
                total ^= sum[w][v];                                                               \
            }                                                                                     \
        }                                                                                         \
        return total;                                                                             \
    }

READER(peer_read_32x1, vec32, 1)
READER(peer_read_32x4, vec32, 4)
READER(peer_read_32x8, vec32, 8)
READER(peer_read_64x1, vec64, 1)
READER(peer_read_64x8, vec64, 8)

void peer_copy(const uint8_t *base, const uint64_t *offsets, size_t count, uint8_t *copy)
{
    if (!offsets) {
        memcpy(copy, base, count * PAGE);
        return;
    }
    for (size_t i = 0; i < count; i++) {
        memcpy(copy + i * PAGE, base + offsets[i], PAGE);
    }
}

/* Pages that differ from the golden copy, which is packed. */
size_t peer_compare(const uint8_t *base, const uint64_t *offsets, size_t count,
                    const uint8_t *golden)
{
    size_t different = 0;
    for (size_t i = 0; i < count; i++) {
        different += memcmp(page_at(base, offsets, i), golden + i * PAGE, PAGE) != 0;
    }
    return different;
}
