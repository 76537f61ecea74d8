/* SHA-256 of a page in plain C, from FIPS 180-4; section numbers refer to it. Freestanding. */
#include "ps_internal.h"

enum { BLOCK_SIZE = 64, BLOCK_WORDS = 16, ROUNDS = 64, STATE_WORDS = 8 };

/* 4.2.2 */
const uint32_t ps_sha256_constants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

/* 5.3.3 */
static const uint32_t initial_state[STATE_WORDS] = {
    0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
};

/* 5.1.1: a one bit, zeros, and the length of a page, 4096 * 8 = 0x8000 bits. */
const uint8_t ps_sha256_padding[64] = {[0] = 0x80, [62] = 0x80};

static inline uint32_t rotate_right(uint32_t word, int bits)
{
    return (word >> bits) | (word << (32 - bits));
}

static inline uint32_t load_word(const uint8_t *bytes)
{
    uint32_t word;
    __builtin_memcpy(&word, bytes, sizeof word);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    word = __builtin_bswap32(word);
#endif
    return word;
}

static inline void store_word(uint8_t *bytes, uint32_t word)
{
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    word = __builtin_bswap32(word);
#endif
    __builtin_memcpy(bytes, &word, sizeof word);
}

/* 6.2.2 step 1, in a ring of 16 words: W[t] takes the place of W[t - 16]. */
static inline uint32_t schedule_next(uint32_t *ring, int t)
{
    uint32_t w2 = ring[(t - 2) % BLOCK_WORDS], w15 = ring[(t - 15) % BLOCK_WORDS];
    uint32_t sigma0 = rotate_right(w15, 7) ^ rotate_right(w15, 18) ^ (w15 >> 3);
    uint32_t sigma1 = rotate_right(w2, 17) ^ rotate_right(w2, 19) ^ (w2 >> 10);
    return ring[t % BLOCK_WORDS] += sigma1 + ring[(t - 7) % BLOCK_WORDS] + sigma0;
}

/* 6.2.2 */
static void compress(uint32_t state[STATE_WORDS], const uint8_t *block)
{
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
    uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
    uint32_t ring[BLOCK_WORDS];

#pragma GCC unroll 64
    for (int t = 0; t < ROUNDS; t++) {
        uint32_t word = t < BLOCK_WORDS ? (ring[t] = load_word(block + 4 * t))
                                        : schedule_next(ring, t);
        uint32_t sum1 = rotate_right(e, 6) ^ rotate_right(e, 11) ^ rotate_right(e, 25);
        uint32_t choice = (e & f) ^ (~e & g);
        uint32_t t1 = h + sum1 + choice + ps_sha256_constants[t] + word;
        uint32_t sum0 = rotate_right(a, 2) ^ rotate_right(a, 13) ^ rotate_right(a, 22);
        uint32_t majority = (a & b) ^ (a & c) ^ (b & c);
        h = g;
        g = f;
        f = e;
        e = d + t1;
        d = c;
        c = b;
        b = a;
        a = t1 + sum0 + majority;
    }
    state[0] += a;
    state[1] += b;
    state[2] += c;
    state[3] += d;
    state[4] += e;
    state[5] += f;
    state[6] += g;
    state[7] += h;
}

static void digest_page(const uint8_t *page, uint8_t *digest)
{
    uint32_t state[STATE_WORDS];
    __builtin_memcpy(state, initial_state, sizeof state);
    for (size_t at = 0; at < PS_PAGE_SIZE; at += BLOCK_SIZE) {
        compress(state, page + at);
    }
    compress(state, ps_sha256_padding);
    for (int i = 0; i < STATE_WORDS; i++) {
        store_word(digest + 4 * i, state[i]);
    }
}

void ps_digest_sha256_portable(const ps_batch *batch)
{
    for (size_t i = 0; i < batch->count; i++) {
        digest_page(batch->pages[i], batch->results + i * PS_SHA256_SIZE);
    }
}
