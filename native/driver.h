/* Native test driver: what its files share. */
#ifndef PS_DRIVER_H
#define PS_DRIVER_H

#include "ps_internal.h"

enum { PAGE = PS_PAGE_SIZE, DIGEST = PS_SHA256_SIZE, PAGES_MAX = 257 };

/* Counts a condition; one that does not hold is printed. Main thread only. */
#define CHECK(condition) check((condition), #condition, __FILE__, __LINE__)
void check(bool holds, const char *condition, const char *file, int line);

/* Ends a run that cannot go on. */
void require(bool holds, const char *what);

bool all_equal(const uint8_t *bytes, uint8_t value, size_t count);

/* Fills page i with xorshift32 from state i + 1. */
void fill_pages(uint8_t *pages, size_t count);

/* The digests of PAGES_MAX pages of fill_pages(), made one by one by the portable form. */
const uint8_t *reference_digests(void);

/* driver_guard.c */
void test_truncated(void);
void test_threads(void);
void test_foreign_handlers(void);

#endif
