/* gf128aes v1 with VPCLMULQDQ on AVX2 registers (docs/spec/digest.md). */
#include "ps_internal.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define VPCLMUL __attribute__((target("vpclmulqdq,pclmul,avx2")))
#define VPCLMUL_INLINE VPCLMUL __attribute__((always_inline)) static inline

enum { STEP = 64 /* four blocks: two products */ };

/* Sums of the 64-bit products: low by low, high by high, and the two crosswise ones. */
typedef struct {
    __m256i low, middle, high;
} page_sums;

VPCLMUL_INLINE __m256i load_keyed(const uint8_t *bytes, const uint8_t *key)
{
    return _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)bytes),
                            _mm256_load_si256((const __m256i *)key));
}

VPCLMUL_INLINE void add_products(page_sums *sums, __m256i x, __m256i y)
{
    __m256i cross = _mm256_xor_si256(_mm256_clmulepi64_epi128(x, y, 0x01),
                                     _mm256_clmulepi64_epi128(x, y, 0x10));
    sums->low = _mm256_xor_si256(sums->low, _mm256_clmulepi64_epi128(x, y, 0x00));
    sums->middle = _mm256_xor_si256(sums->middle, cross);
    sums->high = _mm256_xor_si256(sums->high, _mm256_clmulepi64_epi128(x, y, 0x11));
}

VPCLMUL_INLINE __m128i fold(__m256i sum)
{
    return _mm_xor_si128(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
}

VPCLMUL_INLINE void store_sums(const page_sums *sums, uint64_t *results)
{
    _mm_storeu_si128((__m128i *)results, fold(sums->low));
    _mm_storeu_si128((__m128i *)(results + 2), fold(sums->middle));
    _mm_storeu_si128((__m128i *)(results + 4), fold(sums->high));
}

/* The sums of `lanes` pages; as many behind them are prefetched. */
VPCLMUL_INLINE void sum_pages(const uint8_t *const *pages, const uint8_t *key, uint64_t *results,
                              int lanes)
{
    page_sums sums[PS_LANES] = {0};
    for (size_t at = 0; at < PS_PAGE_SIZE; at += STEP) {
        for (int i = 0; i < lanes; i++) {
            ps_prefetch(pages[i + lanes] + at, lanes);
            add_products(&sums[i], load_keyed(pages[i] + at, key + at),
                         load_keyed(pages[i] + at + 32, key + at + 32));
        }
    }
    for (int i = 0; i < lanes; i++) {
        store_sums(&sums[i], results + PS_GF_SUMS * i);
    }
}

VPCLMUL void ps_digest_gf128aes_vpclmul(const ps_batch *batch)
{
    uint64_t sums[PS_BATCH_MAX * PS_GF_SUMS];
    const uint8_t *const *pages = batch->pages;
    for (size_t i = 0; i < batch->count;) {
        if (ps_batch_lanes(batch, i) == PS_LANES) {
            sum_pages(pages + i, batch->key->stream, sums + PS_GF_SUMS * i, PS_LANES);
            i += PS_LANES;
        } else {
            sum_pages(pages + i, batch->key->stream, sums + PS_GF_SUMS * i, 1);
            i++;
        }
    }
    ps_gf128aes_finish_batch(batch, sums);
}

#else
/* ISO C wants something in every file. */
typedef int ps_digest_gf128aes_vpclmul_absent;
#endif
