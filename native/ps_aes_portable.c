/* AES-128 in plain C without tables, four blocks at a time; FIPS 197, section numbers refer
 * to it. Freestanding.
 *
 * Bit-sliced: plane b holds bit b of 64 state bytes, byte i of block n at position 16 n + i.
 * No address and no branch hangs on a secret, so neither caches nor timing tell of the key.
 * The S-box is computed from its definition: the inverse in GF(2^8) is the power 254.
 */
#include "ps_internal.h"

enum { PLANES = 8, ROUNDS = 10, BLOCKS = 4, STATE_SIZE = BLOCKS * PS_BLOCK_SIZE };

typedef struct {
    uint64_t plane[PLANES];
} sliced;

/* Bit j of byte i of the word becomes bit i of byte j: three rounds of swapping blocks of bits
 * across the diagonal. Its own inverse. */
static uint64_t transpose8(uint64_t word)
{
    uint64_t swap = (word ^ word >> 7) & 0x00aa00aa00aa00aa;
    word ^= swap ^ swap << 7;
    swap = (word ^ word >> 14) & 0x0000cccc0000cccc;
    word ^= swap ^ swap << 14;
    swap = (word ^ word >> 28) & 0x00000000f0f0f0f0;
    return word ^ swap ^ swap << 28;
}

static sliced slice(const uint8_t bytes[STATE_SIZE])
{
    sliced state = {{0}};
    for (int i = 0; i < STATE_SIZE; i += 8) {
        uint64_t word = 0;
        for (int j = 0; j < 8; j++) {
            word |= (uint64_t)bytes[i + j] << 8 * j;
        }
        word = transpose8(word);
        for (int b = 0; b < PLANES; b++) {
            state.plane[b] |= (word >> 8 * b & 0xff) << i;
        }
    }
    return state;
}

static void unslice(const sliced *state, uint8_t bytes[STATE_SIZE])
{
    for (int i = 0; i < STATE_SIZE; i += 8) {
        uint64_t word = 0;
        for (int b = 0; b < PLANES; b++) {
            word |= (state->plane[b] >> i & 0xff) << 8 * b;
        }
        word = transpose8(word);
        for (int j = 0; j < 8; j++) {
            bytes[i + j] = (uint8_t)(word >> 8 * j);
        }
    }
}

/* 4.2: what lies above bit 7 goes back through x^8 = x^4 + x^3 + x + 1. */
static sliced reduce(uint64_t product[2 * PLANES - 1])
{
    sliced reduced;
    for (int i = 2 * PLANES - 2; i >= PLANES; i--) {
        product[i - 4] ^= product[i];
        product[i - 5] ^= product[i];
        product[i - 7] ^= product[i];
        product[i - 8] ^= product[i];
    }
    for (int i = 0; i < PLANES; i++) {
        reduced.plane[i] = product[i];
    }
    return reduced;
}

static sliced multiply(const sliced *x, const sliced *y)
{
    uint64_t product[2 * PLANES - 1] = {0};
    for (int i = 0; i < PLANES; i++) {
        for (int j = 0; j < PLANES; j++) {
            product[i + j] ^= x->plane[i] & y->plane[j];
        }
    }
    return reduce(product);
}

/* x to the power 2^times. Squaring only moves bits apart. */
static sliced square(const sliced *x, int times)
{
    sliced power = *x;
    for (int i = 0; i < times; i++) {
        uint64_t product[2 * PLANES - 1] = {0};
        for (int j = 0; j < PLANES; j++) {
            product[2 * j] = power.plane[j];
        }
        power = reduce(product);
    }
    return power;
}

/* 5.1.1: the inverse, x^254 = x^240 * x^12 * x^2, then an affine map over the bits. */
static void sub_bytes(sliced *state)
{
    sliced x2 = square(state, 1), x3 = multiply(&x2, state), x12 = square(&x3, 2);
    sliced x14 = multiply(&x12, &x2), x15 = multiply(&x12, &x3), x240 = square(&x15, 4);
    sliced inverse = multiply(&x240, &x14);
    for (int b = 0; b < PLANES; b++) {
        uint64_t constant = 0x63 >> b & 1 ? UINT64_MAX : 0;
        state->plane[b] = inverse.plane[b] ^ inverse.plane[(b + 4) % 8] ^
                          inverse.plane[(b + 5) % 8] ^ inverse.plane[(b + 6) % 8] ^
                          inverse.plane[(b + 7) % 8] ^ constant;
    }
}

/* Turns each group of 16 bits down by `bits` (4, 8 or 12). */
static uint64_t turn16(uint64_t plane, int bits)
{
    uint64_t low = (UINT64_C(0x0001000100010001) << (16 - bits)) - UINT64_C(0x0001000100010001);
    return (plane >> bits & low) | (plane << (16 - bits) & ~low);
}

/* 5.1.2: byte r + 4c of a block comes from column c + r of row r. */
static void shift_rows(sliced *state)
{
    for (int b = 0; b < PLANES; b++) {
        uint64_t plane = state->plane[b];
        state->plane[b] = (plane & 0x1111111111111111) | turn16(plane & 0x2222222222222222, 4) |
                          turn16(plane & 0x4444444444444444, 8) |
                          turn16(plane & 0x8888888888888888, 12);
    }
}

/* Turns each column, four bits of a plane, down by one row. */
static uint64_t turn4(uint64_t plane)
{
    return (plane >> 1 & 0x7777777777777777) | (plane << 3 & 0x8888888888888888);
}

/* 5.1.3: 2a + 3a' + a'' + a''' = 2(a + a') + a' + (a'' + a'''), with a' from the row below. */
static void mix_columns(sliced *state)
{
    uint64_t pair[PLANES], rest[PLANES];
    for (int b = 0; b < PLANES; b++) {
        uint64_t below = turn4(state->plane[b]);
        pair[b] = state->plane[b] ^ below;
        rest[b] = below ^ turn4(turn4(pair[b]));
    }
    for (int b = 0; b < PLANES; b++) {
        uint64_t carry = 0x1b >> b & 1 ? pair[7] : 0;
        state->plane[b] = rest[b] ^ carry ^ (b > 0 ? pair[b - 1] : 0);
    }
}

/* 5.1.4 */
static void add_round_key(sliced *state, const sliced *round_key)
{
    for (int b = 0; b < PLANES; b++) {
        state->plane[b] ^= round_key->plane[b];
    }
}

/* 5.1 */
static void encrypt4(const sliced round_keys[ROUNDS + 1], sliced *state)
{
    add_round_key(state, &round_keys[0]);
    for (int round = 1; round <= ROUNDS; round++) {
        sub_bytes(state);
        shift_rows(state);
        if (round < ROUNDS) {
            mix_columns(state);
        }
        add_round_key(state, &round_keys[round]);
    }
}

static void slice_round_keys(const uint8_t *round_keys, sliced sliced_keys[ROUNDS + 1])
{
    for (int round = 0; round <= ROUNDS; round++) {
        uint8_t repeated[STATE_SIZE];
        for (int i = 0; i < STATE_SIZE; i++) {
            repeated[i] = round_keys[PS_BLOCK_SIZE * round + i % PS_BLOCK_SIZE];
        }
        sliced_keys[round] = slice(repeated);
    }
}

void ps_aes_encrypt_portable(const uint8_t *round_keys, uint8_t *blocks, size_t count)
{
    sliced sliced_keys[ROUNDS + 1];
    slice_round_keys(round_keys, sliced_keys);
    for (size_t first = 0; first < count; first += BLOCKS) {
        size_t size = (count - first < BLOCKS ? count - first : BLOCKS) * PS_BLOCK_SIZE;
        uint8_t *at = blocks + first * PS_BLOCK_SIZE, state_bytes[STATE_SIZE] = {0};
        for (size_t i = 0; i < size; i++) {
            state_bytes[i] = at[i];
        }
        sliced state = slice(state_bytes);
        encrypt4(sliced_keys, &state);
        unslice(&state, state_bytes);
        for (size_t i = 0; i < size; i++) {
            at[i] = state_bytes[i];
        }
    }
}

/* 5.2 */
void ps_aes_expand(const uint8_t key[PS_BLOCK_SIZE], uint8_t round_keys[PS_AES_ROUND_KEYS_SIZE])
{
    uint8_t constant = 1;
    for (int i = 0; i < PS_BLOCK_SIZE; i++) {
        round_keys[i] = key[i];
    }
    for (int at = PS_BLOCK_SIZE; at < PS_AES_ROUND_KEYS_SIZE; at += 4) {
        uint8_t word[STATE_SIZE] = {0};
        bool first = at % PS_BLOCK_SIZE == 0;
        for (int i = 0; i < 4; i++) {
            word[i] = round_keys[at - 4 + (first ? (i + 1) % 4 : i)];
        }
        if (first) {
            sliced state = slice(word);
            sub_bytes(&state);
            unslice(&state, word);
            word[0] ^= constant;
            constant = (uint8_t)(constant << 1 ^ (constant & 0x80 ? 0x1b : 0));
        }
        for (int i = 0; i < 4; i++) {
            round_keys[at + i] = round_keys[at - PS_BLOCK_SIZE + i] ^ word[i];
        }
    }
}
