/* The commands of the driver: gathers, and proofs that zeros are what a page holds. Section
 * numbers are those of the NVM Express base specification 1.4. */
#include "engine/nvme_queue.h"

#include <assert.h>

enum {
    BLOCKS_PER_PAGE = 8, /* of 512 bytes */
    PROOFS_MAX = 400,    /* under way for one buffer: the other one is to have room too */
    ID_LAST = 0xfffe     /* 0xffff means "none" in error logs */
};

static_assert(LISTS + PS_HAL_BUFFERS_MAX * PAGE == PS_NVME_MEMORY_SIZE, "lists fit");
static_assert(PS_HAL_GATHER_MAX - 1 <= PAGE / 8, "a list is one page, without a chain");
/* Neither queue is ever full, 4.1.2; completions that the controller has not been told about take
 * room too. */
static_assert(PS_HAL_BUFFERS_MAX * (PROOFS_MAX + 1) + HEAD_LAG < ENTRIES, "all commands fit");

/* Commands, 6.15, 6.6. */
enum {
    IO_WRITE = 0x01,
    IO_COMPARE = 0x05,
    BY_SGL = 1 << 14 /* the command names a descriptor instead of PRP entries, 4.2 */
};

/* A Last Segment descriptor of 16 bytes, which is one descriptor: its second half, 4.4. */
static const uint64_t last_segment = UINT64_C(0x3) << 60 | 16;

/* Status code type and status code, without Do Not Retry and More, 4.6.1. */
enum {
    STATUS_MASK = 0x7ff,
    SGL_INVALID_FIRST = 0x0d, /* segment, number, length of data or metadata, type */
    SGL_INVALID_LAST = 0x11,
    COMPARE_FAILURE = 0x285
};

/* ---- engine memory ---- */

static void put64(const ps_nvme *nvme, uint32_t at, uint64_t value)
{
    *(volatile uint64_t *)(nvme->port.memory + at) = value;
}

static uint64_t get64(const ps_nvme *nvme, uint32_t at)
{
    return *(const volatile uint64_t *)(nvme->port.memory + at);
}

void ps_nvme_put_command(const ps_nvme *nvme, uint32_t at, const uint64_t command[COMMAND_WORDS])
{
    for (uint32_t i = 0; i < COMMAND_WORDS; i++) {
        put64(nvme, at + 8 * i, command[i]);
    }
}

ps_nvme_completion ps_nvme_get_completion(const ps_nvme *nvme, uint32_t at)
{
    uint64_t half = get64(nvme, at + 8);
    __atomic_thread_fence(__ATOMIC_ACQUIRE); /* what it tells of is read after it */
    return (ps_nvme_completion){half >> 16 & 0xffff, half >> 32 & 0xffff, half >> 48 & 1,
                                (uint32_t)(half >> 49)};
}

void ps_nvme_clear(const ps_nvme *nvme)
{
    for (uint32_t at = 0; at < QUEUES_SIZE; at += 8) {
        put64(nvme, at, 0);
    }
}

/* ---- gathers ---- */

static uint64_t block_of(const ps_nvme *nvme, uint32_t buffer, uint32_t page)
{
    return ((uint64_t)buffer * nvme->port.gather_max + page) * BLOCKS_PER_PAGE;
}

/* The command of a gather, 6.15, with its PRP entries as 4.3 wants them. */
static void make_write(const ps_nvme *nvme, uint32_t buffer, uint64_t command[COMMAND_WORDS])
{
    const ps_nvme_gather *gather = &nvme->gathers[buffer];
    command[3] = gather->addresses[0];
    command[4] = gather->count == 1   ? 0
                 : gather->count == 2 ? gather->addresses[1]
                                      : nvme->memory + LISTS + buffer * PAGE;
    command[5] = block_of(nvme, buffer, 0);
    command[6] = gather->count * BLOCKS_PER_PAGE - 1;
}

/* The command of a proof, 6.6: the page is named as a list of descriptors, and what they describe
 * is compared, so nothing is written anywhere, whatever the page holds by now. */
static void make_proof(const ps_nvme *nvme, uint32_t buffer, uint32_t page,
                       uint64_t command[COMMAND_WORDS])
{
    command[3] = nvme->gathers[buffer].addresses[page];
    command[4] = last_segment;
    command[5] = block_of(nvme, buffer, page);
    command[6] = 0; /* one block */
}

static void make_command(const ps_nvme *nvme, uint32_t slot, uint64_t command[COMMAND_WORDS])
{
    const ps_nvme_command *given = &nvme->commands[slot];
    command[0] = (given->proof ? IO_COMPARE | BY_SGL : IO_WRITE) | (uint64_t)given->id << 16 |
                 UINT64_C(1) << 32; /* namespace 1 */
    command[1] = command[2] = command[7] = 0;
    if (given->proof) {
        make_proof(nvme, given->buffer, given->page, command);
    } else {
        make_write(nvme, given->buffer, command);
    }
}

uint16_t ps_nvme_next_id(ps_nvme *nvme)
{
    nvme->last_id = nvme->last_id >= ID_LAST ? 1 : nvme->last_id + 1;
    return nvme->last_id;
}

/* Whether the next slot is free. What stands in it is looked at when its command has ended, so it
 * stays until then, long after the controller has fetched it. */
static bool has_room(const ps_nvme *nvme)
{
    return !nvme->commands[nvme->tail].used;
}

static void submit(ps_nvme *nvme, ps_nvme_command given)
{
    uint64_t command[COMMAND_WORDS];
    given.id = ps_nvme_next_id(nvme);
    given.used = true;
    nvme->commands[nvme->tail] = given;
    make_command(nvme, nvme->tail, command);
    ps_nvme_put_command(nvme, SUBMISSIONS + 64 * nvme->tail, command);
    nvme->tail = (nvme->tail + 1) % ENTRIES;
}

static void submit_write(ps_nvme *nvme, uint32_t buffer)
{
    ps_nvme_gather *gather = &nvme->gathers[buffer];
    for (uint32_t i = 1; i < gather->count; i++) {
        put64(nvme, LISTS + buffer * PAGE + 8 * (i - 1), gather->addresses[i]);
    }
    submit(nvme, (ps_nvme_command){.buffer = buffer});
    gather->submitted = true;
}

/* Whether a command, and the list of a gather, are still what was written. */
static bool intact(const ps_nvme *nvme, uint32_t slot)
{
    const ps_nvme_command *given = &nvme->commands[slot];
    const ps_nvme_gather *gather = &nvme->gathers[given->buffer];
    uint64_t command[COMMAND_WORDS], changed = 0;
    make_command(nvme, slot, command);
    for (uint32_t i = 0; i < COMMAND_WORDS; i++) {
        changed |= get64(nvme, SUBMISSIONS + 64 * slot + 8 * i) ^ command[i];
    }
    for (uint32_t i = 1; !given->proof && i < gather->count; i++) {
        changed |= get64(nvme, LISTS + given->buffer * PAGE + 8 * (i - 1)) ^ gather->addresses[i];
    }
    return changed == 0;
}

/* ---- proofs ----
 *
 * Where the bus refuses a gather or nothing answers, QEMU gathers zeros and reports no error
 * (address_space_map). But it reports a list of descriptors that it cannot fetch. So a page
 * whose edges are zero is named as one: zeros describe no data, and are refused for that. A
 * controller that knows no such lists, or no Compare, proves nothing. */

static bool has_zero_edges(const ps_nvme *nvme, uint32_t buffer, uint32_t page)
{
    size_t at = ((size_t)buffer * nvme->port.gather_max + page) * PAGE;
    const volatile uint64_t *words =
        (const volatile uint64_t *)(const void *)(nvme->port.landing + at);
    return words[0] == 0 && words[1] == 0 && words[PAGE / 8 - 1] == 0;
}

/* Whether a proof with this status has read its page. What is not known here has not. */
static bool proves(uint32_t status)
{
    uint32_t code = status & STATUS_MASK;
    return code == 0 || code == COMPARE_FAILURE ||
           (code >= SGL_INVALID_FIRST && code <= SGL_INVALID_LAST);
}

/* Gives as many proofs as there is room for, and ends the gather when none is missing. */
static void prove(ps_nvme *nvme, uint32_t buffer)
{
    ps_nvme_gather *gather = &nvme->gathers[buffer];
    while (gather->examined < gather->count && gather->proofs < PROOFS_MAX && has_room(nvme)) {
        uint32_t page = gather->examined++;
        if (has_zero_edges(nvme, buffer, page)) {
            submit(nvme, (ps_nvme_command){.proof = true, .buffer = buffer, .page = page});
            gather->proofs++;
        }
    }
    if (gather->examined == gather->count && gather->proofs == 0) {
        gather->state = gather->refused ? PS_HAL_REFUSED : PS_HAL_DONE;
    }
}

/* Hands over what waits. */
static void hand_over(ps_nvme *nvme)
{
    for (uint32_t b = 0; b < nvme->port.buffers; b++) {
        ps_nvme_gather *gather = &nvme->gathers[b];
        if (ps_nvme_awaited(gather) && gather->landed) {
            prove(nvme, b);
        } else if (ps_nvme_awaited(gather) && !gather->submitted && has_room(nvme)) {
            submit_write(nvme, b);
        }
    }
}

/* ---- completions ---- */

/* The slot of the command that a completion is about, or -1. Ids and slots are given out
 * together, so the one tells the other. */
static int find_slot(const ps_nvme *nvme, const ps_nvme_completion *entry)
{
    uint32_t age = (nvme->last_id + ID_LAST - entry->id) % ID_LAST;
    if (entry->queue != 1 || entry->id == 0 || entry->id > ID_LAST || age >= ENTRIES) {
        return -1;
    }
    uint32_t slot = (nvme->tail + 2 * ENTRIES - 1 - age) % ENTRIES;
    const ps_nvme_command *given = &nvme->commands[slot];
    return given->used && given->id == entry->id ? (int)slot : -1;
}

/* The command in `slot` has ended. After a fault nothing more is proven: all that is under way
 * is waited for, so that the next gather finds the controller idle. */
static void take_completion(ps_nvme *nvme, uint32_t slot, uint32_t status)
{
    ps_nvme_command *given = &nvme->commands[slot];
    ps_nvme_gather *gather = &nvme->gathers[given->buffer];
    const char *fault = !intact(nvme, slot)               ? "a command was changed under way"
                        : given->proof && !proves(status) ? "zeros of a page were not proven"
                        : !given->proof && status != 0    ? "a page was not delivered"
                                                          : NULL;
    if (given->proof) {
        gather->proofs--;
    }
    if (fault != NULL) {
        nvme->fault = fault;
        gather->refused = true;
        gather->examined = gather->count;
    }
    gather->landed = true;
    gather->moved_us = nvme->port.now_us(nvme->port.context);
    given->used = false;
}

/* Takes new completions. One that is about nothing under way was not made by the controller, or
 * not now: it is passed over by leaving it where the controller's next one will be. */
static void take_completions(ps_nvme *nvme)
{
    for (uint32_t taken = 0; taken < ENTRIES; taken++) {
        ps_nvme_completion entry = ps_nvme_get_completion(nvme, COMPLETIONS + 16 * nvme->head);
        int slot = entry.phase == nvme->phase ? find_slot(nvme, &entry) : -1;
        if (slot < 0) {
            return;
        }
        take_completion(nvme, (uint32_t)slot, entry.status);
        nvme->head = (nvme->head + 1) % ENTRIES;
        nvme->phase ^= nvme->head == 0 ? 1 : 0;
    }
}

void ps_nvme_trade(ps_nvme *nvme)
{
    take_completions(nvme);
    hand_over(nvme);
}

void ps_nvme_forget(ps_nvme *nvme)
{
    nvme->tail = nvme->tail_rung = nvme->head = nvme->head_rung = 0;
    nvme->phase = 1;
    for (uint32_t i = 0; i < ENTRIES; i++) {
        nvme->commands[i].used = false;
    }
    for (uint32_t b = 0; b < nvme->port.buffers; b++) {
        ps_nvme_gather *gather = &nvme->gathers[b];
        gather->submitted = false;
        gather->proofs = 0;
        gather->examined = gather->refused ? gather->count : 0;
    }
}
