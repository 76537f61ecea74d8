/* AES-128 with the ARMv8 Cryptographic Extension (Arm ARM, AESE and AESMC). */
#include "ps_internal.h"

#if defined(__aarch64__)

#pragma GCC target("+crypto")
#include <arm_neon.h>

enum { ROUNDS = 10, LANES = 4 };

/* `lanes` blocks, at most LANES. AESE adds the round key first, so the last one is left over. */
static inline void encrypt_lanes(const uint8_t *round_keys, uint8_t *blocks, size_t lanes)
{
    uint8x16_t state[LANES];
    for (size_t i = 0; i < lanes; i++) {
        state[i] = vld1q_u8(blocks + PS_BLOCK_SIZE * i);
    }
    for (size_t round = 0; round < ROUNDS - 1; round++) {
        uint8x16_t key = vld1q_u8(round_keys + PS_BLOCK_SIZE * round);
        for (size_t i = 0; i < lanes; i++) {
            state[i] = vaesmcq_u8(vaeseq_u8(state[i], key));
        }
    }
    uint8x16_t key = vld1q_u8(round_keys + PS_BLOCK_SIZE * (ROUNDS - 1));
    uint8x16_t last = vld1q_u8(round_keys + PS_BLOCK_SIZE * ROUNDS);
    for (size_t i = 0; i < lanes; i++) {
        vst1q_u8(blocks + PS_BLOCK_SIZE * i, veorq_u8(vaeseq_u8(state[i], key), last));
    }
}

void ps_aes_encrypt_armv8(const uint8_t *round_keys, uint8_t *blocks, size_t count)
{
    for (; count >= LANES; count -= LANES, blocks += LANES * PS_BLOCK_SIZE) {
        encrypt_lanes(round_keys, blocks, LANES);
    }
    for (; count > 0; count--, blocks += PS_BLOCK_SIZE) {
        encrypt_lanes(round_keys, blocks, 1);
    }
}

#else
/* ISO C wants something in every file. */
typedef int ps_aes_armv8_absent;
#endif
