/* gf128aes v1 with PCLMULQDQ (docs/spec/digest.md). */
#include "ps_internal.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define PCLMUL __attribute__((target("pclmul")))
#define PCLMUL_INLINE PCLMUL __attribute__((always_inline)) static inline

enum { STEP = 64 /* four blocks: two products */ };

/* Sums of the 64-bit products: low by low, high by high, and the two crosswise ones. */
typedef struct {
    __m128i low, middle, high;
} page_sums;

PCLMUL_INLINE __m128i load_keyed(const uint8_t *bytes, const uint8_t *key)
{
    return _mm_xor_si128(_mm_loadu_si128((const __m128i *)bytes),
                         _mm_load_si128((const __m128i *)key));
}

PCLMUL_INLINE void add_products(page_sums *sums, __m128i x, __m128i y)
{
    __m128i cross = _mm_xor_si128(_mm_clmulepi64_si128(x, y, 0x01),
                                  _mm_clmulepi64_si128(x, y, 0x10));
    sums->low = _mm_xor_si128(sums->low, _mm_clmulepi64_si128(x, y, 0x00));
    sums->middle = _mm_xor_si128(sums->middle, cross);
    sums->high = _mm_xor_si128(sums->high, _mm_clmulepi64_si128(x, y, 0x11));
}

PCLMUL_INLINE void store_sums(const page_sums *sums, uint64_t *results)
{
    _mm_storeu_si128((__m128i *)results, sums->low);
    _mm_storeu_si128((__m128i *)(results + 2), sums->middle);
    _mm_storeu_si128((__m128i *)(results + 4), sums->high);
}

/* The sums of `lanes` pages; as many behind them are prefetched. */
PCLMUL_INLINE void sum_pages(const uint8_t *const *pages, const uint8_t *key, uint64_t *results,
                             int lanes)
{
    page_sums sums[PS_LANES] = {0};
    for (size_t at = 0; at < PS_PAGE_SIZE; at += STEP) {
        for (int i = 0; i < lanes; i++) {
            ps_prefetch(pages[i + lanes] + at, lanes);
            for (size_t block = at; block < at + 32; block += 16) {
                add_products(&sums[i], load_keyed(pages[i] + block, key + block),
                             load_keyed(pages[i] + block + 32, key + block + 32));
            }
        }
    }
    for (int i = 0; i < lanes; i++) {
        store_sums(&sums[i], results + PS_GF_SUMS * i);
    }
}

PCLMUL void ps_digest_gf128aes_pclmul(const ps_batch *batch)
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
typedef int ps_digest_gf128aes_pclmul_absent;
#endif
