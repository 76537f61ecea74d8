/* nh4aes v1 with AVX-512 (docs/spec/digest.md). */
#include "ps_internal.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define AVX512_INLINE AVX512 __attribute__((always_inline)) static inline

enum { STEP = 64, LANES = 4, HALF = PS_PAGE_SIZE / 2, PASS = 32 /* bytes: eight words */ };

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

/* Half a page of each lane. Four keys, two of which serve the next step again. */
AVX512_INLINE void sum_halves(const uint8_t *const *halves, const uint8_t *const *ahead,
                              const uint8_t *key, page_sums *sums, int lanes)
{
    __m512i keys[PS_NH_PASSES] = {_mm512_loadu_si512(key), _mm512_loadu_si512(key + PASS)};
    for (size_t at = 0; at < HALF; at += STEP) {
        keys[2] = _mm512_loadu_si512(key + at + 2 * PASS);
        keys[3] = _mm512_loadu_si512(key + at + 3 * PASS);
        for (int i = 0; i < lanes; i++) {
            _mm_prefetch((const char *)ahead[i] + at, _MM_HINT_T0);
            add_products(&sums[i], _mm512_loadu_si512(halves[i] + at), keys);
        }
        keys[0] = keys[2];
        keys[1] = keys[3];
    }
}

/* `next` are the pages that come after these. */
AVX512_INLINE void sum_pages(const uint8_t *const *pages, const uint8_t *const *next,
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
        for (int t = 0; t < PS_NH_PASSES; t++) {
            results[PS_NH_PASSES * i + t] = (uint64_t)_mm512_reduce_add_epi64(sums[i].pass[t]);
        }
    }
}

AVX512 void ps_digest_nh4aes_avx512(const ps_batch *batch)
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
typedef int ps_digest_nh4aes_avx512_absent;
#endif
