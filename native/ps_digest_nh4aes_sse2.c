/* nh4aes v1 with SSE2, which every x86-64 has (docs/spec/digest.md). */
#include "ps_internal.h"

#if defined(__x86_64__)

#include <emmintrin.h>

enum { STEP = 32 };

/* One pass over four words: two products, added to the two halves of `sum`. */
static inline __m128i add_products(__m128i sum, __m128i words, const uint8_t *key)
{
    __m128i keyed = _mm_add_epi32(words, _mm_load_si128((const __m128i *)key));
    return _mm_add_epi64(sum, _mm_mul_epu32(keyed, _mm_srli_epi64(keyed, 32)));
}

/* One page. Four would not be faster: the sums of two fill the registers. */
static void sum_page(const uint8_t *page, const uint8_t *key, const uint8_t *next, uint64_t *sums)
{
    __m128i pairs[PS_NH_PASSES] = {0};
    for (size_t at = 0; at < PS_PAGE_SIZE; at += STEP) {
        if (at % 64 == 0) {
            ps_prefetch(next + at, PS_LANES);
        }
        __m128i low = _mm_loadu_si128((const __m128i *)(page + at));
        __m128i high = _mm_loadu_si128((const __m128i *)(page + at + 16));
        for (int t = 0; t < PS_NH_PASSES; t++) {
            pairs[t] = add_products(pairs[t], low, key + at + 32 * t);
            pairs[t] = add_products(pairs[t], high, key + at + 32 * t + 16);
        }
    }
    for (int t = 0; t < PS_NH_PASSES; t++) {
        __m128i sum = _mm_add_epi64(pairs[t], _mm_unpackhi_epi64(pairs[t], pairs[t]));
        _mm_storel_epi64((__m128i *)(sums + t), sum);
    }
}

void ps_digest_nh4aes_sse2(const ps_batch *batch)
{
    uint64_t sums[PS_BATCH_MAX * PS_NH_PASSES];
    for (size_t i = 0; i < batch->count; i++) {
        sum_page(batch->pages[i], batch->key->stream, batch->pages[i + 1],
                 sums + PS_NH_PASSES * i);
    }
    ps_nh4aes_finish_batch(batch, sums);
}

#else
/* ISO C wants something in every file. */
typedef int ps_digest_nh4aes_sse2_absent;
#endif
