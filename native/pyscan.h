/* pyscan native core: the whole public API.
 *
 * All functions are thread-safe and never print; only those that end in _new allocate.
 * Errors are a negative ps_result; results go to the caller's buffers. Memory that is
 * scanned may be a mapping whose backing vanishes: loads are guarded, and a page that faults
 * gets PS_PAGE_LINK_DOWN instead of ending the process. For that, a scan takes over SIGBUS
 * and SIGSEGV; a signal that is not about the scanned memory reaches the handler that was
 * there before. A thread that scans must not block the two.
 */
#ifndef PYSCAN_H
#define PYSCAN_H

#include <stddef.h>
#include <stdint.h>

/* cffi reads what stands between the two marks. */
/* --- cffi begin --- */

enum {
    PS_PAGE_SIZE = 4096,
    PS_SHA256_SIZE = 32,
    PS_KEYED_SIZE = 16,      /* digests of nh4aes and gf128aes */
    PS_DIGEST_SIZE_MAX = 32,
    PS_NH_WORDS_SIZE = 4192, /* K of nh4aes: a page and three shifts of eight words */
    PS_SECRET_SIZE = 32,     /* the master secret that a key is made of */
    PS_POOL_THREADS_MAX = 256,
    PS_POISON = 0xA5
};

typedef enum {
    PS_OK = 0,
    PS_ERR_ARGUMENT = -1,  /* NULL pointer, impossible size, key of another digest */
    PS_ERR_FORM = -2,      /* a form that the digest does not have on this CPU */
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

/* ---- digests and their forms ---- */

/* Defined byte by byte in docs/spec/digest.md. The keyed ones take the frame number of each
 * page as a tweak; sha256 takes neither key nor frames. */
typedef enum { PS_DIGEST_SHA256 = 1, PS_DIGEST_NH4AES = 2, PS_DIGEST_GF128AES = 3 } ps_digest;

/* Instruction-set forms. PS_FORM_AUTO is the fastest one that the CPU has. */
typedef enum {
    PS_FORM_AUTO = 0,
    PS_FORM_PORTABLE = 1,
    PS_FORM_SSE2 = 2,
    PS_FORM_AVX2 = 3,
    PS_FORM_AVX512 = 4,
    PS_FORM_SHANI = 5,
    PS_FORM_PCLMUL = 6,
    PS_FORM_VPCLMUL = 7,
    PS_FORM_NEON = 8,
    PS_FORM_LAST = 8
} ps_form;

/* Bytes of a digest; 0 when there is no such digest. */
size_t ps_digest_size(int digest);

/* Bit mask (1 << ps_form) of the forms in which this CPU can run `digest`; 0 when none. */
uint32_t ps_forms_available(int digest);

/* The form that runs when `form` is asked for: itself, or the fastest for PS_FORM_AUTO.
 * PS_ERR_FORM when `digest` has no such form here, PS_ERR_ARGUMENT when it is unknown. */
int ps_form_pick(int digest, int form);

/* ---- keys ---- */

/* An expanded key. It lies in locked memory of its own, which is left out of core dumps
 * and is all zeros in a forked child. */
typedef struct ps_key ps_key;

/* The key of a keyed digest from a master secret of PS_SECRET_SIZE bytes, or from a new
 * one that the operating system draws and nobody else sees (NULL). NULL when `digest` takes
 * no key or the memory cannot be had and locked; errno tells. */
ps_key *ps_key_new(int digest, const uint8_t *secret);

/* Wipes and releases a key that no call uses any more; NULL is let pass. */
void ps_key_free(ps_key *key);

/* The PS_NH_WORDS_SIZE bytes K of an nh4aes key, for the twin that is not written in C; NULL for
 * another digest. */
const uint8_t *ps_key_nh_words(const ps_key *key);

/* The second half of nh4aes: digests (count * 16 bytes) from the four sums of each page
 * (count * 4 values) and its frame number. */
int ps_nh4aes_finish(const ps_key *key, const uint64_t *sums, const uint64_t *frames,
                     size_t count, uint8_t *digests);

/* ---- threads ---- */

typedef struct ps_pool ps_pool;

/* `threads` - 1 threads that wait for work; whoever calls with the pool is the last one.
 * NULL when that is not 1 .. PS_POOL_THREADS_MAX or a thread cannot be had. Does not
 * survive a fork. */
ps_pool *ps_pool_new(unsigned threads);

/* Ends a pool that no call uses any more; NULL is let pass. */
void ps_pool_free(ps_pool *pool);

/* ---- scans ---- */

/* How pages are digested. A pool serves one call at a time: a call that finds it busy
 * runs in its own thread alone. */
typedef struct {
    int digest;         /* ps_digest */
    int form;           /* ps_form */
    const ps_key *key;  /* NULL for sha256 */
    ps_pool *pool;      /* NULL: the calling thread alone */
} ps_method;

/* Digests `count` pages that stand one behind the other at `pages` (count * 4096 bytes)
 * into `digests` (count * ps_digest_size() bytes) and `statuses` (count bytes). `frames`
 * (count values) is NULL for sha256. A page that cannot be read has a status other than
 * PS_PAGE_OK and a digest of PS_POISON bytes. */
int ps_digest_range(const ps_method *method, const uint8_t *pages, size_t count,
                    const uint64_t *frames, uint8_t *digests, uint8_t *statuses);

/* Digests the pages at `base + offsets[i]`; `base_length` bytes are mapped. An offset
 * that does not leave room for a whole page inside base_length is PS_PAGE_HOLE. */
int ps_digest_list(const ps_method *method, const uint8_t *base, size_t base_length,
                   const uint64_t *offsets, size_t count, const uint64_t *frames,
                   uint8_t *digests, uint8_t *statuses);

/* What a compare run found. */
typedef struct {
    size_t ok;         /* equal to what is expected */
    size_t mismatched; /* read, and different */
    size_t unreadable; /* not read */
    size_t listed;     /* entries written to the caller's list */
} ps_tally;

/* Fused loop: digest, compare with `expected` (count digests), emit. Writes the index
 * of every page that is not equal (mismatched or unreadable) to `indices`, ascending, at
 * most `indices_max`; one status per page to `statuses`. ok + mismatched + unreadable ==
 * count always holds, however short the list. */
int ps_compare_range(const ps_method *method, const uint8_t *pages, size_t count,
                     const uint64_t *frames, const uint8_t *expected, uint8_t *statuses,
                     uint64_t *indices, size_t indices_max, ps_tally *tally);

int ps_compare_list(const ps_method *method, const uint8_t *base, size_t base_length,
                    const uint64_t *offsets, size_t count, const uint64_t *frames,
                    const uint8_t *expected, uint8_t *statuses, uint64_t *indices,
                    size_t indices_max, ps_tally *tally);

/* Copies the pages at `base + offsets[i]` to `pages` (count * 4096 bytes) under the same
 * guard; a page that cannot be read is filled with PS_POISON. */
int ps_copy_list(ps_pool *pool, const uint8_t *base, size_t base_length, const uint64_t *offsets,
                 size_t count, uint8_t *pages, uint8_t *statuses);

/* Watch list: holds the little-endian 64-bit values at `base + offsets[i]`, aligned or not,
 * against `expected` (count values). Reports as ps_compare_list() does, one status per value;
 * an offset that does not leave room for a whole value is PS_PAGE_HOLE. */
int ps_watch_compare(const uint8_t *base, size_t base_length, const uint64_t *offsets,
                     const uint64_t *expected, size_t count, uint8_t *statuses,
                     uint64_t *indices, size_t indices_max, ps_tally *tally);

/* The yardstick of all scans: only reads the pages at `base + offsets[i]` with whole vectors, in
 * the same loop and under the same guard, and gives the exclusive or of all their 64-bit
 * words. `interleaved` reads eight pages at once, otherwise one after the other: which of
 * the two is faster depends on the CPU and on how scattered the pages are. PS_ERR_ARGUMENT
 * also when a page cannot be read. */
int ps_read_limit(ps_pool *pool, const uint8_t *base, size_t base_length, const uint64_t *offsets,
                  size_t count, int interleaved, uint64_t *sum);

/* --- cffi end --- */
#endif
