/* CRC-32C, RFC 3720, B.4. Sixty bytes a command: short rather than fast. */
#include "core.h"

uint32_t ps_crc32c(const void *bytes, size_t size)
{
    const uint8_t *byte = bytes;
    uint32_t rest = UINT32_MAX;
    for (size_t i = 0; i < size; i++) {
        rest ^= byte[i];
        for (int bit = 0; bit < 8; bit++) {
            rest = rest >> 1 ^ (rest & 1 ? UINT32_C(0x82f63b78) : 0);
        }
    }
    return ~rest;
}
