/* nh4aes v1 in plain C (docs/spec/digest.md). Freestanding. */
#include "ps_internal.h"

static inline uint32_t load_word(const uint8_t *bytes)
{
    return bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
}

/* All four passes read a pair of words of the page once: it may be changing. */
static void sum_page(const uint8_t *page, const uint8_t *key, uint64_t sums[PS_NH_PASSES])
{
    enum { SHIFT = 32 /* bytes: eight words */ };
    uint64_t n0 = 0, n1 = 0, n2 = 0, n3 = 0;
    for (size_t at = 0; at < PS_PAGE_SIZE; at += 8) {
        uint32_t even = load_word(page + at), odd = load_word(page + at + 4);
        const uint8_t *k = key + at;
        n0 += (uint64_t)(even + load_word(k)) * (odd + load_word(k + 4));
        n1 += (uint64_t)(even + load_word(k + SHIFT)) * (odd + load_word(k + SHIFT + 4));
        n2 += (uint64_t)(even + load_word(k + 2 * SHIFT)) * (odd + load_word(k + 2 * SHIFT + 4));
        n3 += (uint64_t)(even + load_word(k + 3 * SHIFT)) * (odd + load_word(k + 3 * SHIFT + 4));
    }
    sums[0] = n0;
    sums[1] = n1;
    sums[2] = n2;
    sums[3] = n3;
}

void ps_digest_nh4aes_portable(const ps_batch *batch)
{
    uint64_t sums[PS_BATCH_MAX * PS_NH_PASSES];
    for (size_t i = 0; i < batch->count; i++) {
        sum_page(batch->pages[i], batch->key->stream, sums + PS_NH_PASSES * i);
    }
    ps_nh4aes_finish_batch(batch, sums);
}
