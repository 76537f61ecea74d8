/* What memory itself can give, for comparison: reading, copying and comparing pages.
 *
 * Compiled on the machine that is measured, for that machine (-march=native), so that no
 * limit is lower than it could be. `offsets` NULL: the pages stand one behind the other.
 */
typedef uint64_t vec32 __attribute__((vector_size(32), aligned(8), may_alias));
typedef uint64_t vec64 __attribute__((vector_size(64), aligned(8), may_alias));

/* Reads `ways` pages at once, a cache line of each in turn: that many streams are in flight. */
#define READER(name, vec, ways)                                                                   \
    static size_t work_##name(const uint8_t *base, const uint64_t *offsets, size_t count,         \
                              uint8_t *other)                                                     \
    {                                                                                             \
        enum { PER_LINE = 64 / sizeof(vec) };                                                     \
        vec sum[ways] = {{0}};                                                                    \
        (void)other;                                                                              \
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
    }                                                                                             \
    /* The exclusive or of all words, when there is one thread. */                                \
    uint64_t peer_read_##name(const uint8_t *base, const uint64_t *offsets, size_t count,         \
                              unsigned threads)                                                   \
    {                                                                                             \
        return spread(work_##name, base, offsets, count, NULL, 0, threads);                       \
    }

READER(32x1, vec32, 1)
READER(32x4, vec32, 4)
READER(32x8, vec32, 8)
READER(64x1, vec64, 1)
READER(64x8, vec64, 8)

static size_t work_copy(const uint8_t *base, const uint64_t *offsets, size_t count, uint8_t *copy)
{
    if (!offsets) {
        memcpy(copy, base, count * PAGE);
        return 0;
    }
    for (size_t i = 0; i < count; i++) {
        memcpy(copy + i * PAGE, base + offsets[i], PAGE);
    }
    return 0;
}

void peer_copy(const uint8_t *base, const uint64_t *offsets, size_t count, unsigned threads,
               uint8_t *copy)
{
    spread(work_copy, base, offsets, count, copy, PAGE, threads);
}

static size_t work_compare(const uint8_t *base, const uint64_t *offsets, size_t count,
                           uint8_t *golden)
{
    size_t different = 0;
    for (size_t i = 0; i < count; i++) {
        different += memcmp(page_at(base, offsets, i), golden + i * PAGE, PAGE) != 0;
    }
    return different;
}

/* Pages that differ from the golden copy, which is packed. */
size_t peer_compare(const uint8_t *base, const uint64_t *offsets, size_t count, unsigned threads,
                    const uint8_t *golden)
{
    return spread(work_compare, base, offsets, count, (uint8_t *)golden, PAGE, threads);
}
