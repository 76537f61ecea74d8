/* What the files of the native core share; nothing here is public.
 *
 * Files marked "freestanding" need no more than this header and no library: the firmware is
 * built of them.
 */
#ifndef PS_INTERNAL_H
#define PS_INTERNAL_H

#include <stdbool.h>

#include "pyscan.h"

/* Private: not in the symbol table of the extension, and reached without a detour. */
#pragma GCC visibility push(hidden)

/* ---- keys ---- */

enum {
    PS_BLOCK_SIZE = 16,             /* of AES, and of GF(2^128) */
    PS_AES_ROUND_KEYS_SIZE = 176,   /* eleven round keys, FIPS 197 */
    PS_NH_PASSES = 4,
    PS_GF_BLOCKS_SIZE = 4096        /* k of gf128aes */
};

struct ps_key {
    uint8_t stream[4224] __attribute__((aligned(64)));
    uint8_t round_keys[PS_AES_ROUND_KEYS_SIZE] __attribute__((aligned(64)));
    int digest;
};

/* Bytes of a key stream without the AES key at its end; 0 for a digest without a key. */
size_t ps_key_words_size(int digest);

/* Fills `key` from a master secret. Freestanding. */
void ps_key_expand(struct ps_key *key, int digest, const uint8_t *secret);

/* SHAKE256 (FIPS 202) of `length` (at most 135) bytes. Freestanding. */
void ps_shake256(const uint8_t *message, size_t length, uint8_t *output, size_t output_length);

/* ---- AES-128 ---- */

/* Encrypts blocks in place, one file per instruction set. The portable one is freestanding,
 * has no tables and no branch that hangs on data. */
typedef void ps_aes_fn(const uint8_t *round_keys, uint8_t *blocks, size_t count);
ps_aes_fn ps_aes_encrypt_portable;
#if defined(__x86_64__)
ps_aes_fn ps_aes_encrypt_aesni, ps_aes_encrypt_vaes;
#elif defined(__aarch64__)
ps_aes_fn ps_aes_encrypt_armv8;
#endif

/* FIPS 197, 5.2. Freestanding. */
void ps_aes_expand(const uint8_t key[PS_BLOCK_SIZE], uint8_t round_keys[PS_AES_ROUND_KEYS_SIZE]);

/* ---- work on pages ---- */

/* Pages that are handed to a ps_work_fn at once: enough to hide the cost of the guard and of
 * the finaliser; little enough that their digests stay in the L1 cache. */
enum { PS_BATCH_MAX = 64 };

/* Scattered pages that are read at once, and as many behind them prefetched. */
enum { PS_LANES = 4 };

typedef struct {
    const uint8_t *const *pages; /* count + PS_LANES: the last ones are only prefetched */
    const uint64_t *frames;      /* NULL where the work takes none */
    size_t count;                /* 1 .. PS_BATCH_MAX */
    const struct ps_key *key;    /* NULL where the work takes none */
    ps_aes_fn *aes;
    uint8_t *results;
} ps_batch;

/* Turns whole pages into results that stand one behind the other. The pages may be changing
 * while they are read, so a result hangs on one load of each byte. May be left by a jump at
 * any of these loads: it holds no lock and keeps no state outside `results`. */
typedef void ps_work_fn(const ps_batch *batch);

/* How many pages to read at once from page `at` of a batch on. Pages that follow each other in
 * memory are one stream for the prefetcher of the CPU, and cutting it into several slows it
 * down; scattered pages are so many misses that should not wait for each other. */
static inline size_t ps_batch_lanes(const ps_batch *batch, size_t at)
{
    bool stream = batch->pages[at + 1] == batch->pages[at] + PS_PAGE_SIZE;
    return stream || batch->count - at < PS_LANES ? 1 : PS_LANES;
}

/* Prefetches a line of a page that comes `lanes` pages later. Not for a stream, with which the
 * prefetcher of the CPU keeps up by itself, and not into the first level, whose miss buffers
 * the loads need. */
__attribute__((always_inline)) static inline void ps_prefetch(const uint8_t *line, int lanes)
{
    if (lanes > 1) {
        __builtin_prefetch(line, 0, 2);
    }
}

/* One file per digest and instruction set. The portable ones are freestanding. */
ps_work_fn ps_digest_sha256_portable, ps_digest_nh4aes_portable;
#if defined(__x86_64__)
ps_work_fn ps_digest_sha256_shani;
ps_work_fn ps_digest_nh4aes_sse2, ps_digest_nh4aes_avx2, ps_digest_nh4aes_avx512;
ps_work_fn ps_digest_gf128aes_pclmul, ps_digest_gf128aes_vpclmul, ps_digest_gf128aes_avx512;
#elif defined(__aarch64__)
ps_work_fn ps_digest_nh4aes_neon;
#endif

/* Constants of SHA-256, for every form: the 64 round constants (FIPS 180-4, 4.2.2), aligned
 * for vector loads, and the block that stands behind every page (5.1.1). */
extern const uint32_t ps_sha256_constants[64] __attribute__((aligned(16)));
extern const uint8_t ps_sha256_padding[64];

/* The second half of the keyed digests, for all pages of a batch: from PS_NH_PASSES sums a
 * page, or from PS_GF_SUMS: the exclusive or of all 64-bit products, two values each, low by
 * low, crosswise, high by high. Freestanding. */
enum { PS_GF_SUMS = 6 };
void ps_nh4aes_finish_batch(const ps_batch *batch, const uint64_t *sums);
void ps_gf128aes_finish_batch(const ps_batch *batch, const uint64_t *sums);

/* Exclusive or of the words of each page, as ps_read_limit() wants it. */
ps_work_fn ps_read_pages_portable;
#if defined(__x86_64__)
ps_work_fn ps_read_stream_avx2, ps_read_interleaved_avx2;
#endif

/* ---- watch lists ---- */

/* Whether no offset is above `offset_max` and each value at `base + offsets[i]` is the expected
 * one. Loads nothing at an offset above. */
typedef bool ps_watch_fn(const uint8_t *base, uint64_t offset_max, const uint64_t *offsets,
                         const uint64_t *expected, size_t count);
ps_watch_fn ps_watch_equal_portable;
#if defined(__x86_64__)
ps_watch_fn ps_watch_equal_avx2;
#endif

/* ---- ps_dispatch.c: the only CPU detection ---- */

typedef enum {
    PS_CPU_AVX2 = 1 << 0,
    PS_CPU_AVX512 = 1 << 1, /* F, BW, DQ and VL */
    PS_CPU_AES = 1 << 2,
    PS_CPU_VAES = 1 << 3,
    PS_CPU_PCLMUL = 1 << 4,
    PS_CPU_VPCLMUL = 1 << 5,
    PS_CPU_SHA = 1 << 6, /* with SSSE3 and SSE4.1 */
    PS_CPU_ALL = (1 << 7) - 1
} ps_cpu_feature;

/* What the CPU has of ps_cpu_feature, within what ps_cpu_restrict() has left. */
uint32_t ps_cpu_features(void);

/* For tests: as if the CPU had no more than this. PS_CPU_ALL undoes it. */
void ps_cpu_restrict(uint32_t features);

/* The implementations that run `digest` in `form`, which ps_form_pick() has given. */
ps_work_fn *ps_dispatch_work(int digest, int form);
ps_aes_fn *ps_dispatch_aes(int form);
ps_work_fn *ps_dispatch_read(bool interleaved);
ps_watch_fn *ps_dispatch_watch(void);

/* ---- ps_guard.c ---- */

/* Makes sure that the process-wide fault handler is in place; PS_OK or PS_ERR_GUARD. Every
 * public function that reads pages calls it first. */
int ps_guard_install(void);

typedef void ps_guarded_fn(void *job);

/* Runs `run`; false when a load of one of the `length` bytes at `base` faulted, and then what
 * it writes holds anything. Needs ps_guard_install(). */
bool ps_guard_run(const uint8_t *base, size_t length, ps_guarded_fn *run, void *job);

/* ---- ps_pool.c ---- */

/* Does part `part` of a job; parts run in any order, in any thread of the pool. */
typedef void ps_part_fn(void *job, size_t part);

/* Does parts 0 .. parts - 1 and returns when all are done. */
void ps_pool_run(ps_pool *pool, ps_part_fn *run, void *job, size_t parts);

#pragma GCC visibility pop

#endif
