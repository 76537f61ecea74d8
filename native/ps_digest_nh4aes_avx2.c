/* nh4aes v1 with AVX2 (docs/spec/digest.md). */
#include "ps_internal.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define AVX2 __attribute__((target("avx2")))
#define AVX2_INLINE AVX2 __attribute__((always_inline)) static inline

enum { STEP = 32, LANES = 2, HALF = PS_PAGE_SIZE / 2 };

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

/* Half a page of each lane. A pass is shifted by eight words, which is one register: each
 * key register serves all four passes in turn. */
AVX2_INLINE void sum_halves(const uint8_t *const *halves, const uint8_t *const *ahead,
                            const uint8_t *key, page_sums *sums, int lanes)
{
    __m256i keys[PS_NH_PASSES] = {load(key), load(key + STEP), load(key + 2 * STEP)};
    for (size_t at = 0; at < HALF; at += STEP) {
        keys[3] = load(key + at + 3 * STEP);
        for (int i = 0; i < lanes; i++) {
            if (at % 64 == 0) {
                _mm_prefetch((const char *)ahead[i] + at, _MM_HINT_T0);
            }
            add_products(&sums[i], load(halves[i] + at), keys);
        }
        keys[0] = keys[1];
        keys[1] = keys[2];
        keys[2] = keys[3];
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

/* `next` are the pages that come after these. */
AVX2_INLINE void sum_pages(const uint8_t *const *pages, const uint8_t *const *next,
                           const uint8_t *key, uint64_t *results, int lanes)
{
    page_sums sums[LANES] = {0};
    const uint8_t *second[LANES];
    for (int i = 0; i < lanes; i++) {
        second[i] = pages[i] + HALF;
    }
    sum_halves(pages, second, key, sums, lanes);
    sum_halves(second, next, key + HALF, sums, lanes);
    for (int i = 0; i < lanes; i++) {
        store_sums(&sums[i], results + PS_NH_PASSES * i);
    }
}

AVX2 void ps_digest_nh4aes_avx2(const ps_batch *batch)
{
    uint64_t sums[PS_BATCH_MAX * PS_NH_PASSES];
    const uint8_t *const *pages = batch->pages;
    size_t i = 0;
    for (; i + LANES <= batch->count; i += LANES) {
        const uint8_t *const *next = i + 2 * LANES <= batch->count + 1 ? pages + i + LANES
                                                                      : pages + i + 1;
        sum_pages(pages + i, next, batch->key->stream, sums + PS_NH_PASSES * i, LANES);
    }
    for (; i < batch->count; i++) {
        sum_pages(pages + i, pages + i + 1, batch->key->stream, sums + PS_NH_PASSES * i, 1);
    }
    ps_nh4aes_finish_batch(batch, sums);
}

#else
/* ISO C wants something in every file. */
typedef int ps_digest_nh4aes_avx2_absent;
#endif
