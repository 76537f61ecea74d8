/* Comparing the values of a watch list by gather, four at a time. A wider gather is not faster:
 * the loads are what it costs. Most watched values stand in tables, so four that follow each
 * other are one load. */
#include "ps_internal.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define AVX2 __attribute__((target("avx2")))
#define AVX2_INLINE AVX2 __attribute__((always_inline)) static inline

AVX2_INLINE __m256i load(const uint64_t *values)
{
    return _mm256_loadu_si256((const __m256i *)values);
}

/* An offset is out of bounds when its top bit is set or `offset_max` less the offset is
 * negative: AVX2 compares signed, and no mapping is as large as that. */
AVX2_INLINE bool any_outside(__m256i offsets, __m256i offset_max)
{
    __m256i outside = _mm256_or_si256(offsets, _mm256_sub_epi64(offset_max, offsets));
    return _mm256_movemask_pd(_mm256_castsi256_pd(outside)) != 0;
}

AVX2_INLINE __m256i load_at(const uint8_t *base, __m256i offsets)
{
    const __m256i steps = _mm256_setr_epi64x(0, 8, 16, 24);
    __m256i first = _mm256_permute4x64_epi64(offsets, 0);
    __m256i apart = _mm256_xor_si256(offsets, _mm256_add_epi64(first, steps));
    if (_mm256_testz_si256(apart, apart)) {
        uint64_t offset = (uint64_t)_mm_cvtsi128_si64(_mm256_castsi256_si128(offsets));
        return _mm256_loadu_si256((const __m256i *)(base + offset));
    }
    return _mm256_i64gather_epi64((const long long *)(const void *)base, offsets, 1);
}

AVX2 bool ps_watch_equal_avx2(const uint8_t *base, uint64_t offset_max, const uint64_t *offsets,
                              const uint64_t *expected, size_t count)
{
    const __m256i last = _mm256_set1_epi64x((long long)offset_max);
    __m256i different = _mm256_setzero_si256();
    size_t i = 0;
    for (; i + 4 <= count; i += 4) {
        __m256i at = load(offsets + i);
        if (any_outside(at, last)) {
            return false;
        }
        __m256i changed = _mm256_xor_si256(load_at(base, at), load(expected + i));
        different = _mm256_or_si256(different, changed);
    }
    return _mm256_testz_si256(different, different) &&
           ps_watch_equal_portable(base, offset_max, offsets + i, expected + i, count - i);
}

#else
/* ISO C wants something in every file. */
typedef int ps_watch_x86_absent;
#endif
