/* Native test driver: the core alone, under sanitizers, in every form that this CPU has.
 *
 *     cd native && gcc -std=c11 -g -O1 -fsanitize=address,undefined \
 *         -fno-sanitize-recover=all -pthread *.c -o driver
 *     ./driver [--emulated] ../tests/vectors/{sha256,nh4aes,gf128aes}-pages.json
 *
 * With --emulated, as under qemu-user, it leaves out what is about the kernel and not about
 * the CPU.
 *
 * One line per group, then the totals; the exit status is 0 only when nothing failed.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "driver.h"

ps_method method;
size_t digest_size;

static int passed, failed;

void check(bool holds, const char *condition, const char *file, int line)
{
    if (holds) {
        passed++;
    } else {
        failed++;
        printf("%s:%d: not so: %s\n", file, line, condition);
    }
}

void require(bool holds, const char *what)
{
    if (!holds) {
        perror(what);
        exit(2);
    }
}

bool all_equal(const uint8_t *bytes, uint8_t value, size_t count)
{
    while (count > 0 && *bytes == value) {
        bytes++;
        count--;
    }
    return count == 0;
}

/* ---- pages ---- */

static void fill_xorshift32(uint8_t *page, uint32_t state)
{
    for (size_t at = 0; at < PAGE; at += 4) {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        for (size_t i = 0; i < 4; i++) {
            page[at + i] = (uint8_t)(state >> (8 * i));
        }
    }
}

bool fill_by_rule(uint8_t *page, const char *rule, uint32_t a, uint32_t b)
{
    if (strcmp(rule, "xorshift32") == 0) {
        fill_xorshift32(page, a);
        return true;
    }
    bool ramp = strcmp(rule, "ramp") == 0;
    for (uint32_t i = 0; i < PAGE; i++) {
        page[i] = (uint8_t)(ramp ? i * a + b : (i == a ? b : 0));
    }
    return ramp || strcmp(rule, "spike") == 0;
}

void fill_pages(uint8_t *pages, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        fill_xorshift32(pages + i * PAGE, (uint32_t)i + 1);
    }
}

uint8_t *make_pages(size_t count, size_t skew, void **block)
{
    *block = malloc(count * PAGE + skew + 1);
    require(*block != NULL, "malloc");
    fill_pages((uint8_t *)*block + skew, count);
    return (uint8_t *)*block + skew;
}

const uint64_t *frames(void)
{
    static uint64_t numbers[PAGES_MAX];
    for (uint64_t i = 0; i < PAGES_MAX; i++) {
        numbers[i] = 7 + i * 0x10001;
    }
    return numbers;
}

const uint8_t *reference_digests(void)
{
    static uint8_t digests[PS_DIGEST_GF128AES + 1][PAGES_MAX * DIGEST_MAX];
    static bool made[PS_DIGEST_GF128AES + 1];
    if (!made[method.digest]) {
        uint8_t page[PAGE];
        for (uint32_t i = 0; i < PAGES_MAX; i++) {
            fill_xorshift32(page, i + 1);
            reference_digest(page, frames()[i], digests[method.digest] + i * digest_size);
        }
        made[method.digest] = true;
    }
    return digests[method.digest];
}

/* ---- groups that run in every form ---- */

static void check_shape(const uint8_t *pages, size_t count)
{
    const uint8_t *expected = reference_digests();
    uint64_t *offsets = calloc(count + 1, sizeof *offsets);
    uint64_t *tweaks = calloc(count + 1, sizeof *tweaks);
    uint8_t *digests = malloc(count * DIGEST_MAX + 1), *statuses = malloc(count + 1);
    uint8_t *copies = malloc(count * PAGE + 1);
    require(offsets && tweaks && digests && statuses && copies, "malloc");

    memset(statuses, 0xff, count);
    CHECK(ps_digest_range(&method, pages, count, frames(), digests, statuses) == PS_OK);
    CHECK(memcmp(digests, expected, count * digest_size) == 0);
    CHECK(all_equal(statuses, PS_PAGE_OK, count));

    for (size_t i = 0; i < count; i++) {
        offsets[i] = (count - 1 - i) * PAGE;
        tweaks[i] = frames()[count - 1 - i];
    }
    memset(statuses, 0xff, count);
    CHECK(ps_digest_list(&method, pages, count * PAGE, offsets, count, tweaks, digests, statuses) ==
          PS_OK);
    CHECK(ps_copy_list(method.pool, pages, count * PAGE, offsets, count, copies, statuses) ==
          PS_OK);
    CHECK(all_equal(statuses, PS_PAGE_OK, count));
    bool digested = true, copied = true;
    for (size_t i = 0; i < count; i++) {
        size_t from = count - 1 - i;
        const uint8_t *wanted = expected + from * digest_size;
        digested &= memcmp(digests + i * digest_size, wanted, digest_size) == 0;
        copied &= memcmp(copies + i * PAGE, pages + from * PAGE, PAGE) == 0;
    }
    CHECK(digested);
    CHECK(copied);
    free(offsets);
    free(tweaks);
    free(digests);
    free(statuses);
    free(copies);
}

static void test_shapes(void)
{
    static const size_t counts[] = {0, 1, 2, 3, 16, 17, 64, 65, PAGES_MAX};
    static const size_t skews[] = {0, 1, 7, 4095};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        for (size_t j = 0; j < sizeof skews / sizeof *skews; j++) {
            void *block;
            check_shape(make_pages(counts[i], skews[j], &block), counts[i]);
            free(block);
        }
    }
}

static void test_bounds(void)
{
    enum { COUNT = 8 };
    void *block;
    const uint8_t *pages = make_pages(2, 0, &block);
    const uint64_t offsets[COUNT] = {0,          PAGE,           PAGE + 1,  2 * PAGE,
                                     UINT64_MAX, UINT64_MAX / 2, PAGE / 2, (uint64_t)0 - PAGE};
    const uint8_t holes[COUNT] = {0, 0, 1, 1, 1, 1, 0, 1};
    uint8_t digests[COUNT * DIGEST_MAX], statuses[COUNT], copies[COUNT * PAGE];

    CHECK(ps_digest_list(&method, pages, 2 * PAGE, offsets, COUNT, frames(), digests, statuses) ==
          PS_OK);
    CHECK(memcmp(statuses, holes, COUNT) == 0);
    CHECK(memcmp(digests, reference_digests(), 2 * digest_size) == 0);
    CHECK(ps_copy_list(method.pool, pages, 2 * PAGE, offsets, COUNT, copies, statuses) == PS_OK);
    CHECK(memcmp(statuses, holes, COUNT) == 0);
    for (size_t i = 0; i < COUNT; i++) {
        CHECK(all_equal(digests + i * digest_size, PS_POISON, digest_size) == holes[i]);
        CHECK(all_equal(copies + i * PAGE, PS_POISON, PAGE) == holes[i]);
    }
    static const size_t lengths[] = {0, 1, PAGE - 1};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        CHECK(ps_digest_list(&method, pages, lengths[i], offsets, COUNT, frames(), digests,
                             statuses) == PS_OK);
        CHECK(all_equal(statuses, PS_PAGE_HOLE, COUNT));
        CHECK(all_equal(digests, PS_POISON, COUNT * digest_size));
    }
    free(block);
}

/* Pages 3, 4 and 40 differ and page 20 is a hole, whatever the length of the list. */
static void check_compare(const uint8_t *pages, size_t indices_max)
{
    enum { COUNT = 41 };
    static const uint64_t unequal[] = {3, 4, 20, 40};
    uint8_t expected[COUNT * DIGEST_MAX], statuses[COUNT];
    uint64_t offsets[COUNT], indices[5] = {99, 99, 99, 99, 99};
    ps_tally tally;
    memcpy(expected, reference_digests(), sizeof expected);
    expected[3 * digest_size] ^= 0x80;
    expected[5 * digest_size - 1] ^= 0x01;
    expected[40 * digest_size + 9] ^= 0x10;
    for (size_t i = 0; i < COUNT; i++) {
        offsets[i] = i == 20 ? UINT64_MAX : i * PAGE;
    }
    size_t listed = indices_max < 4 ? indices_max : 4;

    CHECK(ps_compare_list(&method, pages, COUNT * PAGE, offsets, COUNT, frames(), expected,
                          statuses, indices, indices_max, &tally) == PS_OK);
    CHECK(tally.ok == 37 && tally.mismatched == 3 && tally.unreadable == 1);
    CHECK(tally.listed == listed && memcmp(indices, unequal, listed * sizeof *indices) == 0);
    CHECK(indices[listed] == 99);
    CHECK(statuses[20] == PS_PAGE_HOLE && all_equal(statuses, PS_PAGE_OK, 20));

    CHECK(ps_compare_range(&method, pages, COUNT, frames(), expected, statuses, indices,
                           indices_max, &tally) == PS_OK);
    CHECK(tally.ok == 38 && tally.mismatched == 3 && tally.unreadable == 0);
    CHECK(tally.listed == (indices_max < 3 ? indices_max : 3));
}

static void test_compare(void)
{
    static const size_t indices_max[] = {0, 1, 2, 4, 5};
    void *block;
    const uint8_t *pages = make_pages(PAGES_MAX, 0, &block);
    for (size_t i = 0; i < sizeof indices_max / sizeof *indices_max; i++) {
        check_compare(pages, indices_max[i]);
    }
    uint8_t statuses[PAGES_MAX];
    ps_tally tally;
    CHECK(ps_compare_range(&method, pages, PAGES_MAX, frames(), reference_digests(), statuses, NULL,
                           0, &tally) == PS_OK);
    CHECK(tally.ok == PAGES_MAX && tally.mismatched + tally.unreadable + tally.listed == 0);
    CHECK(ps_compare_range(&method, NULL, 0, NULL, NULL, NULL, NULL, 0, &tally) == PS_OK);
    CHECK(tally.ok + tally.mismatched + tally.unreadable + tally.listed == 0);
    free(block);
}

/* ---- groups that run once ---- */

static void test_method_arguments(void)
{
    uint8_t page[PAGE] = {0}, digest[DIGEST_MAX], status;
    const uint64_t frame = 0;
    ps_key *nh_key = ps_key_new(PS_DIGEST_NH4AES, NULL);
    require(nh_key != NULL, "ps_key_new");
    const ps_method good = {PS_DIGEST_NH4AES, PS_FORM_AUTO, nh_key, NULL};
    const ps_method wrong[] = {
        {0, PS_FORM_AUTO, NULL, NULL},
        {4, PS_FORM_AUTO, NULL, NULL},
        {PS_DIGEST_SHA256, -1, NULL, NULL},
        {PS_DIGEST_SHA256, PS_FORM_LAST + 1, NULL, NULL},
        {PS_DIGEST_NH4AES, PS_FORM_AUTO, NULL, NULL},
        {PS_DIGEST_GF128AES, PS_FORM_AUTO, nh_key, NULL},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        int result = ps_digest_range(&wrong[i], page, 1, &frame, digest, &status);
        CHECK(result == PS_ERR_ARGUMENT || result == PS_ERR_FORM);
    }
    const ps_method foreign = {PS_DIGEST_SHA256, PS_FORM_VPCLMUL, NULL, NULL};
    CHECK(ps_digest_range(&foreign, page, 1, NULL, digest, &status) == PS_ERR_FORM);
    CHECK(ps_digest_range(NULL, page, 1, &frame, digest, &status) == PS_ERR_ARGUMENT);
    CHECK(ps_digest_range(&good, page, 1, NULL, digest, &status) == PS_ERR_ARGUMENT);
    CHECK(ps_digest_range(&good, NULL, 0, NULL, NULL, NULL) == PS_OK);
    CHECK(ps_digest_range(&good, page, 1, &frame, digest, &status) == PS_OK);
    ps_key_free(nh_key);
}

static void test_arguments(void)
{
    const ps_method sha256 = {PS_DIGEST_SHA256, PS_FORM_AUTO, NULL, NULL};
    const ps_method *how = &sha256;
    uint8_t page[PAGE] = {0}, digest[DIGEST_MAX], status;
    const uint64_t offset = 0;
    uint64_t index;
    ps_tally tally;
    const size_t wraps = SIZE_MAX / PAGE;
    CHECK(ps_digest_range(how, NULL, 1, NULL, digest, &status) == PS_ERR_ARGUMENT);
    CHECK(ps_digest_range(how, page, 1, NULL, NULL, &status) == PS_ERR_ARGUMENT);
    CHECK(ps_digest_range(how, page, 1, NULL, digest, NULL) == PS_ERR_ARGUMENT);
    CHECK(ps_digest_range(how, page, wraps, NULL, digest, &status) == PS_ERR_ARGUMENT);
    CHECK(ps_digest_range(how, page, SIZE_MAX, NULL, digest, &status) == PS_ERR_ARGUMENT);
    CHECK(ps_digest_range(how, NULL, 0, NULL, NULL, NULL) == PS_OK);
    CHECK(ps_digest_list(how, NULL, PAGE, &offset, 1, NULL, digest, &status) == PS_ERR_ARGUMENT);
    CHECK(ps_digest_list(how, page, PAGE, NULL, 1, NULL, digest, &status) == PS_ERR_ARGUMENT);
    CHECK(ps_digest_list(how, page, SIZE_MAX, &offset, 1, NULL, digest, &status) ==
          PS_ERR_ARGUMENT);
    CHECK(ps_digest_list(how, NULL, 0, NULL, 0, NULL, NULL, NULL) == PS_OK);
    CHECK(ps_copy_list(NULL, page, PAGE, &offset, 1, NULL, &status) == PS_ERR_ARGUMENT);
    CHECK(ps_compare_range(how, page, 1, NULL, NULL, &status, &index, 1, &tally) ==
          PS_ERR_ARGUMENT);
    CHECK(ps_compare_range(how, page, 1, NULL, digest, NULL, &index, 1, &tally) ==
          PS_ERR_ARGUMENT);
    CHECK(ps_compare_range(how, page, 1, NULL, digest, &status, NULL, 1, &tally) ==
          PS_ERR_ARGUMENT);
    CHECK(ps_compare_range(how, page, 1, NULL, digest, &status, &index, 1, NULL) ==
          PS_ERR_ARGUMENT);
}

/* ---- */

typedef struct {
    const char *name;
    void (*run)(void);
} test_group;

static const test_group once[] = {
    {"forms", test_forms},
    {"arguments", test_arguments},
    {"methods", test_method_arguments},
    {"aes", test_aes},
    {"shake256", test_shake},
    {"keys", test_keys},
    {"finish", test_finish},
    {"pool", test_pool},
    {"read limit", test_read_limit},
    {"watch", test_watch},
    {"features", test_features},
};

static const test_group about_kernel[] = {
    {"key memory", test_key_memory},
    {"foreign handlers", test_foreign_handlers},
};

/* In every form of every digest. Those from `shapes` on also with two and three threads. */
static const test_group per_form[] = {
    {"vectors", test_vectors}, {"bounds", test_bounds},       {"threads", test_threads},
    {"shapes", test_shapes},   {"truncated", test_truncated}, {"compare", test_compare},
};
enum { THREADS_MAX = 3, FIRST_WITH_POOL = 3 };

static void run_groups(const test_group *groups, size_t count, const char *how)
{
    for (size_t i = 0; i < count; i++) {
        int passed_before = passed, failed_before = failed;
        groups[i].run();
        printf("%s%s: %d passed, %d failed\n", groups[i].name, how, passed - passed_before,
               failed - failed_before);
    }
}

static void run_form(int digest, int form, ps_key *key)
{
    static const char *const digests[] = {"", "sha256", "nh4aes", "gf128aes"};
    static const char *const forms[] = {"auto",  "portable", "sse2",    "avx2", "avx512",
                                        "shani", "pclmul",   "vpclmul", "neon"};
    enum { GROUPS = sizeof per_form / sizeof *per_form };
    for (unsigned threads = 1; threads <= THREADS_MAX; threads++) {
        char how[64];
        size_t first = threads > 1 ? FIRST_WITH_POOL : 0;
        ps_pool *pool = ps_pool_new(threads);
        require(pool != NULL, "ps_pool_new");
        method = (ps_method){digest, form, key, pool};
        digest_size = ps_digest_size(digest);
        snprintf(how, sizeof how, " %s/%s on %u", digests[digest], forms[form], threads);
        run_groups(per_form + first, GROUPS - first, how);
        ps_pool_free(pool);
    }
}

int main(int argc, char **argv)
{
    bool emulated = argc > 1 && strcmp(argv[1], "--emulated") == 0;
    if (argc != 4 + emulated) {
        fprintf(stderr, "usage: driver [--emulated] VECTORS.json VECTORS.json VECTORS.json\n");
        return 2;
    }
    read_vectors(3, argv + 1 + emulated);
    run_groups(once, sizeof once / sizeof *once, "");
    if (!emulated) {
        run_groups(about_kernel, sizeof about_kernel / sizeof *about_kernel, "");
    }
    for (int digest = PS_DIGEST_SHA256; digest <= PS_DIGEST_GF128AES; digest++) {
        ps_key *key = ps_key_new(digest, NULL);
        require(digest == PS_DIGEST_SHA256 || key != NULL, "ps_key_new");
        for (int form = PS_FORM_PORTABLE; form <= PS_FORM_LAST; form++) {
            if (ps_forms_available(digest) & (1u << form)) {
                run_form(digest, form, key);
            }
        }
        ps_key_free(key);
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 ? 0 : 1;
}
