/* From a master secret to the key of a digest (docs/spec/digest.md). Freestanding. */
#include "ps_internal.h"

size_t ps_key_words_size(int digest)
{
    return digest == PS_DIGEST_NH4AES     ? PS_NH_WORDS_SIZE
           : digest == PS_DIGEST_GF128AES ? PS_GF_BLOCKS_SIZE
                                          : 0;
}

void ps_key_expand(struct ps_key *key, int digest, const uint8_t *secret)
{
    static const char nh_label[] = "pyscan nh4aes v1", gf_label[] = "pyscan gf128aes v1";
    const char *label = digest == PS_DIGEST_NH4AES ? nh_label : gf_label;
    uint8_t message[sizeof gf_label + PS_SECRET_SIZE];
    size_t length = 0;
    while (label[length] != '\0') {
        message[length] = (uint8_t)label[length];
        length++;
    }
    for (size_t i = 0; i < PS_SECRET_SIZE; i++) {
        message[length++] = secret[i];
    }
    size_t words = ps_key_words_size(digest);
    ps_shake256(message, length, key->stream, words + PS_BLOCK_SIZE);
    ps_aes_expand(key->stream + words, key->round_keys);
    key->digest = digest;
    for (volatile uint8_t *byte = message; byte < message + sizeof message; byte++) {
        *byte = 0;
    }
}
