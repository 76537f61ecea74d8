/* Native test driver: what the keyed digests are made of. */
#define _GNU_SOURCE
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "driver.h"

/* ---- the slow twin of gf128aes ---- */

typedef struct {
    uint64_t low, high;
} element;

static element load_keyed(const uint8_t *bytes, const uint8_t *key)
{
    element value = {0, 0};
    for (int i = 7; i >= 0; i--) {
        value.low = value.low << 8 | (bytes[i] ^ key[i]);
        value.high = value.high << 8 | (bytes[8 + i] ^ key[8 + i]);
    }
    return value;
}

/* Shift and xor, modulo x^128 + x^7 + x^2 + x + 1. */
static element multiply(element x, element y)
{
    element product = {0, 0};
    for (int bit = 0; bit < 128; bit++) {
        uint64_t take = (bit < 64 ? y.low >> bit : y.high >> (bit - 64)) & 1;
        product.low ^= take ? x.low : 0;
        product.high ^= take ? x.high : 0;
        uint64_t carry = x.high >> 63;
        x.high = x.high << 1 | x.low >> 63;
        x.low = x.low << 1 ^ (carry ? 0x87 : 0);
    }
    return product;
}

static void gf128aes_slow(const ps_batch *batch)
{
    uint64_t sums[PS_GF_SUMS] = {0};
    const uint8_t *page = batch->pages[0], *key = batch->key->stream;
    for (size_t i = 0; i < PAGE; i += 64) {
        for (size_t at = i; at < i + 32; at += 16) {
            element product = multiply(load_keyed(page + at, key + at),
                                       load_keyed(page + at + 32, key + at + 32));
            sums[0] ^= product.low;
            sums[1] ^= product.high;
        }
    }
    ps_gf128aes_finish_batch(batch, sums);
}

void reference_digest(const uint8_t *page, uint64_t frame, uint8_t *digest)
{
    const uint8_t *const pages[1 + PS_LANES] = {page, page, page, page, page};
    const ps_batch batch = {pages, &frame, 1, method.key, ps_aes_encrypt_portable, digest};
    (method.digest == PS_DIGEST_SHA256   ? ps_digest_sha256_portable
     : method.digest == PS_DIGEST_NH4AES ? ps_digest_nh4aes_portable
                                         : gf128aes_slow)(&batch);
}

/* ---- AES, SHAKE256 ---- */

static void from_hex(const char *hex, uint8_t *bytes)
{
    for (; *hex != '\0'; hex += 2) {
        require(sscanf(hex, "%2hhx", bytes++) == 1, "hexadecimal digits");
    }
}

/* Every number of blocks that a batch can have, and one more. */
static void check_same_as_portable(ps_aes_fn *encrypt, const uint8_t *round_keys)
{
    uint8_t blocks[(PS_BATCH_MAX + 1) * PS_BLOCK_SIZE], expected[sizeof blocks];
    for (size_t count = 0; count <= PS_BATCH_MAX; count++) {
        for (size_t i = 0; i < sizeof blocks; i++) {
            blocks[i] = expected[i] = (uint8_t)(i * 73 + i / 16 + count);
        }
        encrypt(round_keys, blocks, count);
        ps_aes_encrypt_portable(round_keys, expected, count);
        CHECK(memcmp(blocks, expected, sizeof blocks) == 0);
    }
}

void test_aes(void)
{
    uint8_t key[16], block[16], expected[16];
    uint8_t round_keys[PS_AES_ROUND_KEYS_SIZE] __attribute__((aligned(64)));
    from_hex("000102030405060708090a0b0c0d0e0f", key); /* FIPS 197, C.1 */
    from_hex("00112233445566778899aabbccddeeff", block);
    from_hex("69c4e0d86a7b0430d8cdb78070b4c55a", expected);
    ps_aes_expand(key, round_keys);
    ps_aes_encrypt_portable(round_keys, block, 1);
    CHECK(memcmp(block, expected, sizeof block) == 0);
    from_hex("2b7e151628aed2a6abf7158809cf4f3c", key); /* FIPS 197, A.1 */
    from_hex("d014f9a8c9ee2589e13f0cc8b6630ca6", expected);
    ps_aes_expand(key, round_keys);
    CHECK(memcmp(round_keys + 160, expected, sizeof expected) == 0);
#if defined(__x86_64__)
    uint32_t features = ps_cpu_features();
    if (features & PS_CPU_AES) {
        check_same_as_portable(ps_aes_encrypt_aesni, round_keys);
    }
    if (features & PS_CPU_VAES && features & PS_CPU_AVX512) {
        check_same_as_portable(ps_aes_encrypt_vaes, round_keys);
    }
#elif defined(__aarch64__)
    if (ps_cpu_features() & PS_CPU_AES) {
        check_same_as_portable(ps_aes_encrypt_armv8, round_keys);
    }
#endif
    check_same_as_portable(ps_dispatch_aes(PS_FORM_AUTO), round_keys);
}

void test_shake(void)
{
    uint8_t output[300], expected[32];
    from_hex("46b9dd2b0ba88d13233b3feb743eeb243fcd52ea62b81b82b50c27646ed5762f", expected);
    ps_shake256(NULL, 0, output, 32); /* FIPS 202, SHAKE256 of nothing */
    CHECK(memcmp(output, expected, 32) == 0);
    uint8_t longer[300];
    ps_shake256(expected, 32, longer, sizeof longer);
    ps_shake256(expected, 32, output, 136);
    CHECK(memcmp(output, longer, 136) == 0 && memcmp(longer, longer + 136, 32) != 0);
}

/* ---- keys ---- */

/* What a child process sees of the key. */
static bool child_sees_zeros(const ps_key *key)
{
    pid_t child = fork();
    require(child >= 0, "fork");
    if (child == 0) {
        _exit(all_equal((const uint8_t *)key, 0, sizeof *key) ? 0 : 1);
    }
    int status;
    require(waitpid(child, &status, 0) == child, "waitpid");
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

/* The VmFlags of the mapping with `address` (proc(5)), between spaces. */
static void read_flags(const void *address, char *line, int size)
{
    bool found = false;
    FILE *file = fopen("/proc/self/smaps", "r");
    require(file != NULL, "/proc/self/smaps");
    while (fgets(line, size, file) != NULL) {
        uintptr_t start, end;
        if (sscanf(line, "%" SCNxPTR "-%" SCNxPTR " ", &start, &end) == 2) {
            found = start <= (uintptr_t)address && (uintptr_t)address < end;
        } else if (found && strncmp(line, "VmFlags:", 8) == 0) {
            break;
        }
    }
    fclose(file);
}

void test_keys(void)
{
    static const uint8_t secret[PS_SECRET_SIZE] = {1, 2, 3};
    CHECK(ps_key_new(PS_DIGEST_SHA256, secret) == NULL && ps_key_new(0, NULL) == NULL);
    CHECK(ps_key_nh_words(NULL) == NULL);
    ps_key_free(NULL);
    for (int digest = PS_DIGEST_NH4AES; digest <= PS_DIGEST_GF128AES; digest++) {
        ps_key *one = ps_key_new(digest, secret), *same = ps_key_new(digest, secret);
        ps_key *drawn = ps_key_new(digest, NULL), *other = ps_key_new(digest, NULL);
        require(one && same && drawn && other, "ps_key_new");
        size_t size = sizeof one->stream;
        CHECK(memcmp(one->stream, same->stream, size) == 0);
        CHECK(memcmp(one->stream, drawn->stream, size) != 0);
        CHECK(memcmp(other->stream, drawn->stream, size) != 0);
        CHECK((ps_key_nh_words(one) == one->stream) == (digest == PS_DIGEST_NH4AES));
        CHECK((uintptr_t)one % PAGE == 0);
        ps_key_free(one);
        ps_key_free(same);
        ps_key_free(drawn);
        ps_key_free(other);
    }
}

void test_key_memory(void)
{
    ps_key *one = ps_key_new(PS_DIGEST_NH4AES, NULL);
    require(one != NULL, "ps_key_new");
    CHECK(child_sees_zeros(one));
    char flags[512];
    read_flags(one, flags, sizeof flags);
    CHECK(strstr(flags, " dd ") && strstr(flags, " wf "));
#if !defined(__SANITIZE_ADDRESS__) /* whose mlock() does nothing */
    CHECK(strstr(flags, " lo "));
#endif
    CHECK(strstr(flags, " rd ") && !strstr(flags, " wr "));
    ps_key_free(one);
}

void test_finish(void)
{
    enum { COUNT = 130 };
    static uint64_t sums[COUNT * PS_NH_PASSES], tweaks[COUNT];
    static uint8_t digests[COUNT * PS_KEYED_SIZE], expected[COUNT * PS_KEYED_SIZE];
    ps_key *key = ps_key_new(PS_DIGEST_NH4AES, NULL);
    ps_key *foreign = ps_key_new(PS_DIGEST_GF128AES, NULL);
    require(key && foreign, "ps_key_new");
    for (size_t i = 0; i < COUNT; i++) {
        tweaks[i] = i * i;
        for (size_t t = 0; t < PS_NH_PASSES; t++) {
            sums[PS_NH_PASSES * i + t] = (i + 1) * 0x9e3779b97f4a7c15 + t;
        }
        const ps_batch one = {NULL, tweaks + i, 1, key, ps_aes_encrypt_portable,
                              expected + i * PS_KEYED_SIZE};
        ps_nh4aes_finish_batch(&one, sums + PS_NH_PASSES * i);
    }
    CHECK(ps_nh4aes_finish(key, sums, tweaks, COUNT, digests) == PS_OK);
    CHECK(memcmp(digests, expected, sizeof digests) == 0);
    CHECK(ps_nh4aes_finish(key, NULL, NULL, 0, NULL) == PS_OK);
    CHECK(ps_nh4aes_finish(NULL, sums, tweaks, 1, digests) == PS_ERR_ARGUMENT);
    CHECK(ps_nh4aes_finish(foreign, sums, tweaks, 1, digests) == PS_ERR_ARGUMENT);
    CHECK(ps_nh4aes_finish(key, sums, NULL, 1, digests) == PS_ERR_ARGUMENT);
    ps_key_free(key);
    ps_key_free(foreign);
}
