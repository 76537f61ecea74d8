/* nh4aes v1 with Advanced SIMD, which every AArch64 has (docs/spec/digest.md). */
#include "ps_internal.h"

#if defined(__aarch64__)

#include <arm_neon.h>

enum { STEP = 32 };

/* One pass over four words: two products, added to the two halves of `sum`. */
static inline uint64x2_t add_products(uint64x2_t sum, uint32x4_t words, const uint8_t *key)
{
    uint32x4_t keyed = vaddq_u32(words, vreinterpretq_u32_u8(vld1q_u8(key)));
    uint64x2_t pairs = vreinterpretq_u64_u32(keyed);
    return vmlal_u32(sum, vmovn_u64(pairs), vshrn_n_u64(pairs, 32));
}

static void sum_page(const uint8_t *page, const uint8_t *key, const uint8_t *next, uint64_t *sums)
{
    uint64x2_t pairs[PS_NH_PASSES] = {0};
    for (size_t at = 0; at < PS_PAGE_SIZE; at += STEP) {
        if (at % 64 == 0) {
            ps_prefetch(next + at, PS_LANES);
        }
        uint32x4_t low = vreinterpretq_u32_u8(vld1q_u8(page + at));
        uint32x4_t high = vreinterpretq_u32_u8(vld1q_u8(page + at + 16));
        for (int t = 0; t < PS_NH_PASSES; t++) {
            pairs[t] = add_products(pairs[t], low, key + at + 32 * t);
            pairs[t] = add_products(pairs[t], high, key + at + 32 * t + 16);
        }
    }
    for (int t = 0; t < PS_NH_PASSES; t++) {
        sums[t] = vaddvq_u64(pairs[t]);
    }
}

void ps_digest_nh4aes_neon(const ps_batch *batch)
{
    uint64_t sums[PS_BATCH_MAX * PS_NH_PASSES];
    for (size_t i = 0; i < batch->count; i++) {
        sum_page(batch->pages[i], batch->key->stream, batch->pages[i + 1],
                 sums + PS_NH_PASSES * i);
    }
    ps_nh4aes_finish_batch(batch, sums);
}

#else
/* ISO C wants something in every file. */
typedef int ps_digest_nh4aes_neon_absent;
#endif
