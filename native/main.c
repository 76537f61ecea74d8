/* Native test driver: the core alone, under sanitizers, in every form that this CPU has.
 *
 *     cd native && gcc -std=c11 -g -O1 -fsanitize=address,undefined \
 *         -fno-sanitize-recover=all -pthread *.c -o driver
 *     ./driver ../tests/vectors/sha256-pages.json
 *
 * One line per group, then the totals; the exit status is 0 only when nothing failed.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "driver.h"

static const char *vectors_path;
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

/* The rules of tests/vectors/make.py. */
static bool fill_by_rule(uint8_t *page, const char *rule, uint32_t a, uint32_t b)
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

/* `count` filled pages, `skew` bytes off alignment; free() takes *block. */
static uint8_t *make_pages(size_t count, size_t skew, void **block)
{
    *block = malloc(count * PAGE + skew + 1);
    require(*block != NULL, "malloc");
    fill_pages((uint8_t *)*block + skew, count);
    return (uint8_t *)*block + skew;
}

const uint8_t *reference_digests(void)
{
    static uint8_t digests[PAGES_MAX * DIGEST];
    static bool made;
    if (!made) {
        uint8_t page[PAGE];
        for (uint32_t i = 0; i < PAGES_MAX; i++) {
            const uint8_t *pages = page;
            fill_xorshift32(page, i + 1);
            ps_digest_sha256_portable(&pages, 1, digests + i * DIGEST);
        }
        made = true;
    }
    return digests;
}

/* ---- groups that run in every form ---- */

static bool digest_from_hex(const char *hex, uint8_t *digest)
{
    for (size_t i = 0; i < DIGEST; i++) {
        if (sscanf(hex + 2 * i, "%2hhx", &digest[i]) != 1) {
            return false;
        }
    }
    return strlen(hex) == 2 * DIGEST;
}

static void test_vectors(void)
{
    FILE *file = fopen(vectors_path, "r");
    require(file != NULL, vectors_path);
    char line[512], rule[16], hex[2 * DIGEST + 2];
    uint32_t a, b;
    size_t vectors = 0;
    while (fgets(line, sizeof line, file) != NULL) {
        if (sscanf(line,
                   "{\"name\": \"%*[^\"]\", \"rule\": \"%15[^\"]\", \"a\": %" SCNu32
                   ", \"b\": %" SCNu32 ", \"sha256\": \"%65[^\"]\"}",
                   rule, &a, &b, hex) != 4) {
            continue;
        }
        uint8_t page[PAGE], expected[DIGEST], digest[DIGEST], status;
        CHECK(fill_by_rule(page, rule, a, b) && digest_from_hex(hex, expected));
        CHECK(ps_digest_range(page, 1, digest, &status) == PS_OK && status == PS_PAGE_OK);
        CHECK(memcmp(digest, expected, DIGEST) == 0);
        vectors++;
    }
    fclose(file);
    CHECK(vectors >= 10);
}

static void check_shape(const uint8_t *pages, size_t count)
{
    const uint8_t *expected = reference_digests();
    uint64_t *offsets = calloc(count + 1, sizeof *offsets);
    uint8_t *digests = malloc(count * DIGEST + 1), *statuses = malloc(count + 1);
    uint8_t *copies = malloc(count * PAGE + 1);
    require(offsets && digests && statuses && copies, "malloc");

    memset(statuses, 0xff, count);
    CHECK(ps_digest_range(pages, count, digests, statuses) == PS_OK);
    CHECK(memcmp(digests, expected, count * DIGEST) == 0);
    CHECK(all_equal(statuses, PS_PAGE_OK, count));

    for (size_t i = 0; i < count; i++) {
        offsets[i] = (count - 1 - i) * PAGE;
    }
    memset(statuses, 0xff, count);
    CHECK(ps_digest_list(pages, count * PAGE, offsets, count, digests, statuses) == PS_OK);
    CHECK(ps_copy_list(pages, count * PAGE, offsets, count, copies, statuses) == PS_OK);
    CHECK(all_equal(statuses, PS_PAGE_OK, count));
    bool digested = true, copied = true;
    for (size_t i = 0; i < count; i++) {
        size_t from = count - 1 - i;
        digested &= memcmp(digests + i * DIGEST, expected + from * DIGEST, DIGEST) == 0;
        copied &= memcmp(copies + i * PAGE, pages + from * PAGE, PAGE) == 0;
    }
    CHECK(digested);
    CHECK(copied);
    free(offsets);
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
    uint8_t digests[COUNT * DIGEST], statuses[COUNT], copies[COUNT * PAGE];

    CHECK(ps_digest_list(pages, 2 * PAGE, offsets, COUNT, digests, statuses) == PS_OK);
    CHECK(memcmp(statuses, holes, COUNT) == 0);
    CHECK(memcmp(digests, reference_digests(), 2 * DIGEST) == 0);
    CHECK(ps_copy_list(pages, 2 * PAGE, offsets, COUNT, copies, statuses) == PS_OK);
    CHECK(memcmp(statuses, holes, COUNT) == 0);
    for (size_t i = 0; i < COUNT; i++) {
        CHECK(all_equal(digests + i * DIGEST, PS_POISON, DIGEST) == holes[i]);
        CHECK(all_equal(copies + i * PAGE, PS_POISON, PAGE) == holes[i]);
    }
    static const size_t lengths[] = {0, 1, PAGE - 1};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        CHECK(ps_digest_list(pages, lengths[i], offsets, COUNT, digests, statuses) == PS_OK);
        CHECK(all_equal(statuses, PS_PAGE_HOLE, COUNT));
        CHECK(all_equal(digests, PS_POISON, sizeof digests));
    }
    free(block);
}

/* Pages 3, 4 and 40 differ and page 20 is a hole, whatever the length of the list. */
static void check_compare(const uint8_t *pages, size_t indices_max)
{
    enum { COUNT = 41 };
    static const uint64_t unequal[] = {3, 4, 20, 40};
    uint8_t expected[COUNT * DIGEST], statuses[COUNT];
    uint64_t offsets[COUNT], indices[5] = {99, 99, 99, 99, 99};
    ps_tally tally;
    memcpy(expected, reference_digests(), sizeof expected);
    expected[3 * DIGEST] ^= 0x80;
    expected[4 * DIGEST + 31] ^= 0x01;
    expected[40 * DIGEST + 16] ^= 0x10;
    for (size_t i = 0; i < COUNT; i++) {
        offsets[i] = i == 20 ? UINT64_MAX : i * PAGE;
    }
    size_t listed = indices_max < 4 ? indices_max : 4;

    CHECK(ps_compare_list(pages, COUNT * PAGE, offsets, COUNT, expected, statuses, indices,
                          indices_max, &tally) == PS_OK);
    CHECK(tally.ok == 37 && tally.mismatched == 3 && tally.unreadable == 1);
    CHECK(tally.listed == listed && memcmp(indices, unequal, listed * sizeof *indices) == 0);
    CHECK(indices[listed] == 99);
    CHECK(statuses[20] == PS_PAGE_HOLE && all_equal(statuses, PS_PAGE_OK, 20));

    CHECK(ps_compare_range(pages, COUNT, expected, statuses, indices, indices_max, &tally) ==
          PS_OK);
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
    CHECK(ps_compare_range(pages, PAGES_MAX, reference_digests(), statuses, NULL, 0, &tally) ==
          PS_OK);
    CHECK(tally.ok == PAGES_MAX && tally.mismatched + tally.unreadable + tally.listed == 0);
    CHECK(ps_compare_range(NULL, 0, NULL, NULL, NULL, 0, &tally) == PS_OK);
    CHECK(tally.ok + tally.mismatched + tally.unreadable + tally.listed == 0);
    free(block);
}

/* ---- groups that run once ---- */

static void test_arguments(void)
{
    uint8_t page[PAGE] = {0}, digest[DIGEST], status;
    const uint64_t offset = 0;
    uint64_t index;
    ps_tally tally;
    const size_t wraps = SIZE_MAX / PAGE;
    CHECK(ps_digest_range(NULL, 1, digest, &status) == PS_ERR_ARGUMENT);
    CHECK(ps_digest_range(page, 1, NULL, &status) == PS_ERR_ARGUMENT);
    CHECK(ps_digest_range(page, 1, digest, NULL) == PS_ERR_ARGUMENT);
    CHECK(ps_digest_range(page, wraps, digest, &status) == PS_ERR_ARGUMENT);
    CHECK(ps_digest_range(page, SIZE_MAX, digest, &status) == PS_ERR_ARGUMENT);
    CHECK(ps_digest_range(NULL, 0, NULL, NULL) == PS_OK);
    CHECK(ps_digest_list(NULL, PAGE, &offset, 1, digest, &status) == PS_ERR_ARGUMENT);
    CHECK(ps_digest_list(page, PAGE, NULL, 1, digest, &status) == PS_ERR_ARGUMENT);
    CHECK(ps_digest_list(page, SIZE_MAX, &offset, 1, digest, &status) == PS_ERR_ARGUMENT);
    CHECK(ps_digest_list(NULL, 0, NULL, 0, NULL, NULL) == PS_OK);
    CHECK(ps_copy_list(page, PAGE, &offset, 1, NULL, &status) == PS_ERR_ARGUMENT);
    CHECK(ps_compare_range(page, 1, NULL, &status, &index, 1, &tally) == PS_ERR_ARGUMENT);
    CHECK(ps_compare_range(page, 1, digest, NULL, &index, 1, &tally) == PS_ERR_ARGUMENT);
    CHECK(ps_compare_range(page, 1, digest, &status, NULL, 1, &tally) == PS_ERR_ARGUMENT);
    CHECK(ps_compare_range(page, 1, digest, &status, &index, 1, NULL) == PS_ERR_ARGUMENT);
}

static void test_forms(void)
{
    uint32_t available = ps_forms_available();
    CHECK(available & (1u << PS_FORM_PORTABLE));
    CHECK(ps_form_set(-1) == PS_ERR_ARGUMENT && ps_form_set(3) == PS_ERR_ARGUMENT);
    for (int form = PS_FORM_PORTABLE; form <= PS_FORM_SHANI; form++) {
        bool present = available & (1u << form);
        CHECK(ps_form_set(form) == (present ? PS_OK : PS_ERR_FORM));
        CHECK((ps_form_get() == form) == present);
        CHECK(ps_form_set(PS_FORM_AUTO) == PS_OK);
        CHECK(available & (1u << ps_form_get()));
    }
}

/* ---- */

typedef struct {
    const char *name;
    void (*run)(void);
    bool per_form;
} test_group;

static const test_group groups[] = {
    {"forms", test_forms, false},
    {"arguments", test_arguments, false},
    {"foreign handlers", test_foreign_handlers, false},
    {"vectors", test_vectors, true},
    {"shapes", test_shapes, true},
    {"bounds", test_bounds, true},
    {"compare", test_compare, true},
    {"truncated", test_truncated, true},
    {"threads", test_threads, true},
};

static void run_group(const test_group *group, const char *form)
{
    int passed_before = passed, failed_before = failed;
    group->run();
    printf("%s%s%s: %d passed, %d failed\n", group->name, *form ? " " : "", form,
           passed - passed_before, failed - failed_before);
}

int main(int argc, char **argv)
{
    static const char *const form_names[] = {"auto", "portable", "shani"};
    if (argc != 2) {
        fprintf(stderr, "usage: driver VECTORS.json\n");
        return 2;
    }
    vectors_path = argv[1];
    for (size_t i = 0; i < sizeof groups / sizeof *groups; i++) {
        if (!groups[i].per_form) {
            run_group(&groups[i], "");
            continue;
        }
        for (int form = PS_FORM_PORTABLE; form <= PS_FORM_SHANI; form++) {
            if (ps_form_set(form) == PS_OK) {
                run_group(&groups[i], form_names[form]);
            }
        }
        ps_form_set(PS_FORM_AUTO);
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 ? 0 : 1;
}
