/* The key, and digests of pages: the portable forms of native/ (docs/spec/digest.md). */
#include "core.h"

void ps_wipe(void *memory, size_t size)
{
    volatile uint8_t *byte = memory;
    for (size_t i = 0; i < size; i++) {
        byte[i] = 0;
    }
}

bool ps_key_draw(ps_card *card)
{
    uint8_t secret[PS_SECRET_SIZE];
    bool drawn = card->hal->entropy(card->hal->context, secret);
    if (drawn) {
        ps_key_expand(&card->key, PS_DIGEST_NH4AES, secret);
    }
    ps_wipe(secret, sizeof secret);
    return drawn;
}

void ps_card_digest(ps_card *card, const uint8_t *const *pages, const uint64_t *frames,
                    uint32_t count, uint32_t kinds)
{
    ps_batch batch = {
        .pages = pages,
        .frames = frames,
        .count = count,
        .key = &card->key,
        .aes = ps_aes_encrypt_portable,
    };
    if (kinds & PS_LINK_SHA256) {
        batch.results = card->sha256;
        ps_digest_sha256_portable(&batch);
    }
    if (kinds & PS_LINK_NH4AES) {
        batch.results = card->keyed;
        ps_digest_nh4aes_portable(&batch);
    }
}

uint32_t ps_digests_width(uint32_t kinds)
{
    return (kinds & PS_LINK_SHA256 ? PS_SHA256_SIZE : 0) +
           (kinds & PS_LINK_NH4AES ? PS_KEYED_SIZE : 0);
}
