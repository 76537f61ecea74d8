/* Native test driver: test vectors, and every subset of CPU features. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "driver.h"

enum { VECTORS_MAX = 64, LINE_MAX = 512 };

typedef struct {
    int digest;
    uint8_t page[PAGE];
    ps_key *key;
    uint64_t frame;
    uint8_t expected[DIGEST_MAX];
} vector;

static vector vectors[VECTORS_MAX];
static size_t vectors_count;

static const char *const names[] = {
    [PS_DIGEST_SHA256] = "sha256",
    [PS_DIGEST_NH4AES] = "nh4aes",
    [PS_DIGEST_GF128AES] = "gf128aes",
};

/* Copies what stands behind `"name": ` up to a quote, comma or brace; false without it. */
static bool field(const char *line, const char *name, char *value, size_t size)
{
    char wanted[32];
    snprintf(wanted, sizeof wanted, "\"%s\": ", name);
    const char *at = strstr(line, wanted);
    if (at == NULL) {
        return false;
    }
    at += strlen(wanted);
    at += *at == '"';
    size_t length = strcspn(at, "\",}");
    if (length >= size) {
        return false;
    }
    memcpy(value, at, length);
    value[length] = '\0';
    return true;
}

static bool from_hex(const char *hex, uint8_t *bytes, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        if (sscanf(hex + 2 * i, "%2hhx", &bytes[i]) != 1) {
            return false;
        }
    }
    return strlen(hex) == 2 * count;
}

static void read_vector(const char *line, int digest)
{
    char rule[16], a[16], b[16], frame[24] = "0", hex[2 * DIGEST_MAX + 1];
    uint8_t secret[PS_SECRET_SIZE];
    require(vectors_count < VECTORS_MAX, "too many vectors");
    vector *new = &vectors[vectors_count++];
    new->digest = digest;
    if (digest != PS_DIGEST_SHA256) {
        require(field(line, "secret", hex, sizeof hex) && from_hex(hex, secret, sizeof secret) &&
                    field(line, "frame", frame, sizeof frame),
                "vector of a keyed digest");
        new->key = ps_key_new(digest, secret);
        require(new->key != NULL, "ps_key_new");
    }
    new->frame = strtoull(frame, NULL, 10);
    require(field(line, "rule", rule, sizeof rule) && field(line, "a", a, sizeof a) &&
                field(line, "b", b, sizeof b) && field(line, names[digest], hex, sizeof hex) &&
                from_hex(hex, new->expected, ps_digest_size(digest)) &&
                fill_by_rule(new->page, rule, (uint32_t)strtoul(a, NULL, 10),
                             (uint32_t)strtoul(b, NULL, 10)),
            "vector");
}

static void read_file(const char *path)
{
    FILE *file = fopen(path, "r");
    require(file != NULL, path);
    char line[LINE_MAX], name[16];
    int digest = PS_DIGEST_GF128AES;
    require(fgets(line, sizeof line, file) && field(line, "digest", name, sizeof name), path);
    while (digest > 0 && strcmp(names[digest], name) != 0) {
        digest--;
    }
    require(digest > 0, name);
    while (fgets(line, sizeof line, file) != NULL) {
        if (line[0] == '{') {
            read_vector(line, digest);
        }
    }
    fclose(file);
}

void read_vectors(int files, char **paths)
{
    for (int i = 0; i < files; i++) {
        read_file(paths[i]);
    }
}

/* How many vectors `digest` has; all of them hold in `form`. */
static size_t check_vectors(int digest, int form)
{
    size_t checked = 0;
    for (size_t i = 0; i < vectors_count; i++) {
        const vector *one = &vectors[i];
        if (one->digest != digest) {
            continue;
        }
        const ps_method how = {digest, form, one->key, NULL};
        uint8_t result[DIGEST_MAX], status = 0xff;
        bool done = ps_digest_range(&how, one->page, 1, &one->frame, result, &status) == PS_OK;
        CHECK(done && status == PS_PAGE_OK);
        CHECK(memcmp(result, one->expected, ps_digest_size(digest)) == 0);
        checked++;
    }
    return checked;
}

void test_vectors(void)
{
    CHECK(check_vectors(method.digest, method.form) >= 10);
}

/* The forms that a CPU with these features must have, as the design says. */
static uint32_t forms_with(int digest, uint32_t features)
{
    uint32_t mask = digest == PS_DIGEST_GF128AES ? 0 : 1u << PS_FORM_PORTABLE;
    bool avx2 = features & PS_CPU_AVX2, avx512 = features & PS_CPU_AVX512;
    bool vpclmul = features & PS_CPU_VPCLMUL;
#if defined(__x86_64__)
    switch (digest) {
    case PS_DIGEST_SHA256:
        return mask | (features & PS_CPU_SHA ? 1u << PS_FORM_SHANI : 0);
    case PS_DIGEST_NH4AES:
        return mask | 1u << PS_FORM_SSE2 | (avx2 ? 1u << PS_FORM_AVX2 : 0) |
               (avx512 ? 1u << PS_FORM_AVX512 : 0);
    default:
        return mask | (features & PS_CPU_PCLMUL ? 1u << PS_FORM_PCLMUL : 0) |
               (avx2 && vpclmul ? 1u << PS_FORM_VPCLMUL : 0) |
               (avx512 && vpclmul ? 1u << PS_FORM_AVX512 : 0);
    }
#else
    (void)avx2, (void)avx512, (void)vpclmul;
    return mask | (digest == PS_DIGEST_NH4AES ? 1u << PS_FORM_NEON : 0);
#endif
}

void test_features(void)
{
    for (uint32_t features = 0; features <= PS_CPU_ALL; features++) {
        ps_cpu_restrict(features);
        uint32_t present = ps_cpu_features();
        CHECK(!(present & ~features));
        for (int digest = PS_DIGEST_SHA256; digest <= PS_DIGEST_GF128AES; digest++) {
            uint32_t forms = ps_forms_available(digest);
            CHECK(forms == forms_with(digest, present));
            for (int form = PS_FORM_AUTO; form <= PS_FORM_LAST; form++) {
                bool runs = form == PS_FORM_AUTO ? forms != 0 : forms >> form & 1;
                int picked = ps_form_pick(digest, form);
                CHECK(runs ? forms >> picked & 1 : picked == PS_ERR_FORM);
                if (runs) {
                    check_vectors(digest, form);
                }
            }
        }
    }
    ps_cpu_restrict(PS_CPU_ALL);
}

void test_forms(void)
{
    CHECK(ps_digest_size(PS_DIGEST_SHA256) == 32 && ps_digest_size(PS_DIGEST_NH4AES) == 16);
    CHECK(ps_digest_size(PS_DIGEST_GF128AES) == 16);
    static const int wrong[] = {-1, 0, 4};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        CHECK(ps_digest_size(wrong[i]) == 0 && ps_forms_available(wrong[i]) == 0);
        CHECK(ps_form_pick(wrong[i], PS_FORM_AUTO) == PS_ERR_ARGUMENT);
    }
    CHECK(ps_form_pick(PS_DIGEST_SHA256, -1) == PS_ERR_ARGUMENT);
    CHECK(ps_form_pick(PS_DIGEST_SHA256, PS_FORM_LAST + 1) == PS_ERR_ARGUMENT);
    CHECK(ps_form_pick(PS_DIGEST_GF128AES, PS_FORM_PORTABLE) == PS_ERR_FORM);
}
