/* nh4aes v1 with AVX2 (docs/spec/digest.md). */
#include "ps_internal.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define AVX2 __attribute__((target("avx2")))
#define AVX2_INLINE AVX2 __attribute__((always_inline)) static inline

enum { STEP = 32 };

typedef struct {
    __m256i pass[PS_NH_PASSES];
} page_sums;

AVX2_INLINE __m256i load(const uint8_t *bytes)
{
    return _mm256_loadu_si256((const __m256i *)bytes);
}

/* Eight words of a page: four products for each pass. */
AVX2_INLINE void add_products(page_sums *sums, __m256i words, const __m256i *keys)
{
    for (int t = 0; t < PS_NH_PASSES; t++) {
        __m256i keyed = _mm256_add_epi32(words, keys[t]);
        __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
        sums->pass[t] = _mm256_add_epi64(sums->pass[t], product);
    }
}

AVX2_INLINE void store_sums(const page_sums *sums, uint64_t *results)
{
    __m256i t01 = _mm256_add_epi64(_mm256_unpacklo_epi64(sums->pass[0], sums->pass[1]),
                                   _mm256_unpackhi_epi64(sums->pass[0], sums->pass[1]));
    __m256i t23 = _mm256_add_epi64(_mm256_unpacklo_epi64(sums->pass[2], sums->pass[3]),
                                   _mm256_unpackhi_epi64(sums->pass[2], sums->pass[3]));
    __m256i low = _mm256_permute2x128_si256(t01, t23, 0x20);
    __m256i high = _mm256_permute2x128_si256(t01, t23, 0x31);
    _mm256_storeu_si256((__m256i *)results, _mm256_add_epi64(low, high));
}

/* The sums of `lanes` pages; as many behind them are prefetched. A pass is shifted by eight
 * words, which is one register: each key register serves all four passes in turn. */
AVX2_INLINE void sum_pages(const uint8_t *const *pages, const uint8_t *key, uint64_t *results,
                           int lanes)
{
    page_sums sums[PS_LANES] = {0};
    __m256i keys[PS_NH_PASSES] = {load(key), load(key + STEP), load(key + 2 * STEP)};
    for (size_t at = 0; at < PS_PAGE_SIZE; at += STEP) {
        keys[3] = load(key + at + 3 * STEP);
        for (int i = 0; i < lanes; i++) {
            if (at % 64 == 0) {
                ps_prefetch(pages[i + lanes] + at, lanes);
            }
            add_products(&sums[i], load(pages[i] + at), keys);
        }
        keys[0] = keys[1];
        keys[1] = keys[2];
        keys[2] = keys[3];
    }
    for (int i = 0; i < lanes; i++) {
        store_sums(&sums[i], results + PS_NH_PASSES * i);
    }
}

AVX2 void ps_digest_nh4aes_avx2(const ps_batch *batch)
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
typedef int ps_digest_nh4aes_avx2_absent;
#endif
