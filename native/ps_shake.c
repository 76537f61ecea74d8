/* SHAKE256, FIPS 202; section numbers refer to it. Freestanding; it runs once per key, so it
 * is short rather than fast. */
#include "ps_internal.h"

enum { LANES = 25, ROUNDS = 24, RATE = 136 /* bytes: 1600 bits less a capacity of 512 */ };

static uint64_t rotate_left(uint64_t lane, unsigned bits)
{
    return bits == 0 ? lane : lane << bits | lane >> (64 - bits);
}

/* 3.2.1 */
static void theta(uint64_t *state)
{
    uint64_t column[5];
    for (unsigned x = 0; x < 5; x++) {
        column[x] = state[x] ^ state[x + 5] ^ state[x + 10] ^ state[x + 15] ^ state[x + 20];
    }
    for (unsigned i = 0; i < LANES; i++) {
        state[i] ^= column[(i + 4) % 5] ^ rotate_left(column[(i + 1) % 5], 1);
    }
}

/* 3.2.2 and 3.2.3 in one walk: lane (x, y) goes to (y, 2x + 3y), turned by a triangular
 * number. */
static void rho_pi(uint64_t *state)
{
    unsigned x = 1, y = 0;
    uint64_t moving = state[1];
    for (unsigned t = 0; t < ROUNDS; t++) {
        unsigned new_y = (2 * x + 3 * y) % 5;
        x = y;
        y = new_y;
        uint64_t displaced = state[x + 5 * y];
        state[x + 5 * y] = rotate_left(moving, (t + 1) * (t + 2) / 2 % 64);
        moving = displaced;
    }
}

/* 3.2.4 */
static void chi(uint64_t *state)
{
    for (unsigned row = 0; row < LANES; row += 5) {
        uint64_t first = state[row], second = state[row + 1];
        for (unsigned x = 0; x < 3; x++) {
            state[row + x] ^= ~state[row + x + 1] & state[row + x + 2];
        }
        state[row + 3] ^= ~state[row + 4] & first;
        state[row + 4] ^= ~first & second;
    }
}

/* 3.2.5, algorithm 5: the next bit of the shift register x^8 + x^6 + x^5 + x^4 + 1. */
static unsigned next_bit(unsigned *shift)
{
    unsigned bit = *shift & 1;
    *shift = *shift << 1 ^ (*shift & 0x80 ? 0x171 : 0);
    return bit;
}

/* 3.3 */
static void permute(uint64_t *state)
{
    unsigned shift = 1;
    for (unsigned round = 0; round < ROUNDS; round++) {
        theta(state);
        rho_pi(state);
        chi(state);
        for (unsigned j = 0; j <= 6; j++) {
            state[0] ^= (uint64_t)next_bit(&shift) << ((1u << j) - 1);
        }
    }
}

static void absorb_byte(uint64_t *state, size_t at, uint8_t byte)
{
    state[at / 8] ^= (uint64_t)byte << 8 * (at % 8);
}

/* 6.2, for a message that fits into one block with its padding. */
void ps_shake256(const uint8_t *message, size_t length, uint8_t *output, size_t output_length)
{
    uint64_t state[LANES] = {0};
    for (size_t i = 0; i < length; i++) {
        absorb_byte(state, i, message[i]);
    }
    absorb_byte(state, length, 0x1f);
    absorb_byte(state, RATE - 1, 0x80);
    for (size_t i = 0; i < output_length; i++) {
        if (i % RATE == 0) {
            permute(state);
        }
        output[i] = (uint8_t)(state[i % RATE / 8] >> 8 * (i % 8));
    }
    for (volatile uint64_t *lane = state; lane < state + LANES; lane++) {
        *lane = 0;
    }
}
