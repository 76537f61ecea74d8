/* nh4aes v1 with AVX-512 (docs/spec/digest.md). */
#include "ps_internal.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define AVX512_INLINE AVX512 __attribute__((always_inline)) static inline

enum { STEP = 64, PASS = 32 /* bytes: eight words */ };

typedef struct {
    __m512i pass[PS_NH_PASSES];
} page_sums;

/* Sixteen words of a page: eight products for each pass. */
AVX512_INLINE void add_products(page_sums *sums, __m512i words, const __m512i *keys)
{
    for (int t = 0; t < PS_NH_PASSES; t++) {
        __m512i keyed = _mm512_add_epi32(words, keys[t]);
        __m512i product = _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32));
        sums->pass[t] = _mm512_add_epi64(sums->pass[t], product);
    }
}

/* Sum of the upper and the lower half of two passes, which come to stand by turns. */
AVX512_INLINE __m256i add_halves(__m512i even, __m512i odd)
{
    __m512i sum = _mm512_add_epi64(_mm512_unpacklo_epi64(even, odd),
                                   _mm512_unpackhi_epi64(even, odd));
    return _mm256_add_epi64(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1));
}

AVX512_INLINE void store_sums(const page_sums *sums, uint64_t *results)
{
    __m256i t01 = add_halves(sums->pass[0], sums->pass[1]);
    __m256i t23 = add_halves(sums->pass[2], sums->pass[3]);
    __m256i low = _mm256_permute2x128_si256(t01, t23, 0x20);
    __m256i high = _mm256_permute2x128_si256(t01, t23, 0x31);
    _mm256_storeu_si256((__m256i *)results, _mm256_add_epi64(low, high));
}

/* The sums of `lanes` pages; as many behind them are prefetched. Of four key registers two serve
 * the next step again. */
AVX512_INLINE void sum_pages(const uint8_t *const *pages, const uint8_t *key, uint64_t *results,
                           int lanes)
{
    page_sums sums[PS_LANES] = {0};
    __m512i keys[PS_NH_PASSES] = {_mm512_loadu_si512(key), _mm512_loadu_si512(key + PASS)};
    for (size_t at = 0; at < PS_PAGE_SIZE; at += STEP) {
        keys[2] = _mm512_loadu_si512(key + at + 2 * PASS);
        keys[3] = _mm512_loadu_si512(key + at + 3 * PASS);
        for (int i = 0; i < lanes; i++) {
            ps_prefetch(pages[i + lanes] + at, lanes);
            add_products(&sums[i], _mm512_loadu_si512(pages[i] + at), keys);
        }
        keys[0] = keys[2];
        keys[1] = keys[3];
    }
    for (int i = 0; i < lanes; i++) {
        store_sums(&sums[i], results + PS_NH_PASSES * i);
    }
}

AVX512 void ps_digest_nh4aes_avx512(const ps_batch *batch)
{
    uint64_t sums[PS_BATCH_MAX * PS_NH_PASSES];
    const uint8_t *const *pages = batch->pages;
    for (size_t i = 0; i < batch->count;) {
        if (ps_batch_lanes(batch, i) == PS_LANES) {
            sum_pages(pages + i, batch->key->stream, sums + PS_NH_PASSES * i, PS_LANES);
            i += PS_LANES;
        } else {
            sum_pages(pages + i, batch->key->stream, sums + PS_NH_PASSES * i, 1);
            i++;
        }
    }
    ps_nh4aes_finish_batch(batch, sums);
}

#else
/* ISO C wants something in every file. */
typedef int ps_digest_nh4aes_avx512_absent;
#endif
