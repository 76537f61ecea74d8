/* The firmware's digests are those of tests/vectors; and CRC-32C. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "host.h"

enum { VECTORS_MIN = 10 };

typedef struct {
    char rule[16];
    uint32_t a, b;
    uint8_t secret[PS_SECRET_SIZE];
    uint64_t frame;
    uint8_t digest[PS_SHA256_SIZE];
} vector;

/* ---- CRC ---- */

/* RFC 3720, B.4. */
void test_crc(void)
{
    uint8_t bytes[32];
    memset(bytes, 0, sizeof bytes);
    CHECK(ps_crc32c(bytes, sizeof bytes) == 0x8a9136aa);
    memset(bytes, 0xff, sizeof bytes);
    CHECK(ps_crc32c(bytes, sizeof bytes) == 0x62a8ab43);
    for (uint8_t i = 0; i < sizeof bytes; i++) {
        bytes[i] = i;
    }
    CHECK(ps_crc32c(bytes, sizeof bytes) == 0x46dd794e);
    for (uint8_t i = 0; i < sizeof bytes; i++) {
        bytes[i] = (uint8_t)(31 - i);
    }
    CHECK(ps_crc32c(bytes, sizeof bytes) == 0x113fdb5c);
    CHECK(ps_crc32c(bytes, 0) == 0);
}

/* ---- vectors ---- */

static bool from_hex(const char *hex, uint8_t *bytes, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        if (sscanf(hex + 2 * i, "%2hhx", &bytes[i]) != 1) {
            return false;
        }
    }
    return strlen(hex) == 2 * count;
}

/* Keys stand in a fixed order, see tests/vectors/make.py. */
static bool read_vector(const char *line, bool keyed, vector *one)
{
    char secret[65], digest[65];
    int taken = 0;
    if (sscanf(line, "{\"name\": \"%*[^\"]\", \"rule\": \"%15[^\"]\", \"a\": %" SCNu32
                     ", \"b\": %" SCNu32 "%n", one->rule, &one->a, &one->b, &taken) != 3) {
        return false;
    }
    if (!keyed) {
        return sscanf(line + taken, ", \"sha256\": \"%64[0-9a-f]", digest) == 1 &&
               from_hex(digest, one->digest, PS_SHA256_SIZE);
    }
    return sscanf(line + taken, ", \"secret\": \"%64[0-9a-f]\", \"frame\": %" SCNu64
                                ", \"nh4aes\": \"%64[0-9a-f]", secret, &one->frame, digest) == 3 &&
           from_hex(secret, one->secret, PS_SECRET_SIZE) &&
           from_hex(digest, one->digest, PS_KEYED_SIZE);
}

static void fill_page(uint8_t *page, const vector *one)
{
    uint32_t state = one->a;
    for (uint32_t i = 0; i < PAGE; i++) {
        if (strcmp(one->rule, "ramp") == 0) {
            page[i] = (uint8_t)(i * one->a + one->b);
        } else if (strcmp(one->rule, "spike") == 0) {
            page[i] = (uint8_t)(i == one->a ? one->b : 0);
        } else {
            if (i % 4 == 0) {
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
            }
            page[i] = (uint8_t)(state >> 8 * (i % 4));
        }
    }
}

/* Through the whole chain, where the frame is one that can be in a memory map. */
static void ask_card(bench *on, const vector *one, uint32_t kinds, size_t size)
{
    const ps_link_region region = {one->frame * PAGE, PAGE, 0};
    on->board.regions_count = 1;
    on->board.regions[0] = region;
    CHECK(bench_map(on, &region, 1) == PS_LINK_OK);
    ps_link_submission asked = {.op = PS_LINK_OP_DIGEST, .flags = PS_LINK_RANGE, .count = 1,
                                .kinds = kinds, .first = one->frame};
    uint32_t sequence = bench_submit(on, asked);
    CHECK(bench_await(on, sequence).ok == 1);
    const uint8_t *slot = bench_slot(on, sequence);
    CHECK(slot[PS_LINK_STATUSES_IN_SLOT] == PS_PAGE_OK);
    CHECK(memcmp(slot + PS_LINK_RESULTS_IN_SLOT, one->digest, size) == 0);
}

static void check_vector(const vector *one, uint32_t kinds)
{
    const size_t size = ps_digests_width(kinds);
    bench *on = bench_open(PS_LINK_ENGINE_DMA);
    on->board.secret = one->secret;
    sim_start(&on->board);
    bench_begin(on);
    fill_page(on->ram, one);

    ps_card *card = &on->board.card;
    const uint8_t *pages[1 + PS_LANES] = {on->ram, on->ram, on->ram, on->ram, on->ram};
    ps_card_digest(card, pages, &one->frame, 1, kinds);
    const uint8_t *made = kinds == PS_LINK_SHA256 ? card->sha256 : card->keyed;
    CHECK(memcmp(made, one->digest, size) == 0);
    if (one->frame < UINT64_C(1) << 40) {
        ask_card(on, one, kinds, size);
    }
    bench_close(on);
}

static void check_file(const char *path, uint32_t kinds)
{
    FILE *file = fopen(path, "r");
    require(file != NULL, path);
    char line[512];
    int vectors = 0;
    while (fgets(line, sizeof line, file) != NULL) {
        vector one = {.frame = 7};
        if (strncmp(line, "{\"name\"", 7) == 0) {
            require(read_vector(line, kinds == PS_LINK_NH4AES, &one), line);
            check_vector(&one, kinds);
            vectors++;
        }
    }
    fclose(file);
    CHECK(vectors >= VECTORS_MIN);
    printf("vectors: %d of %s\n", vectors, kinds == PS_LINK_SHA256 ? "sha256" : "nh4aes");
}

void test_vectors(const char *sha256_path, const char *nh4aes_path)
{
    check_file(sha256_path, PS_LINK_SHA256);
    check_file(nh4aes_path, PS_LINK_NH4AES);
}
