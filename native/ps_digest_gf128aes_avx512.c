/* gf128aes v1 with VPCLMULQDQ on AVX-512 registers (docs/spec/digest.md). */
#include "ps_internal.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define AVX512 __attribute__((target("vpclmulqdq,pclmul,avx512f,avx512bw,avx512dq,avx512vl")))
#define AVX512_INLINE AVX512 __attribute__((always_inline)) static inline

enum { STEP = 128 /* eight blocks: four products */ };

/* Sums of the 64-bit products: low by low, high by high, and the two crosswise ones. */
typedef struct {
    __m512i low, middle, high;
} page_sums;

AVX512_INLINE __m512i load_keyed(const uint8_t *bytes, const uint8_t *key)
{
    return _mm512_xor_si512(_mm512_loadu_si512(bytes), _mm512_load_si512(key));
}

AVX512_INLINE __m512i xor3(__m512i a, __m512i b, __m512i c)
{
    return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}

/* Blocks 0, 1 and 4, 5 of a step are multiplied with blocks 2, 3 and 6, 7. */
AVX512_INLINE void add_products(page_sums *sums, __m512i first, __m512i second)
{
    __m512i x = _mm512_shuffle_i64x2(first, second, 0x44);
    __m512i y = _mm512_shuffle_i64x2(first, second, 0xee);
    sums->low = _mm512_xor_si512(sums->low, _mm512_clmulepi64_epi128(x, y, 0x00));
    sums->middle = xor3(sums->middle, _mm512_clmulepi64_epi128(x, y, 0x01),
                        _mm512_clmulepi64_epi128(x, y, 0x10));
    sums->high = _mm512_xor_si512(sums->high, _mm512_clmulepi64_epi128(x, y, 0x11));
}

AVX512_INLINE __m128i fold(__m512i sum)
{
    __m256i half = _mm256_xor_si256(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1));
    return _mm_xor_si128(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

AVX512_INLINE void store_sums(const page_sums *sums, uint64_t *results)
{
    _mm_storeu_si128((__m128i *)results, fold(sums->low));
    _mm_storeu_si128((__m128i *)(results + 2), fold(sums->middle));
    _mm_storeu_si128((__m128i *)(results + 4), fold(sums->high));
}

/* The sums of `lanes` pages; as many behind them are prefetched. */
AVX512_INLINE void sum_pages(const uint8_t *const *pages, const uint8_t *key, uint64_t *results,
                             int lanes)
{
    page_sums sums[PS_LANES] = {0};
    for (size_t at = 0; at < PS_PAGE_SIZE; at += STEP) {
        for (int i = 0; i < lanes; i++) {
            ps_prefetch(pages[i + lanes] + at, lanes);
            ps_prefetch(pages[i + lanes] + at + 64, lanes);
            add_products(&sums[i], load_keyed(pages[i] + at, key + at),
                         load_keyed(pages[i] + at + 64, key + at + 64));
        }
    }
    for (int i = 0; i < lanes; i++) {
        store_sums(&sums[i], results + PS_GF_SUMS * i);
    }
}

AVX512 void ps_digest_gf128aes_avx512(const ps_batch *batch)
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
typedef int ps_digest_gf128aes_avx512_absent;
#endif
