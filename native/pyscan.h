/* pyscan native core: the whole public API.
 *
 * All functions are thread-safe, allocate nothing and never print. Errors are a negative
 * ps_result; results go to the caller's buffers. Memory that is scanned may be a mapping
 * whose backing vanishes: loads are guarded, and a page that faults gets
 * PS_PAGE_LINK_DOWN instead of ending the process. For that, a scan takes over SIGBUS and
 * SIGSEGV; a signal that is not about a scanned page reaches the handler that was there
 * before. A thread that scans must not block the two.
 */
#ifndef PYSCAN_H
#define PYSCAN_H

#include <stddef.h>
#include <stdint.h>

/* cffi reads what stands between the two marks. */
/* --- cffi begin --- */

enum { PS_PAGE_SIZE = 4096, PS_SHA256_SIZE = 32, PS_POISON = 0xA5 };

typedef enum {
    PS_OK = 0,
    PS_ERR_ARGUMENT = -1,  /* NULL pointer, impossible size */
    PS_ERR_FORM = -2,      /* a forced form that this CPU does not have */
    PS_ERR_GUARD = -3      /* the fault guard could not be installed */
} ps_result;

/* Same values as pyscan.records.PageStatus. */
typedef enum {
    PS_PAGE_OK = 0,
    PS_PAGE_HOLE = 1,
    PS_PAGE_BLOCKED = 2,
    PS_PAGE_LINK_DOWN = 3,
    PS_PAGE_TIMEOUT = 4,
    PS_PAGE_TORN = 5
} ps_page_status;

/* Instruction-set forms of SHA-256. PS_FORM_AUTO picks the fastest one present. */
typedef enum { PS_FORM_AUTO = 0, PS_FORM_PORTABLE = 1, PS_FORM_SHANI = 2 } ps_form;

/* Bit mask (1 << ps_form) of the forms that this CPU can run. */
uint32_t ps_forms_available(void);

/* Forces a form for the whole process; PS_FORM_AUTO undoes it. */
int ps_form_set(int form);

/* The form that ps_form_set() or detection has chosen. */
int ps_form_get(void);

/* Digests `count` pages that stand one behind the other at `pages` (count * 4096 bytes)
 * into `digests` (count * 32 bytes) and `statuses` (count bytes). A page that cannot be
 * read has a status other than PS_PAGE_OK and a digest of PS_POISON bytes. */
int ps_digest_range(const uint8_t *pages, size_t count, uint8_t *digests, uint8_t *statuses);

/* Digests the pages at `base + offsets[i]`; `base_length` bytes are mapped. An offset
 * that does not leave room for a whole page inside base_length is PS_PAGE_HOLE. */
int ps_digest_list(const uint8_t *base, size_t base_length, const uint64_t *offsets, size_t count,
                   uint8_t *digests, uint8_t *statuses);

/* What a compare run found. */
typedef struct {
    size_t ok;         /* pages equal to the expected digest */
    size_t mismatched; /* pages read whose digest differs */
    size_t unreadable; /* pages not read */
    size_t listed;     /* entries written to the caller's list */
} ps_tally;

/* Fused loop: digest, compare with `expected` (count * 32 bytes), emit. Writes the index
 * of every page that is not equal (mismatched or unreadable) to `indices`, ascending, at
 * most `indices_max`; one status per page to `statuses`. ok + mismatched + unreadable ==
 * count always holds, however short the list. */
int ps_compare_range(const uint8_t *pages, size_t count, const uint8_t *expected,
                     uint8_t *statuses, uint64_t *indices, size_t indices_max, ps_tally *tally);

int ps_compare_list(const uint8_t *base, size_t base_length, const uint64_t *offsets, size_t count,
                    const uint8_t *expected, uint8_t *statuses, uint64_t *indices,
                    size_t indices_max, ps_tally *tally);

/* Copies the pages at `base + offsets[i]` to `pages` (count * 4096 bytes) under the same
 * guard; a page that cannot be read is filled with PS_POISON. */
int ps_copy_list(const uint8_t *base, size_t base_length, const uint64_t *offsets, size_t count,
                 uint8_t *pages, uint8_t *statuses);

/* --- cffi end --- */
#endif
