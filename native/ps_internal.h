/* What the files of the native core share; nothing here is public. */
#ifndef PS_INTERNAL_H
#define PS_INTERNAL_H

#include <stdbool.h>

#include "pyscan.h"

/* Private: not in the symbol table of the extension, and reached without a detour. */
#pragma GCC visibility push(hidden)

/* Pages that are handed to a ps_work_fn at once: enough to hide the cost of the guard and of
 * the first pages, which nobody has prefetched; little enough that their digests stay in
 * the L1 cache. */
enum { PS_BATCH_MAX = 64 };

/* Turns `count` (1 .. PS_BATCH_MAX) whole pages into `count` results that stand one behind
 * the other at `results`. The pages may be changing while they are read, so a result hangs
 * on one load of each byte. May be left by a jump at any of these loads: it holds no lock
 * and keeps no state outside `results`. */
typedef void ps_work_fn(const uint8_t *const *pages, size_t count, uint8_t *results);

/* SHA-256 of pages (FIPS 180-4): one file per instruction set. Results are digests. */
ps_work_fn ps_digest_sha256_portable;
#if defined(__x86_64__)
ps_work_fn ps_digest_sha256_shani;
#endif

/* Its constants, for every form: the 64 round constants (4.2.2), aligned for vector loads,
 * and the block that stands behind every page (5.1.1). */
extern const uint32_t ps_sha256_constants[64] __attribute__((aligned(16)));
extern const uint8_t ps_sha256_padding[64];

/* ps_dispatch.c: the implementation of the form in use. */
ps_work_fn *ps_dispatch_sha256(void);

/* ps_guard.c: makes sure that the process-wide fault handler is in place; PS_OK or
 * PS_ERR_GUARD. Every public function that reads pages calls it first. */
int ps_guard_install(void);

/* Runs `work`; false when a load of one of the pages faulted, and then `results` holds
 * anything. Needs ps_guard_install(). */
bool ps_guard_run(ps_work_fn *work, const uint8_t *const *pages, size_t count, uint8_t *results);

#pragma GCC visibility pop

#endif
