/* gf128aes v1 with VPCLMULQDQ on AVX2 registers (docs/spec/digest.md). */
#include "ps_internal.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define VPCLMUL __attribute__((target("vpclmulqdq,pclmul,avx2")))
#define VPCLMUL_INLINE VPCLMUL __attribute__((always_inline)) static inline

enum { STEP = 64 /* four blocks: two products */, LANES = 4, HALF = PS_PAGE_SIZE / 2 };

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

VPCLMUL_INLINE void sum_halves(const uint8_t *const *halves, const uint8_t *const *ahead,
                               const uint8_t *key, page_sums *sums, int lanes)
{
    for (size_t at = 0; at < HALF; at += STEP) {
        for (int i = 0; i < lanes; i++) {
            _mm_prefetch((const char *)ahead[i] + at, _MM_HINT_T0);
            add_products(&sums[i], load_keyed(halves[i] + at, key + at),
                         load_keyed(halves[i] + at + 32, key + at + 32));
        }
    }
}

VPCLMUL_INLINE __m128i fold(__m256i sum)
{
    return _mm_xor_si128(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
}

/* Puts the 255-bit sum together and takes it modulo x^128 + x^7 + x^2 + x + 1: what lies above
 * bit 127 comes back times x^7 + x^2 + x + 1, and what that pushes above once more. */
VPCLMUL_INLINE void store_sums(const page_sums *sums, uint64_t *results)
{
    const __m128i modulus = _mm_cvtsi32_si128(0x87);
    __m128i middle = fold(sums->middle);
    __m128i low = _mm_xor_si128(fold(sums->low), _mm_slli_si128(middle, 8));
    __m128i high = _mm_xor_si128(fold(sums->high), _mm_srli_si128(middle, 8));
    __m128i top = _mm_clmulepi64_si128(high, modulus, 0x01);
    high = _mm_xor_si128(high, _mm_srli_si128(top, 8));
    low = _mm_xor_si128(low, _mm_slli_si128(top, 8));
    low = _mm_xor_si128(low, _mm_clmulepi64_si128(high, modulus, 0x00));
    _mm_storeu_si128((__m128i *)results, low);
}

/* `next` are the pages that come after these. */
VPCLMUL_INLINE void sum_pages(const uint8_t *const *pages, const uint8_t *const *next,
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
        store_sums(&sums[i], results + 2 * i);
    }
}

VPCLMUL void ps_digest_gf128aes_vpclmul(const ps_batch *batch)
{
    uint64_t sums[PS_BATCH_MAX * 2];
    const uint8_t *const *pages = batch->pages;
    size_t i = 0;
    for (; i + LANES <= batch->count; i += LANES) {
        const uint8_t *const *next = i + 2 * LANES <= batch->count + 1 ? pages + i + LANES
                                                                      : pages + i + 1;
        sum_pages(pages + i, next, batch->key->stream, sums + 2 * i, LANES);
    }
    for (; i < batch->count; i++) {
        sum_pages(pages + i, pages + i + 1, batch->key->stream, sums + 2 * i, 1);
    }
    ps_gf128aes_finish_batch(batch, sums);
}

#else
/* ISO C wants something in every file. */
typedef int ps_digest_gf128aes_vpclmul_absent;
#endif
