/* The read limit: nothing but loads, as the yardstick of every scan. */
#include <string.h>

#include "ps_internal.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { LANES = 8 };

static void put_sum(const ps_batch *batch, size_t index, uint64_t sum)
{
    memcpy(batch->results + sizeof sum * index, &sum, sizeof sum);
}

void ps_read_pages_portable(const ps_batch *batch)
{
    for (size_t i = 0; i < batch->count; i++) {
        uint64_t sum = 0;
        for (size_t at = 0; at < PS_PAGE_SIZE; at += sizeof sum) {
            uint64_t word;
            memcpy(&word, batch->pages[i] + at, sizeof word);
            sum ^= word;
        }
        put_sum(batch, i, sum);
    }
}

#if defined(__x86_64__)

/* `lanes` pages at once: so many misses that do not wait for each other. */
__attribute__((target("avx2"), always_inline)) static inline void
read_lanes(const ps_batch *batch, size_t first, int lanes)
{
    const uint8_t *const *pages = batch->pages + first;
    __m256i sums[LANES] = {0};
    for (size_t at = 0; at < PS_PAGE_SIZE; at += 64) {
        for (int i = 0; i < lanes; i++) {
            const __m256i *words = (const __m256i *)(pages[i] + at);
            sums[i] = _mm256_xor_si256(sums[i], _mm256_loadu_si256(words));
            sums[i] = _mm256_xor_si256(sums[i], _mm256_loadu_si256(words + 1));
        }
    }
    for (int i = 0; i < lanes; i++) {
        __m128i sum = _mm_xor_si128(_mm256_castsi256_si128(sums[i]),
                                    _mm256_extracti128_si256(sums[i], 1));
        put_sum(batch, first + (size_t)i,
                (uint64_t)(_mm_cvtsi128_si64(sum) ^ _mm_extract_epi64(sum, 1)));
    }
}

__attribute__((target("avx2"))) void ps_read_stream_avx2(const ps_batch *batch)
{
    for (size_t i = 0; i < batch->count; i++) {
        read_lanes(batch, i, 1);
    }
}

__attribute__((target("avx2"))) void ps_read_interleaved_avx2(const ps_batch *batch)
{
    size_t i = 0;
    for (; i + LANES <= batch->count; i += LANES) {
        read_lanes(batch, i, LANES);
    }
    for (; i < batch->count; i++) {
        read_lanes(batch, i, 1);
    }
}

#endif
