/* What becomes of the pages of a command when something goes wrong: a table, printed. */
#define _GNU_SOURCE
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "host.h"

enum { STATUSES = PS_PAGE_TORN + 1, ASKED = RAM_PAGES + 1 /* and a hole */ };

typedef struct {
    const char *fault;
    uint32_t statuses[STATUSES]; /* ok, hole, blocked, link down, timeout, torn */
    uint64_t resets;
    bool lasting; /* the command after it meets it, too */
} fault_case;

/* Gathers are 512, 512 and 276 pages; two are under way together. */
static const fault_case cases[] = {
    {"lost-doorbell", {788, 1, 0, 0, 512, 0}, 1, false},
    {"lost-doorbell:3", {1024, 1, 0, 0, 276, 0}, 1, false},
    {"lost-doorbell:1:1000000", {0, 1, 0, 0, 1300, 0}, 3, true},
    {"late-completion", {788, 1, 0, 0, 512, 0}, 1, false},
    {"late-completion:1:2", {276, 1, 0, 0, 1024, 0}, 2, false},
    {"refused-dma:0", {1299, 1, 1, 0, 0, 0}, 0, true},
    {"refused-dma:0x1ff000:2", {1298, 1, 2, 0, 0, 0}, 0, true},
    {"refused-dma:0x100000000:700", {600, 1, 700, 0, 0, 0}, 0, true},
    {"refused-dma:0:0x200000", {0, 1, 1300, 0, 0, 0}, 0, true},
    {"blocked", {0, 1, 1300, 0, 0, 0}, 0, false},
    {"blocked:1:1000000", {0, 1, 1300, 0, 0, 0}, 0, true},
    {"stale-completion", {788, 1, 0, 0, 0, 512}, 0, false},
    {"stale-completion:1:1000000", {0, 1, 0, 0, 0, 1300}, 0, true},
    {"half-page:2", {788, 1, 0, 0, 0, 512}, 0, false},
    {"link-down", {788, 1, 0, 512, 0, 0}, 0, false},
    {"link-down:2:2", {512, 1, 0, 788, 0, 0}, 0, false},
    {"link-down:1:1000000", {0, 1, 0, 1300, 0, 0}, 0, true},
    {"link-down-ms:0", {0, 1, 0, 1300, 0, 0}, 0, true},
    {"link-down-ms:0:0", {1300, 1, 0, 0, 0, 0}, 0, false},
    {"engine-reset", {1300, 1, 0, 0, 0, 0}, 1, false},
    {"engine-reset:1:2", {1300, 1, 0, 0, 0, 0}, 2, false},
};

static ps_link_completion ask_all(bench *on, uint32_t kinds, uint32_t statuses[STATUSES])
{
    static uint64_t frames[ASKED];
    static uint8_t each[ASKED];
    memcpy(frames, all_frames(), RAM_PAGES * sizeof *frames);
    frames[RAM_PAGES] = LOW_PAGES;
    ps_link_submission asked = {.op = PS_LINK_OP_DIGEST, .count = ASKED, .kinds = kinds};
    memset(each, UNTOUCHED, sizeof each);
    ps_link_completion answer = bench_pages(on, asked, frames, each);
    memset(statuses, 0, STATUSES * sizeof *statuses);
    for (uint32_t i = 0; i < ASKED; i++) {
        if (each[i] < STATUSES) {
            statuses[each[i]]++;
        }
    }
    return answer;
}

static void print_row(const char *fault, const uint32_t statuses[STATUSES], const char *what)
{
    printf("%-30s %5u %5u %8u %10u %8u %5u  %s\n", fault, statuses[PS_PAGE_OK],
           statuses[PS_PAGE_HOLE], statuses[PS_PAGE_BLOCKED], statuses[PS_PAGE_LINK_DOWN],
           statuses[PS_PAGE_TIMEOUT], statuses[PS_PAGE_TORN], what);
}

static void check_case(const fault_case *one, uint32_t kinds)
{
    uint32_t statuses[STATUSES];
    bench *on = bench_open(PS_LINK_ENGINE_DMA);
    require(sim_add_fault(&on->board, one->fault), one->fault);
    bench_begin(on);
    ps_link_completion answer = ask_all(on, kinds, statuses);
    check(memcmp(statuses, one->statuses, sizeof statuses) == 0, one->fault, __FILE__, __LINE__);
    CHECK(answer.result == PS_LINK_OK && answer.count == ASKED);
    CHECK(answer.ok == statuses[PS_PAGE_OK] && bench_card(on)->resets == one->resets);
    CHECK(bench_card(on)->unread == ASKED - answer.ok);
    print_row(one->fault, statuses, "");
    ask_all(on, kinds, statuses);
    CHECK((statuses[PS_PAGE_OK] == RAM_PAGES) == !one->lasting);
    const sim_fault *fault = &on->board.faults[0];
    CHECK((on->board.struck[fault->kind] > 0) == (fault->count > 0));
    bench_close(on);
}

/* READ meets them as DIGEST does: poison, and never bytes of another page. */
static void check_read(const char *text, uint8_t status)
{
    enum { PAGES = 48 };
    uint8_t statuses[PAGES];
    bench *on = bench_open(PS_LINK_ENGINE_DMA);
    require(sim_add_fault(&on->board, text), text);
    bench_begin(on);
    ps_link_submission asked = {.op = PS_LINK_OP_READ, .count = PAGES};
    CHECK(bench_pages(on, asked, all_frames(), statuses).ok == 0);
    for (int i = 0; i < PAGES; i++) {
        CHECK(statuses[i] == status);
    }
    bench_close(on);
}

/* The file with the target's memory is cut off. */
static void check_truncated(void)
{
    uint32_t statuses[STATUSES] = {0};
    bench *on = bench_open(PS_LINK_ENGINE_DMA);
    bench_begin(on);
    ps_link_submission asked = {.op = PS_LINK_OP_DIGEST, .count = 512, .kinds = 3};
    CHECK(bench_pages(on, asked, all_frames(), NULL).ok == 512);
    require(ftruncate(on->ram_file, 0) == 0, "ftruncate");
    memcpy(bench_slot(on, on->submitted + 1), all_frames(), 512 * sizeof(uint64_t));
    uint32_t sequence = bench_submit(on, asked);
    CHECK(bench_await(on, sequence).ok == 0);
    for (uint32_t i = 0; i < 512; i++) {
        uint8_t status = bench_slot(on, sequence)[PS_LINK_STATUSES_IN_SLOT + i];
        statuses[status < STATUSES ? status : PS_PAGE_OK]++;
    }
    CHECK(statuses[PS_PAGE_LINK_DOWN] == 512);
    bench_close(on);
}

/* The window goes away in the midst of it. */
static void check_window(void)
{
    uint32_t statuses[STATUSES];
    bench *on = bench_open(PS_LINK_ENGINE_WINDOW);
    bench_begin(on);
    ask_all(on, 3, statuses);
    CHECK(statuses[PS_PAGE_OK] == RAM_PAGES);
    on->board.link_down = true;
    ask_all(on, 3, statuses);
    CHECK(statuses[PS_PAGE_LINK_DOWN] == RAM_PAGES && statuses[PS_PAGE_HOLE] == 1);
    print_row("window away", statuses, "");
    on->board.link_down = false;
    ask_all(on, 3, statuses);
    CHECK(statuses[PS_PAGE_OK] == RAM_PAGES);
    bench_close(on);
}

/* The board says that the core has broken a limit. */
static void check_misused(void)
{
    bench *on = bench_open(PS_LINK_ENGINE_DMA);
    bench_begin(on);
    on->board.hal.limits.gather_max = 8; /* less than it was told at the start */
    ps_link_completion answer = bench_do(
        on, (ps_link_submission){.op = PS_LINK_OP_DIGEST, .flags = 1, .count = 9, .kinds = 1});
    CHECK(answer.result == PS_LINK_FAILED && answer.count == 0 && answer.ok == 0);
    on->board.hal.limits.gather_max = PS_HAL_GATHER_MAX;
    uint32_t statuses[STATUSES];
    CHECK(ask_all(on, 1, statuses).ok == RAM_PAGES);
    bench_close(on);
}

/* ---- entries ---- */

static void check_torn(const char *text, ps_link_result result)
{
    static const uint32_t none[STATUSES];
    bench *on = bench_open(PS_LINK_ENGINE_DMA);
    require(sim_add_fault(&on->board, text), text);
    bench_begin(on);
    ps_link_completion answer = bench_do(on, (ps_link_submission){.op = PS_LINK_OP_NOP});
    CHECK(answer.result == result);
    CHECK(bench_card(on)->torn == (result == PS_LINK_TORN));
    CHECK(on->board.struck[SIM_TORN_SUBMISSION] > 0);
    print_row(text, none, result == PS_LINK_TORN ? "command torn" : "command ok, read again");
    CHECK(bench_do(on, (ps_link_submission){.op = PS_LINK_OP_NOP}).result == PS_LINK_OK);
    bench_close(on);
}

static void check_torn_completion(void)
{
    static const uint32_t none[STATUSES];
    bench *on = bench_open(PS_LINK_ENGINE_DMA);
    require(sim_add_fault(&on->board, "torn-completion:2"), "fault");
    bench_begin(on);
    uint32_t sequence = bench_submit(on, (ps_link_submission){.op = PS_LINK_OP_NOP});
    while (bench_card(on)->completed < sequence) {
        bench_turns(on, 1);
    }
    const ps_link_completion *answer = bench_completion(on, sequence);
    CHECK(answer->check != ps_crc32c(answer, offsetof(ps_link_completion, check)));
    CHECK(on->board.struck[SIM_TORN_COMPLETION] == 1);
    print_row("torn-completion:2", none, "the host sees it by the check");
    CHECK(bench_do(on, (ps_link_submission){.op = PS_LINK_OP_NOP}).result == PS_LINK_OK);
    bench_close(on);
}

/* ---- the card itself ---- */

static void check_hang(void)
{
    static const uint32_t none[STATUSES];
    bench *on = bench_open(PS_LINK_ENGINE_DMA);
    require(sim_add_fault(&on->board, "hang:3"), "fault");
    bench_begin(on);
    uint64_t boot = bench_card(on)->boot;
    CHECK(bench_do(on, (ps_link_submission){.op = PS_LINK_OP_NOP}).result == PS_LINK_OK);
    bench_submit(on, (ps_link_submission){.op = PS_LINK_OP_NOP});
    uint32_t heartbeat = bench_card(on)->heartbeat;
    uint64_t since_us = on->board.clock_us;
    while (on->board.clock_us - since_us < 1500000) {
        bench_turn(on);
    }
    CHECK(bench_card(on)->heartbeat == heartbeat && bench_card(on)->completed == 2);
    while (on->board.clock_us - since_us < 2100000) {
        bench_turn(on);
    }
    CHECK(bench_card(on)->magic == PS_LINK_CARD_MAGIC && bench_card(on)->boot != boot);
    CHECK(bench_card(on)->session == 0 && bench_card(on)->completed == 0);
    CHECK(on->board.struck[SIM_HANG] == 1);
    print_row("hang:3", none, "started anew by the watchdog");
    bench_begin(on);
    bench_close(on);
}

/* The card dies in the midst of a command: nothing is completed, and the next one knows nothing. */
static void check_crash(void)
{
    static const uint32_t none[STATUSES];
    bench *on = bench_open(PS_LINK_ENGINE_DMA);
    require(sim_add_fault(&on->board, "crash:2"), "fault");
    bench_begin(on);
    uint64_t boot = bench_card(on)->boot;
    memcpy(bench_slot(on, 2), all_frames(), RAM_PAGES * sizeof(uint64_t));
    bench_submit(on, (ps_link_submission){.op = PS_LINK_OP_DIGEST, .count = RAM_PAGES, .kinds = 1});
    fflush(stdout);
    pid_t child = fork();
    require(child >= 0, "fork");
    if (child == 0) {
        bench_turns(on, 10000);
        _exit(0);
    }
    int status = 0;
    require(waitpid(child, &status, 0) == child, "waitpid");
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == SIM_CRASH_STATUS);
    CHECK(bench_card(on)->completed == 1 && bench_card(on)->boot == boot);
    on->board.faults_count = 0;
    sim_start(&on->board);
    CHECK(bench_card(on)->boot != boot && bench_card(on)->completed == 0);
    print_row("crash:2", none, "nothing completed");
    uint32_t statuses[STATUSES];
    bench_begin(on);
    CHECK(ask_all(on, 3, statuses).ok == RAM_PAGES);
    bench_close(on);
}

void test_faults(void)
{
    printf("%-30s %5s %5s %8s %10s %8s %5s\n", "fault", "ok", "hole", "blocked", "link down",
           "timeout", "torn");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        check_case(&cases[i], 1 + (uint32_t)i % 3);
    }
    check_read("stale-completion:1:99", PS_PAGE_TORN);
    check_read("half-page:1:99", PS_PAGE_TORN);
    check_read("refused-dma:0:99", PS_PAGE_BLOCKED);
    check_read("lost-doorbell:1:99", PS_PAGE_TIMEOUT);
    check_read("link-down:1:99", PS_PAGE_LINK_DOWN);
    check_truncated();
    check_window();
    check_misused();
    check_torn("torn-submission:2", PS_LINK_TORN);
    check_torn("torn-submission:2:4", PS_LINK_OK);
    check_torn_completion();
    check_hang();
    check_crash();
}
