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

/* Puts the 255-bit sum of products together, `f` with the low value first, and takes it modulo
 * x^128 + x^7 + x^2 + x + 1: what lies above bit 127 comes back times x^7 + x^2 + x + 1, and
 * what that pushes above once more. */
static void reduce(const uint64_t *sums, uint64_t f[2])
{
    const uint64_t *low = sums, *middle = sums + 2, *high = sums + 4;
    uint64_t h0 = high[0] ^ middle[1], h1 = high[1];
    h0 ^= h1 >> 63 ^ h1 >> 62 ^ h1 >> 57;
    f[0] = low[0] ^ h0 ^ h0 << 1 ^ h0 << 2 ^ h0 << 7;
    f[1] = low[1] ^ middle[0] ^ h1 ^ (h1 << 1 | h0 >> 63) ^ (h1 << 2 | h0 >> 62) ^
           (h1 << 7 | h0 >> 57);
}

void ps_gf128aes_finish_batch(const ps_batch *batch, const uint64_t *sums)
{
    for (size_t i = 0; i < batch->count; i++) {
        uint64_t f[2];
        reduce(sums + PS_GF_SUMS * i, f);
        put64(batch->results + i * PS_BLOCK_SIZE, f[0] ^ batch->frames[i]);
        put64(batch->results + i * PS_BLOCK_SIZE + 8, f[1]);
    }
    batch->aes(batch->key->round_keys, batch->results, batch->count);
}
