/* Faults: which there are, and when they strike. */
#include <stdlib.h>
#include <string.h>

#include "core/core.h"
#include "sim.h"

typedef struct {
    const char *name;
    const char *help;
    uint64_t first, count; /* when nothing else is said */
} fault_rule;

static const fault_rule fault_rules[SIM_FAULT_KINDS] = {
    [SIM_LOST_DOORBELL] = {"lost-doorbell", "COUNT gathers from FIRST on never end", 1, 1},
    [SIM_LATE_COMPLETION] = {"late-completion",
                             "they deliver after their time limit, into the next gather", 1, 1},
    [SIM_REFUSED_DMA] = {"refused-dma", "the bus refuses COUNT pages from address FIRST on", 0, 1},
    [SIM_BLOCKED] = {"blocked", "at these gathers the engine is kept from its queues", 1, 1},
    [SIM_STALE_COMPLETION] = {"stale-completion", "they report success and deliver nothing", 1, 1},
    [SIM_HALF_PAGE] = {"half-page", "they deliver the first half of each page", 1, 1},
    [SIM_LINK_DOWN] = {"link-down", "at these gathers the link is down", 1, 1},
    [SIM_LINK_DOWN_MS] = {"link-down-ms", "from FIRST ms after the start on, for COUNT ms", 0,
                          UINT64_MAX},
    [SIM_ENGINE_RESET] = {"engine-reset", "at these gathers the engine starts anew", 1, 1},
    [SIM_TORN_SUBMISSION] = {"torn-submission",
                             "the card reads submission FIRST wrongly, for COUNT ms", 1,
                             20},
    [SIM_TORN_COMPLETION] = {"torn-completion",
                             "COUNT completions, none before number FIRST, arrive wrongly",
                             1, 1},
    [SIM_HANG] = {"hang", "no turn while submission FIRST waits, until the watchdog bites", 1, 1},
    [SIM_CRASH] = {"crash", "the program ends with status 70 at gather FIRST", 1, 1},
};

const char *sim_fault_name(sim_fault_kind kind)
{
    return fault_rules[kind].name;
}

void sim_help(FILE *to)
{
    for (int kind = 0; kind < SIM_FAULT_KINDS; kind++) {
        fprintf(to, "    %-17s %s\n", fault_rules[kind].name, fault_rules[kind].help);
    }
}

/* ---- text ---- */

/* Numbers, decimal or 0x hexadecimal, with colons between them: how many; 0 when it is wrong. */
static int read_numbers(const char *text, uint64_t *numbers, int numbers_max)
{
    for (int i = 0; i < numbers_max; i++) {
        char *end;
        if (*text < '0' || *text > '9') {
            return 0;
        }
        numbers[i] = strtoull(text, &end, 0);
        if (*end == '\0') {
            return i + 1;
        }
        if (*end != ':') {
            return 0;
        }
        text = end + 1;
    }
    return 0;
}

bool sim_add_fault(sim *board, const char *text)
{
    size_t length = strcspn(text, ":");
    for (int kind = 0; kind < SIM_FAULT_KINDS; kind++) {
        const fault_rule *rule = &fault_rules[kind];
        if (strlen(rule->name) != length || strncmp(rule->name, text, length) != 0) {
            continue;
        }
        uint64_t numbers[2] = {rule->first, rule->count};
        if (board->faults_count == SIM_FAULTS_MAX ||
            (text[length] == ':' && read_numbers(text + length + 1, numbers, 2) == 0)) {
            return false;
        }
        board->faults[board->faults_count++] =
            (sim_fault){.kind = (sim_fault_kind)kind, .first = numbers[0], .count = numbers[1]};
        return true;
    }
    return false;
}

bool sim_add_region(sim *board, const char *text)
{
    uint64_t numbers[3];
    if (board->regions_count == SIM_REGIONS_MAX || read_numbers(text, numbers, 3) != 3 ||
        numbers[0] % PS_PAGE_SIZE != 0 || numbers[1] % PS_PAGE_SIZE != 0 || numbers[1] == 0) {
        return false;
    }
    board->regions[board->regions_count++] = (ps_link_region){numbers[0], numbers[1], numbers[2]};
    return true;
}

/* ---- when they strike ---- */

static bool is_within(const sim_fault *fault, uint64_t number)
{
    return number >= fault->first && number - fault->first < fault->count;
}

bool sim_gather_meets(sim *board, sim_fault_kind kind, uint64_t number)
{
    for (uint32_t i = 0; i < board->faults_count; i++) {
        const sim_fault *fault = &board->faults[i];
        if (fault->kind == kind && is_within(fault, number)) {
            board->struck[kind]++;
            return true;
        }
    }
    return false;
}

bool sim_page_refused(sim *board, uint64_t address)
{
    for (uint32_t i = 0; i < board->faults_count; i++) {
        const sim_fault *fault = &board->faults[i];
        if (fault->kind == SIM_REFUSED_DMA && address >= fault->first &&
            (address - fault->first) / PS_PAGE_SIZE < fault->count) {
            board->struck[SIM_REFUSED_DMA]++;
            return true;
        }
    }
    return false;
}

bool sim_link_is_down(sim *board, uint64_t number)
{
    return board->link_down || sim_gather_meets(board, SIM_LINK_DOWN, number) ||
           sim_gather_meets(board, SIM_LINK_DOWN_MS, sim_now_us(board) / 1000);
}

bool sim_hangs(sim *board)
{
    const uint8_t *host = board->hal.mailbox + PS_LINK_HOST_AT;
    for (uint32_t i = 0; i < board->faults_count; i++) {
        sim_fault *fault = &board->faults[i];
        if (fault->kind != SIM_HANG || fault->over || board->card.page.session == 0) {
            continue;
        }
        uint32_t submitted = ps_mailbox_load32(host + offsetof(ps_link_host, submitted));
        if (submitted < fault->first) {
            continue;
        }
        if (fault->since_us == 0) {
            fault->since_us = sim_now_us(board);
            board->struck[SIM_HANG]++;
        }
        fault->over = sim_now_us(board) - board->kicked_us >= SIM_WATCHDOG_US;
        return true;
    }
    return false;
}

/* ---- the bad bus: linked with --wrap=ps_mailbox_read and --wrap=ps_mailbox_write ---- */

void __real_ps_mailbox_read(void *to, const uint8_t *from, size_t words);
void __real_ps_mailbox_write(uint8_t *to, const void *from, size_t words);
void __wrap_ps_mailbox_read(void *to, const uint8_t *from, size_t words);
void __wrap_ps_mailbox_write(uint8_t *to, const void *from, size_t words);

static bool is_entry_at(const uint8_t *place, size_t area)
{
    const uint8_t *first = sim_on_bus->hal.mailbox + area;
    return place >= first && place < first + PS_LINK_SLOTS * sizeof(ps_link_submission);
}

/* Whether the submission is read wrongly, `COUNT` ms long from the first time on. */
static bool is_torn(sim *board, uint32_t sequence)
{
    for (uint32_t i = 0; i < board->faults_count; i++) {
        sim_fault *fault = &board->faults[i];
        if (fault->kind != SIM_TORN_SUBMISSION || fault->first != sequence) {
            continue;
        }
        uint64_t now_us = sim_now_us(board);
        fault->since_us = fault->since_us == 0 ? now_us : fault->since_us;
        if ((now_us - fault->since_us) / 1000 < fault->count) {
            board->struck[SIM_TORN_SUBMISSION]++;
            return true;
        }
    }
    return false;
}

/* Whether the completion is written wrongly: `COUNT` of them are. */
static bool is_spoilt(sim *board, uint32_t sequence)
{
    for (uint32_t i = 0; i < board->faults_count; i++) {
        sim_fault *fault = &board->faults[i];
        if (fault->kind == SIM_TORN_COMPLETION && sequence >= fault->first && fault->count > 0) {
            fault->count--;
            board->struck[SIM_TORN_COMPLETION]++;
            return true;
        }
    }
    return false;
}

void __wrap_ps_mailbox_read(void *to, const uint8_t *from, size_t words)
{
    __real_ps_mailbox_read(to, from, words);
    if (is_entry_at(from, PS_LINK_SUBMISSIONS_AT)) {
        ps_link_submission *submission = to;
        if (is_torn(sim_on_bus, submission->sequence)) {
            submission->count ^= 1;
        }
    }
}

void __wrap_ps_mailbox_write(uint8_t *to, const void *from, size_t words)
{
    __real_ps_mailbox_write(to, from, words);
    const ps_link_completion *completion = from;
    if (is_entry_at(to, PS_LINK_COMPLETIONS_AT) &&
        is_spoilt(sim_on_bus, completion->sequence)) {
        to[offsetof(ps_link_completion, ok)] ^= 1;
    }
}
