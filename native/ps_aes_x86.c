/* AES-128 with the x86 AES instructions (Intel, "AES New Instructions", 2012), several blocks
 * in flight: aesenc takes a few cycles and depends on the one before it. */
#include "ps_internal.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define AESNI __attribute__((target("aes,sse4.1")))
#define VAES __attribute__((target("vaes,aes,avx512f,avx512bw,avx512vl")))

enum { ROUNDS = 10, LANES = 8 };

/* `lanes` blocks, at most LANES. */
AESNI __attribute__((always_inline)) static inline void encrypt_lanes(const uint8_t *round_keys,
                                                                      uint8_t *blocks, int lanes)
{
    const __m128i *keys = (const __m128i *)round_keys;
    __m128i state[LANES], *at = (__m128i *)blocks;
    for (int i = 0; i < lanes; i++) {
        state[i] = _mm_xor_si128(_mm_loadu_si128(at + i), _mm_load_si128(keys));
    }
    for (int round = 1; round < ROUNDS; round++) {
        __m128i key = _mm_load_si128(keys + round);
        for (int i = 0; i < lanes; i++) {
            state[i] = _mm_aesenc_si128(state[i], key);
        }
    }
    for (int i = 0; i < lanes; i++) {
        _mm_storeu_si128(at + i, _mm_aesenclast_si128(state[i], _mm_load_si128(keys + ROUNDS)));
    }
}

AESNI void ps_aes_encrypt_aesni(const uint8_t *round_keys, uint8_t *blocks, size_t count)
{
    for (; count >= LANES; count -= LANES, blocks += LANES * PS_BLOCK_SIZE) {
        encrypt_lanes(round_keys, blocks, LANES);
    }
    for (; count > 0; count--, blocks += PS_BLOCK_SIZE) {
        encrypt_lanes(round_keys, blocks, 1);
    }
}

/* Sixteen blocks in four registers; the mask says which quarters of a register exist. */
VAES void ps_aes_encrypt_vaes(const uint8_t *round_keys, uint8_t *blocks, size_t count)
{
    enum { REGISTERS = 4, BLOCKS = 4 };
    const __m128i *keys = (const __m128i *)round_keys;
    for (size_t first = 0; first < count; first += REGISTERS * BLOCKS) {
        __m512i state[REGISTERS], key = _mm512_broadcast_i32x4(_mm_load_si128(keys));
        __mmask8 mask[REGISTERS];
        uint8_t *at = blocks + first * PS_BLOCK_SIZE;
        for (size_t i = 0; i < REGISTERS; i++) {
            size_t before = first + i * BLOCKS;
            size_t left = before < count ? count - before : 0;
            mask[i] = (__mmask8)(left < BLOCKS ? (1u << 2 * left) - 1 : 0xff);
            state[i] = _mm512_maskz_loadu_epi64(mask[i], at + 64 * i);
            state[i] = _mm512_xor_si512(state[i], key);
        }
        for (int round = 1; round < ROUNDS; round++) {
            key = _mm512_broadcast_i32x4(_mm_load_si128(keys + round));
            for (int i = 0; i < REGISTERS; i++) {
                state[i] = _mm512_aesenc_epi128(state[i], key);
            }
        }
        key = _mm512_broadcast_i32x4(_mm_load_si128(keys + ROUNDS));
        for (int i = 0; i < REGISTERS; i++) {
            _mm512_mask_storeu_epi64(at + 64 * i, mask[i], _mm512_aesenclast_epi128(state[i], key));
        }
    }
}

#else
/* ISO C wants something in every file. */
typedef int ps_aes_x86_absent;
#endif
