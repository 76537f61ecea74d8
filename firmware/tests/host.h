/* Tests of the firmware on the host: the other side of the link, in plain C. */
#ifndef PS_TESTS_HOST_H
#define PS_TESTS_HOST_H

#include "core/core.h"
#include "sim/sim.h"

/* Counts a condition; one that does not hold is printed. */
#define CHECK(condition) check((condition), #condition, __FILE__, __LINE__)
void check(bool holds, const char *condition, const char *file, int line);

/* Ends a run that cannot go on. */
void require(bool holds, const char *what);

enum {
    PAGE = PS_PAGE_SIZE,
    LOW_PAGES = 600, /* from address 0 on */
    HIGH_PAGES = 700, /* from 4 GiB on */
    RAM_PAGES = LOW_PAGES + HIGH_PAGES,
    UNTOUCHED = 0xee /* what stands where the card is to write */
};
#define HIGH_FRAME UINT64_C(0x100000)

/* A card, its mailbox, and a target of RAM_PAGES pages, each with other bytes. */
typedef struct {
    sim board;
    uint8_t *mailbox;
    uint8_t *ram;
    int ram_file;
    uint64_t session;
    uint32_t submitted;
} bench;

/* Static, and made anew at each call: with the clock of its own, started. */
bench *bench_open(uint32_t engine);
void bench_close(bench *on);

/* One turn, and a nap when there was nothing to do. */
void bench_turn(bench *on);
void bench_turns(bench *on, int turns);

ps_link_host *bench_host(bench *on);
const ps_link_card *bench_card(bench *on);
uint8_t *bench_slot(bench *on, uint32_t sequence);
ps_link_submission *bench_submission(bench *on, uint32_t sequence);
const ps_link_completion *bench_completion(bench *on, uint32_t sequence);

/* Writes the host's page with a new session; begin also waits for it, and maps all RAM. */
void bench_greet(bench *on, uint64_t magic, uint32_t version);
void bench_begin(bench *on);

/* Writes a submission with its check, of which op, flags, count, kinds and first are given, and
 * tells the card; its sequence number. */
uint32_t bench_submit(bench *on, ps_link_submission asked);
void bench_seal(ps_link_submission *submission);

/* Turns until `sequence` is completed, and checks the completion; zeros when it never is. */
ps_link_completion bench_await(bench *on, uint32_t sequence);

/* Submits and waits. */
ps_link_completion bench_do(bench *on, ps_link_submission asked);
ps_link_result bench_map(bench *on, const ps_link_region *regions, uint32_t count);

/* DIGEST or READ of a list of frames (count of `asked`); `statuses` (NULL: not wanted). */
ps_link_completion bench_pages(bench *on, ps_link_submission asked, const uint64_t *frames,
                               uint8_t *statuses);

/* Whether what the slot holds of these pages is as their statuses say: digests or bytes of the
 * page as it is in RAM, or poison. */
bool bench_true(bench *on, const ps_link_submission *asked, uint32_t sequence,
                const uint64_t *frames);

/* The page of a frame; NULL for a hole. */
uint8_t *bench_page(bench *on, uint64_t frame);

/* The frames of all RAM, RAM_PAGES of them. */
const uint64_t *all_frames(void);

/* xorshift64 (Marsaglia, 2003): the same numbers in every run. */
uint64_t next_random(uint64_t *state);

void test_crc(void);
void test_vectors(const char *sha256_path, const char *nh4aes_path);
void test_link(void);
void test_map(void);
void test_plan(void);
void test_faults(void);
void test_hostile(void);

#endif
