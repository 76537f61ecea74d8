/* gf128aes v1 with VPCLMULQDQ on AVX-512 registers (docs/spec/digest.md). */
#include "ps_internal.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define AVX512 __attribute__((target("vpclmulqdq,pclmul,avx512f,avx512bw,avx512dq,avx512vl")))
#define AVX512_INLINE AVX512 __attribute__((always_inline)) static inline

enum { STEP = 128 /* eight blocks: four products */, LANES = 4, HALF = PS_PAGE_SIZE / 2 };

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

AVX512_INLINE void sum_halves(const uint8_t *const *halves, const uint8_t *const *ahead,
                               const uint8_t *key, page_sums *sums, int lanes)
{
    for (size_t at = 0; at < HALF; at += STEP) {
        for (int i = 0; i < lanes; i++) {
            _mm_prefetch((const char *)ahead[i] + at, _MM_HINT_T0);
            _mm_prefetch((const char *)ahead[i] + at + 64, _MM_HINT_T0);
            add_products(&sums[i], load_keyed(halves[i] + at, key + at),
                         load_keyed(halves[i] + at + 64, key + at + 64));
        }
    }
}

AVX512_INLINE __m128i fold(__m512i sum)
{
    __m256i half = _mm256_xor_si256(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1));
    return _mm_xor_si128(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

/* Puts the 255-bit sum together and takes it modulo x^128 + x^7 + x^2 + x + 1: what lies above
 * bit 127 comes back times x^7 + x^2 + x + 1, and what that pushes above once more. */
AVX512_INLINE void store_sums(const page_sums *sums, uint64_t *results)
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
        store_sums(&sums[i], results + 2 * i);
    }
}

AVX512 void ps_digest_gf128aes_avx512(const ps_batch *batch)
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
typedef int ps_digest_gf128aes_avx512_absent;
#endif
