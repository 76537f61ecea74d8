/* Comparing the values of a watch list by gather. */
#include "ps_internal.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("avx512f")))

/* An offset is out of bounds when its top bit is set or `offset_max` less the offset is
 * negative: AVX2 compares signed. Offsets are checked before anything is loaded. */
AVX2 bool ps_watch_equal_avx2(const uint8_t *base, uint64_t offset_max, const uint64_t *offsets,
                              const uint64_t *expected, size_t count)
{
    const __m256i last = _mm256_set1_epi64x((long long)offset_max);
    __m256i different = _mm256_setzero_si256();
    size_t i = 0;
    for (; i + 4 <= count; i += 4) {
        __m256i at = _mm256_loadu_si256((const __m256i *)(offsets + i));
        __m256i outside = _mm256_or_si256(at, _mm256_sub_epi64(last, at));
        if (_mm256_movemask_pd(_mm256_castsi256_pd(outside)) != 0) {
            return false;
        }
        __m256i value = _mm256_i64gather_epi64((const long long *)(const void *)base, at, 1);
        __m256i wanted = _mm256_loadu_si256((const __m256i *)(expected + i));
        different = _mm256_or_si256(different, _mm256_xor_si256(value, wanted));
    }
    return _mm256_testz_si256(different, different) &&
           ps_watch_equal_portable(base, offset_max, offsets + i, expected + i, count - i);
}

AVX512 bool ps_watch_equal_avx512(const uint8_t *base, uint64_t offset_max,
                                  const uint64_t *offsets, const uint64_t *expected, size_t count)
{
    const __m512i last = _mm512_set1_epi64((long long)offset_max);
    __m512i different = _mm512_setzero_si512();
    for (size_t i = 0; i < count; i += 8) {
        size_t left = count - i;
        __mmask8 mask = (__mmask8)(left < 8 ? (1u << left) - 1 : 0xff);
        __m512i at = _mm512_maskz_loadu_epi64(mask, offsets + i);
        if (_mm512_cmpgt_epu64_mask(at, last) != 0) {
            return false;
        }
        __m512i value = _mm512_mask_i64gather_epi64(_mm512_setzero_si512(), mask, at, base, 1);
        __m512i wanted = _mm512_maskz_loadu_epi64(mask, expected + i);
        different = _mm512_or_si512(different, _mm512_xor_si512(value, wanted));
    }
    return _mm512_test_epi64_mask(different, different) == 0;
}

#else
/* ISO C wants something in every file. */
typedef int ps_watch_x86_absent;
#endif
