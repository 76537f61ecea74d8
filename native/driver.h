/* Native test driver: what its files share. */
#ifndef PS_DRIVER_H
#define PS_DRIVER_H

#include "ps_internal.h"

enum { PAGE = PS_PAGE_SIZE, DIGEST_MAX = PS_DIGEST_SIZE_MAX, PAGES_MAX = 257 };

/* Counts a condition; one that does not hold is printed. Main thread only. */
#define CHECK(condition) check((condition), #condition, __FILE__, __LINE__)
void check(bool holds, const char *condition, const char *file, int line);

/* Ends a run that cannot go on. */
void require(bool holds, const char *what);

bool all_equal(const uint8_t *bytes, uint8_t value, size_t count);

/* What the groups that run in every form are to run now, and the size of its digests. */
extern ps_method method;
extern size_t digest_size;

/* Fills page i with xorshift32 from state i + 1. */
void fill_pages(uint8_t *pages, size_t count);

/* `count` filled pages, `skew` bytes off alignment; free() takes *block. */
uint8_t *make_pages(size_t count, size_t skew, void **block);

/* The frame numbers of PAGES_MAX pages, and the digests that `method` must give for those of
 * fill_pages(): made one by one, by the portable form or a twin that is as slow. */
const uint64_t *frames(void);
const uint8_t *reference_digests(void);

/* One page by the method in its portable form or the twin; `frame` is its tweak. */
void reference_digest(const uint8_t *page, uint64_t frame, uint8_t *digest);

/* Fills a page by a rule of tests/vectors/make.py; false when there is no such rule. */
bool fill_by_rule(uint8_t *page, const char *rule, uint32_t a, uint32_t b);

/* driver_vectors.c: reads the vector files, at most three; then checks them in all forms of all
 * digests that the CPU has with what ps_cpu_restrict() leaves. */
void read_vectors(int files, char **paths);
void test_vectors(void);
void test_features(void);
void test_forms(void);

/* driver_keyed.c */
void test_aes(void);
void test_shake(void);
void test_keys(void);
void test_key_memory(void);
void test_finish(void);

/* driver_guard.c */
void test_truncated(void);
void test_threads(void);
void test_foreign_handlers(void);

/* driver_watch.c */
void test_watch(void);
void test_read_limit(void);
void test_pool(void);

#endif
