/* The second half of the keyed digests: from sums over a page to its digest
 * (docs/spec/digest.md). Freestanding. */
#include "ps_internal.h"

static void put64(uint8_t *bytes, uint64_t value)
{
    for (int i = 0; i < 8; i++) {
        bytes[i] = (uint8_t)(value >> 8 * i);
    }
}

static void mix64(uint8_t *bytes, uint64_t value)
{
    for (int i = 0; i < 8; i++) {
        bytes[i] ^= (uint8_t)(value >> 8 * i);
    }
}

/* CBC-MAC of two blocks, the first of them tweaked. */
void ps_nh4aes_finish_batch(const ps_batch *batch, const uint64_t *sums)
{
    uint8_t *blocks = batch->results;
    for (size_t i = 0; i < batch->count; i++) {
        put64(blocks + i * PS_BLOCK_SIZE, sums[PS_NH_PASSES * i] ^ batch->frames[i]);
        put64(blocks + i * PS_BLOCK_SIZE + 8, sums[PS_NH_PASSES * i + 1]);
    }
    batch->aes(batch->key->round_keys, blocks, batch->count);
    for (size_t i = 0; i < batch->count; i++) {
        mix64(blocks + i * PS_BLOCK_SIZE, sums[PS_NH_PASSES * i + 2]);
        mix64(blocks + i * PS_BLOCK_SIZE + 8, sums[PS_NH_PASSES * i + 3]);
    }
    batch->aes(batch->key->round_keys, blocks, batch->count);
}

/* `sums` holds the field element F of each page, as two values, the low one first. */
void ps_gf128aes_finish_batch(const ps_batch *batch, const uint64_t *sums)
{
    for (size_t i = 0; i < batch->count; i++) {
        put64(batch->results + i * PS_BLOCK_SIZE, sums[2 * i] ^ batch->frames[i]);
        put64(batch->results + i * PS_BLOCK_SIZE + 8, sums[2 * i + 1]);
    }
    batch->aes(batch->key->round_keys, batch->results, batch->count);
}
