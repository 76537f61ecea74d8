/* SHA-256 of pages with the x86 SHA extensions, two pages interleaved.
 *
 * sha256rnds2 depends on the one before it for all 64 rounds of a block, so one page
 * leaves the unit idle most of the time; a second, independent page fills the gaps. Two
 * pages need 14 of the 16 registers, so there is no third.
 *
 * Instructions and the ABEF/CDGH layout: Intel, "Intel SHA Extensions", 2013. Algorithm:
 * FIPS 180-4; section numbers refer to it.
 */
#include "ps_internal.h"

#if defined(__x86_64__)

#include <immintrin.h>
#include <string.h>

#define SHANI __attribute__((target("sha,sse4.1,ssse3")))
#define SHANI_INLINE SHANI __attribute__((always_inline)) static inline

enum { BLOCK_SIZE = 64, QUADS = 16 /* groups of four rounds in a block */ };

/* One page on its way through a block. */
typedef struct {
    __m128i abef, cdgh; /* the state, in the order that sha256rnds2 wants */
    __m128i ring[4];    /* the last sixteen words of the message schedule */
} page_lane;

SHANI_INLINE __m128i load_words(const uint8_t *bytes)
{
    const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)bytes), big_endian);
}

/* 6.2.2 step 1: the next four words, from the last sixteen. */
SHANI_INLINE __m128i schedule_next(__m128i w16, __m128i w12, __m128i w8, __m128i w4)
{
    __m128i sum = _mm_add_epi32(_mm_sha256msg1_epu32(w16, w12), _mm_alignr_epi8(w4, w8, 4));
    return _mm_sha256msg2_epu32(sum, w4);
}

/* 6.2.2 step 3: rounds 4 * quad to 4 * quad + 3. */
SHANI_INLINE void rounds4(page_lane *lane, const uint8_t *block, int quad)
{
    __m128i *ring = lane->ring;
    __m128i words = quad < 4 ? load_words(block + 16 * quad)
                             : schedule_next(ring[quad % 4], ring[(quad + 1) % 4],
                                             ring[(quad + 2) % 4], ring[(quad + 3) % 4]);
    ring[quad % 4] = words;
    words = _mm_add_epi32(words, _mm_load_si128((const __m128i *)ps_sha256_constants + quad));
    lane->cdgh = _mm_sha256rnds2_epu32(lane->cdgh, lane->abef, words);
    lane->abef = _mm_sha256rnds2_epu32(lane->abef, lane->cdgh, _mm_shuffle_epi32(words, 0x0e));
}

/* 5.3.3 */
SHANI_INLINE void lane_start(page_lane *lane)
{
    lane->abef = _mm_set_epi32(0x6a09e667, (int)0xbb67ae85, 0x510e527f, (int)0x9b05688c);
    lane->cdgh = _mm_set_epi32(0x3c6ef372, (int)0xa54ff53a, 0x1f83d9ab, 0x5be0cd19);
}

SHANI_INLINE void lane_finish(const page_lane *lane, uint8_t *digest)
{
    const __m128i big_endian = _mm_set_epi64x(0x0001020304050607, 0x08090a0b0c0d0e0f);
    __m128i abcd = _mm_unpackhi_epi64(lane->cdgh, lane->abef);
    __m128i efgh = _mm_unpacklo_epi64(lane->cdgh, lane->abef);
    abcd = _mm_shuffle_epi8(abcd, big_endian);
    efgh = _mm_shuffle_epi8(efgh, big_endian);
    _mm_storeu_si128((__m128i *)digest, abcd);
    _mm_storeu_si128((__m128i *)(digest + 16), efgh);
}

/* 6.2.2, for one block of each of two pages. */
SHANI_INLINE void compress2(page_lane *x, const uint8_t *block_x, page_lane *y,
                            const uint8_t *block_y)
{
    const __m128i abef_x = x->abef, cdgh_x = x->cdgh, abef_y = y->abef, cdgh_y = y->cdgh;
#pragma GCC unroll 16
    for (int quad = 0; quad < QUADS; quad++) {
        rounds4(x, block_x, quad);
        rounds4(y, block_y, quad);
    }
    x->abef = _mm_add_epi32(x->abef, abef_x);
    x->cdgh = _mm_add_epi32(x->cdgh, cdgh_x);
    y->abef = _mm_add_epi32(y->abef, abef_y);
    y->cdgh = _mm_add_epi32(y->cdgh, cdgh_y);
}

/* Digests a pair of pages into digests[0..63] while it brings the pair `next` into the
 * cache: the prefetcher of the CPU stops at the end of a page, and knows no list. */
SHANI static void digest_pair(const uint8_t *const *pair, const uint8_t *const *next,
                              uint8_t *digests)
{
    page_lane x, y;
    lane_start(&x);
    lane_start(&y);
    for (size_t at = 0; at < PS_PAGE_SIZE; at += BLOCK_SIZE) {
        _mm_prefetch((const char *)next[0] + at, _MM_HINT_T0);
        _mm_prefetch((const char *)next[1] + at, _MM_HINT_T0);
        compress2(&x, pair[0] + at, &y, pair[1] + at);
    }
    compress2(&x, ps_sha256_padding, &y, ps_sha256_padding);
    lane_finish(&x, digests);
    lane_finish(&y, digests + PS_SHA256_SIZE);
}

void ps_digest_sha256_shani(const ps_batch *batch)
{
    const uint8_t *const *pages = batch->pages;
    size_t i = 0, count = batch->count;
    for (; i + 1 < count; i += 2) {
        digest_pair(pages + i, pages + i + 2, batch->results + i * PS_SHA256_SIZE);
    }
    if (i < count) {
        /* An odd last page is its own partner: as fast as alone, and no second code path. */
        const uint8_t *const twice[2] = {pages[i], pages[i]};
        uint8_t both[2 * PS_SHA256_SIZE];
        digest_pair(twice, twice, both);
        memcpy(batch->results + i * PS_SHA256_SIZE, both, PS_SHA256_SIZE);
    }
}

#else
/* ISO C wants something in every file. */
typedef int ps_digest_sha256_shani_absent;
#endif
