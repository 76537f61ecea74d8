/* nh4aes v1 with SSE2, which every x86-64 has (docs/spec/digest.md). */
#include "ps_internal.h"

#if defined(__x86_64__)

#include <emmintrin.h>

enum { STEP = 32, AHEAD = 2048 /* bytes; see ps_digest_nh4aes_avx2.c */ };

/* One pass over four words: two products, added to the two halves of `sum`. */
static inline __m128i add_products(__m128i sum, __m128i words, const uint8_t *key)
{
    __m128i keyed = _mm_add_epi32(words, _mm_load_si128((const __m128i *)key));
    return _mm_add_epi64(sum, _mm_mul_epu32(keyed, _mm_srli_epi64(keyed, 32)));
}

static void sum_half(const uint8_t *half, const uint8_t *key, const uint8_t *ahead, __m128i *sums)
{
    for (size_t at = 0; at < PS_PAGE_SIZE / 2; at += STEP) {
        if (at % 64 == 0) {
            _mm_prefetch((const char *)ahead + at, _MM_HINT_T0);
        }
        __m128i low = _mm_loadu_si128((const __m128i *)(half + at));
        __m128i high = _mm_loadu_si128((const __m128i *)(half + at + 16));
        for (int t = 0; t < PS_NH_PASSES; t++) {
            sums[t] = add_products(sums[t], low, key + at + 32 * t);
            sums[t] = add_products(sums[t], high, key + at + 32 * t + 16);
        }
    }
}

static void sum_page(const uint8_t *page, const uint8_t *key, const uint8_t *next, uint64_t *sums)
{
    __m128i pairs[PS_NH_PASSES] = {0};
    sum_half(page, key, page + AHEAD, pairs);
    sum_half(page + AHEAD, key + AHEAD, next, pairs);
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
