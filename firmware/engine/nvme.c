/* The driver behind nvme.h. Figures and section numbers are those of the NVM Express base
 * specification 1.4. */
#include "engine/nvme.h"

#include <assert.h>

enum { PAGE = 4096, BLOCKS_PER_PAGE = 8 /* of 512 bytes */ };

/* Registers, 3.1, and what this driver looks at in them. */
enum {
    REG_CAP = 0x00,  /* 8 bytes */
    REG_CC = 0x14,
    REG_CSTS = 0x1c,
    REG_AQA = 0x24,
    REG_ASQ = 0x28,  /* 8 bytes */
    REG_ACQ = 0x30,  /* 8 bytes */
    REG_BELLS = 0x1000,
    CC_ENABLE = 0x00460001, /* entries of 16 and 64 bytes, pages of 4096, enabled */
    CSTS_READY = 1,
    CSTS_FATAL = 2
};

/* Queues, all within a page, and the lists: one page for each buffer. */
enum {
    ENTRIES = 64, /* of the I/O queues, far more than can be under way */
    ADMIN_ENTRIES = 16,
    ADMIN_SUBMISSIONS = 0x0000,
    ADMIN_COMPLETIONS = 0x1000,
    SUBMISSIONS = 0x2000,
    COMPLETIONS = 0x3000,
    LISTS = 0x4000,
    QUEUES_SIZE = LISTS,
    COMMAND_WORDS = 8, /* of 64 bits */
    HEAD_LAG = 16      /* completions that are taken before the controller is told */
};

static_assert(LISTS + PS_HAL_BUFFERS_MAX * PAGE == PS_NVME_MEMORY_SIZE, "lists fit");
static_assert(PS_HAL_GATHER_MAX - 1 <= PAGE / 8, "a list is one page, without a chain");

/* Commands: 5.3, 5.4, 6.14. */
enum { ADMIN_MAKE_SUBMISSIONS = 0x01, ADMIN_MAKE_COMPLETIONS = 0x05, IO_WRITE = 0x01 };

enum {
    ACCESS_MAX_US = 250000, /* without an answer from the link, which is then down */
    STOP_MAX_US = 100000,   /* for a controller to stop */
    WATCH_US = 10000        /* between two looks at a controller that has work */
};

/* What the driver is doing. Steps up to UP follow each other. */
enum {
    OFF = 0,
    READ_CAP,
    DISABLE,
    AWAIT_DISABLED,
    SET_AQA,
    SET_ASQ,
    SET_ACQ,
    ENABLE,
    AWAIT_ENABLED,
    MAKE_COMPLETIONS,
    AWAIT_COMPLETIONS,
    MAKE_SUBMISSIONS,
    AWAIT_SUBMISSIONS,
    UP,
    STOP,
    AWAIT_STOPPED
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

static void put_command(const ps_nvme *nvme, uint32_t at, const uint64_t command[COMMAND_WORDS])
{
    for (uint32_t i = 0; i < COMMAND_WORDS; i++) {
        put64(nvme, at + 8 * i, command[i]);
    }
}

/* The half of a completion that matters, 4.6: submission queue, id, phase and status. */
typedef struct {
    uint32_t queue, id, phase, status;
} completion;

static completion get_completion(const ps_nvme *nvme, uint32_t at)
{
    uint64_t half = get64(nvme, at + 8);
    __atomic_thread_fence(__ATOMIC_ACQUIRE); /* what it tells of is read after it */
    return (completion){half >> 16 & 0xffff, half >> 32 & 0xffff, half >> 48 & 1,
                        (uint32_t)(half >> 49)};
}

/* ---- gathers ---- */

/* The command of a gather, 6.14, with its PRP entries as 4.3 wants them. */
static void make_write(const ps_nvme *nvme, uint32_t buffer, uint64_t command[COMMAND_WORDS])
{
    const ps_nvme_gather *gather = &nvme->gathers[buffer];
    uint64_t second = gather->count == 1   ? 0
                      : gather->count == 2 ? gather->addresses[1]
                                           : nvme->memory + LISTS + buffer * PAGE;
    command[0] = IO_WRITE | (uint64_t)gather->id << 16 | UINT64_C(1) << 32; /* namespace 1 */
    command[1] = command[2] = command[7] = 0;
    command[3] = gather->addresses[0];
    command[4] = second;
    command[5] = (uint64_t)buffer * nvme->port.gather_max * BLOCKS_PER_PAGE;
    command[6] = gather->count * BLOCKS_PER_PAGE - 1;
}

static uint16_t next_id(ps_nvme *nvme)
{
    /* 0xffff means "none" in error logs. */
    nvme->last_id = nvme->last_id >= 0xfffe ? 1 : nvme->last_id + 1;
    return nvme->last_id;
}

static void submit(ps_nvme *nvme, uint32_t buffer)
{
    ps_nvme_gather *gather = &nvme->gathers[buffer];
    uint64_t command[COMMAND_WORDS];
    gather->id = next_id(nvme);
    gather->slot = nvme->tail;
    make_write(nvme, buffer, command);
    for (uint32_t i = 1; i < gather->count; i++) {
        put64(nvme, LISTS + buffer * PAGE + 8 * (i - 1), gather->addresses[i]);
    }
    put_command(nvme, SUBMISSIONS + 64 * nvme->tail, command);
    nvme->tail = (nvme->tail + 1) % ENTRIES;
    gather->submitted = true;
}

/* Whether command and list are still what submit() wrote. */
static bool intact(const ps_nvme *nvme, uint32_t buffer)
{
    const ps_nvme_gather *gather = &nvme->gathers[buffer];
    uint64_t command[COMMAND_WORDS], changed = 0;
    make_write(nvme, buffer, command);
    for (uint32_t i = 0; i < COMMAND_WORDS; i++) {
        changed |= get64(nvme, SUBMISSIONS + 64 * gather->slot + 8 * i) ^ command[i];
    }
    for (uint32_t i = 1; i < gather->count; i++) {
        changed |= get64(nvme, LISTS + buffer * PAGE + 8 * (i - 1)) ^ gather->addresses[i];
    }
    return changed == 0;
}

static bool awaited(const ps_nvme_gather *gather)
{
    return gather->used && gather->state == PS_HAL_BUSY;
}

/* The gather that a completion is about, or -1. */
static int find_gather(const ps_nvme *nvme, const completion *entry)
{
    for (uint32_t b = 0; b < nvme->port.buffers; b++) {
        const ps_nvme_gather *gather = &nvme->gathers[b];
        if (awaited(gather) && gather->submitted && entry->queue == 1 && entry->id == gather->id) {
            return (int)b;
        }
    }
    return -1;
}

/* Takes new completions. One that is about nothing under way was not made by the controller, or
 * not now: it is passed over by leaving it where the controller's next one will be. */
static void take_completions(ps_nvme *nvme)
{
    for (uint32_t taken = 0; taken < ENTRIES; taken++) {
        completion entry = get_completion(nvme, COMPLETIONS + 16 * nvme->head);
        int b = entry.phase == nvme->phase ? find_gather(nvme, &entry) : -1;
        if (b < 0) {
            return;
        }
        const char *fault = entry.status != 0            ? "a page was not delivered"
                            : !intact(nvme, (uint32_t)b) ? "a command was changed under way"
                                                         : NULL;
        nvme->gathers[b].state = fault == NULL ? PS_HAL_DONE : PS_HAL_REFUSED;
        nvme->fault = fault == NULL ? nvme->fault : fault;
        nvme->head = (nvme->head + 1) % ENTRIES;
        nvme->phase ^= nvme->head == 0 ? 1 : 0;
    }
}

static void end_all(ps_nvme *nvme, ps_hal_state state)
{
    for (uint32_t b = 0; b < nvme->port.buffers; b++) {
        if (awaited(&nvme->gathers[b])) {
            nvme->gathers[b].state = state;
        }
    }
}

/* ---- starting and stopping ---- */

static void restart(ps_nvme *nvme)
{
    nvme->step = READ_CAP;
    nvme->starts++;
    nvme->tail = nvme->tail_rung = nvme->head = nvme->head_rung = 0;
    nvme->phase = 1;
    for (uint32_t b = 0; b < nvme->port.buffers; b++) {
        nvme->gathers[b].submitted = false;
    }
}

/* Ends all gathers with `cause`, but first stops the controller if that can be reached. */
static void fail(ps_nvme *nvme, ps_hal_state cause, const char *fault)
{
    nvme->fault = fault;
    if (cause == PS_HAL_LINK_DOWN) {
        nvme->step = OFF;
        end_all(nvme, cause);
    } else {
        nvme->step = STOP;
        nvme->cause = cause;
        nvme->stop_us = nvme->port.now_us(nvme->port.context);
    }
}

static bool stopping(const ps_nvme *nvme)
{
    return nvme->step == STOP || nvme->step == AWAIT_STOPPED;
}

static void stopped(ps_nvme *nvme)
{
    nvme->step = OFF;
    end_all(nvme, nvme->cause);
}

/* CAP, 3.1.1: queues long enough, doorbells in reach, pages of 4096 bytes. */
static void take_capabilities(ps_nvme *nvme, const ps_nvme_reply *reply)
{
    uint64_t cap = reply->value;
    uint32_t entries = (uint32_t)(cap & 0xffff) + 1, stride = cap >> 32 & 0xf;
    bool fits = entries >= ENTRIES && (cap >> 48 & 0xf) == 0 &&
                REG_BELLS + 4 * (4u << stride) <= PS_NVME_BUS_SIZE;
    if (cap == UINT64_MAX) {
        fail(nvme, PS_HAL_LINK_DOWN, "registers read as ones");
    } else if (reply->memory == 0 || reply->memory % PAGE != 0) {
        fail(nvme, PS_HAL_LINK_DOWN, "the link gives no address of engine memory");
    } else if (!fits) {
        fail(nvme, PS_HAL_TIMEOUT, "the controller cannot do what is needed");
    } else {
        nvme->stride = 4u << stride;
        nvme->memory = reply->memory;
        nvme->generation = reply->generation;
        nvme->step = DISABLE;
    }
}

/* CSTS, 3.1.6, in whatever step it was read. */
static void take_status(ps_nvme *nvme, uint32_t status)
{
    bool ready = status & CSTS_READY;
    if (status == UINT32_MAX) {
        if (stopping(nvme)) {
            stopped(nvme);
        } else {
            fail(nvme, PS_HAL_LINK_DOWN, "registers read as ones");
        }
    } else if (nvme->step == AWAIT_STOPPED) {
        if (!ready) {
            stopped(nvme);
        }
    } else if (nvme->step == AWAIT_DISABLED) {
        nvme->step += !ready;
    } else if (status & CSTS_FATAL) {
        fail(nvme, PS_HAL_BLOCKED, "the controller cannot reach its queues");
    } else if (nvme->step == AWAIT_ENABLED) {
        nvme->step += ready;
    } else if (!ready) {
        fail(nvme, PS_HAL_TIMEOUT, "the controller was disabled by somebody else");
    }
}

/* Goes on with the next step when the answer to admin command `number` is there. */
static void take_admin(ps_nvme *nvme, uint32_t number)
{
    completion entry = get_completion(nvme, ADMIN_COMPLETIONS + 16 * number);
    if (entry.phase != 1 || entry.queue != 0 || entry.id != nvme->last_id) {
        return;
    }
    if (entry.status != 0) {
        fail(nvme, PS_HAL_TIMEOUT, "the controller makes no queue");
    } else {
        nvme->step++;
    }
}

/* A look at time. An access under way is waited for: its end tells more. */
static void take_time(ps_nvme *nvme)
{
    uint64_t now = nvme->port.now_us(nvme->port.context);
    bool late = false;
    if (stopping(nvme)) {
        if (now - nvme->stop_us > STOP_MAX_US) {
            stopped(nvme);
        }
        return;
    }
    for (uint32_t b = 0; b < nvme->port.buffers; b++) {
        const ps_nvme_gather *gather = &nvme->gathers[b];
        late |= awaited(gather) && now - gather->started_us > nvme->port.gather_timeout_us;
    }
    if (late) {
        bool admin = nvme->step == AWAIT_COMPLETIONS || nvme->step == AWAIT_SUBMISSIONS;
        fail(nvme, admin ? PS_HAL_BLOCKED : PS_HAL_TIMEOUT,
             admin ? "no answer of the controller arrives in its queue"
                   : "the controller does not answer in time");
    }
}

/* ---- the bus ---- */

static void access_bus(ps_nvme *nvme, bool write, uint32_t width, uint32_t offset, uint64_t value)
{
    ps_nvme_access access = {write, width, offset, value};
    nvme->accessing = true;
    nvme->looking = !write && offset == REG_CSTS;
    nvme->accessed_us = nvme->port.now_us(nvme->port.context);
    __atomic_thread_fence(__ATOMIC_RELEASE); /* queues and lists are written before */
    nvme->port.bus_start(nvme->port.context, &access);
}

static void read_status(ps_nvme *nvme)
{
    access_bus(nvme, false, 4, REG_CSTS, 0);
}

/* Doorbells, 3.1.24: tail of submission queue `queue`, head of completion queue `queue`. */
static void ring(ps_nvme *nvme, uint32_t queue, bool completions, uint32_t value)
{
    uint32_t bell = 2 * queue + (completions ? 1 : 0);
    access_bus(nvme, true, 4, REG_BELLS + bell * nvme->stride, value);
}

static void make_queue(ps_nvme *nvme, uint32_t number, uint32_t opcode, uint32_t at, uint32_t flags)
{
    uint64_t queue = (uint64_t)(ENTRIES - 1) << 16 | 1 | (uint64_t)flags << 32;
    uint64_t command[COMMAND_WORDS] = {opcode | (uint64_t)next_id(nvme) << 16,
                                       [3] = nvme->memory + at, [5] = queue};
    put_command(nvme, ADMIN_SUBMISSIONS + 64 * number, command);
    ring(nvme, 0, false, number + 1);
}

static void clear_queues(const ps_nvme *nvme)
{
    for (uint32_t at = 0; at < QUEUES_SIZE; at += 8) {
        put64(nvme, at, 0);
    }
}

/* Looks at a controller that has work, now and then. */
static void watch(ps_nvme *nvme)
{
    if (nvme->port.now_us(nvme->port.context) - nvme->accessed_us > WATCH_US) {
        read_status(nvme);
    }
}

static void await_admin(ps_nvme *nvme, uint32_t number)
{
    int step = nvme->step;
    take_admin(nvme, number);
    if (nvme->step == step) {
        watch(nvme);
    }
}

/* With the engine up: hands over what waits, and rings. */
static void serve(ps_nvme *nvme)
{
    bool waiting = false;
    take_completions(nvme);
    for (uint32_t b = 0; b < nvme->port.buffers; b++) {
        if (awaited(&nvme->gathers[b])) {
            waiting = true;
            if (!nvme->gathers[b].submitted) {
                submit(nvme, b);
            }
        }
    }
    if (nvme->tail != nvme->tail_rung) {
        nvme->tail_rung = nvme->tail;
        ring(nvme, 1, false, nvme->tail);
    } else if ((nvme->head - nvme->head_rung) % ENTRIES >= HEAD_LAG) {
        nvme->head_rung = nvme->head;
        ring(nvme, 1, true, nvme->head);
    } else if (waiting) {
        watch(nvme);
    }
}

/* Begins what the step asks for, when no access is under way. */
static void begin_step(ps_nvme *nvme)
{
    switch (nvme->step) {
    case READ_CAP:
        access_bus(nvme, false, 8, REG_CAP, 0);
        break;
    case DISABLE:
    case STOP:
        access_bus(nvme, true, 4, REG_CC, 0);
        break;
    case AWAIT_DISABLED:
    case AWAIT_ENABLED:
    case AWAIT_STOPPED:
        read_status(nvme);
        break;
    case SET_AQA:
        clear_queues(nvme);
        access_bus(nvme, true, 4, REG_AQA, (ADMIN_ENTRIES - 1) << 16 | (ADMIN_ENTRIES - 1));
        break;
    case SET_ASQ:
        access_bus(nvme, true, 8, REG_ASQ, nvme->memory + ADMIN_SUBMISSIONS);
        break;
    case SET_ACQ:
        access_bus(nvme, true, 8, REG_ACQ, nvme->memory + ADMIN_COMPLETIONS);
        break;
    case ENABLE:
        access_bus(nvme, true, 4, REG_CC, CC_ENABLE);
        break;
    case MAKE_COMPLETIONS:
        make_queue(nvme, 0, ADMIN_MAKE_COMPLETIONS, COMPLETIONS, 1);
        break;
    case MAKE_SUBMISSIONS:
        make_queue(nvme, 1, ADMIN_MAKE_SUBMISSIONS, SUBMISSIONS, 1u << 16 | 1);
        break;
    case AWAIT_COMPLETIONS:
        await_admin(nvme, 0);
        break;
    case AWAIT_SUBMISSIONS:
        await_admin(nvme, 1);
        break;
    case UP:
        serve(nvme);
        break;
    default:
        break;
    }
}

/* What an access means that has ended well. */
static void end_access(ps_nvme *nvme, const ps_nvme_reply *reply)
{
    if (nvme->step == READ_CAP) {
        take_capabilities(nvme, reply);
    } else if (reply->generation != nvme->generation && !stopping(nvme)) {
        restart(nvme);
    } else if (nvme->looking) {
        take_status(nvme, (uint32_t)reply->value);
    } else if (nvme->step != UP) {
        nvme->step++;
    }
}

/* Whether the access under way has ended; if so, acts on it. */
static bool take_access(ps_nvme *nvme)
{
    ps_nvme_reply reply = nvme->port.bus_poll(nvme->port.context);
    if (reply.state == PS_NVME_ACCESS_BUSY &&
        nvme->port.now_us(nvme->port.context) - nvme->accessed_us <= ACCESS_MAX_US) {
        return false;
    }
    nvme->accessing = false;
    if (reply.state == PS_NVME_ACCESS_DONE) {
        end_access(nvme, &reply);
    } else if (stopping(nvme)) {
        stopped(nvme);
    } else {
        fail(nvme, PS_HAL_LINK_DOWN,
             reply.state == PS_NVME_ACCESS_BUSY ? "the link does not answer" : "the link is down");
    }
    return true;
}

static void work(ps_nvme *nvme)
{
    if (nvme->step == UP) {
        take_completions(nvme);
    }
    if (nvme->accessing && !take_access(nvme)) {
        return;
    }
    take_time(nvme);
    begin_step(nvme);
}

/* ---- what the board calls ---- */

void ps_nvme_init(ps_nvme *nvme, const ps_nvme_port *port)
{
    *nvme = (ps_nvme){.port = *port, .step = OFF};
}

static bool can_start(const ps_nvme *nvme, uint32_t buffer, const uint64_t *addresses,
                      uint32_t count)
{
    uint64_t skew = 0;
    if (buffer >= nvme->port.buffers || nvme->gathers[buffer].used || count == 0 ||
        count > nvme->port.gather_max) {
        return false;
    }
    for (uint32_t i = 0; i < count; i++) {
        skew |= addresses[i] % PAGE;
    }
    return skew == 0;
}

ps_hal_state ps_nvme_start(ps_nvme *nvme, uint32_t buffer, const uint64_t *addresses,
                           uint32_t count)
{
    if (!can_start(nvme, buffer, addresses, count)) {
        return PS_HAL_MISUSED;
    }
    nvme->gathers[buffer] = (ps_nvme_gather){
        .addresses = addresses,
        .started_us = nvme->port.now_us(nvme->port.context),
        .count = count,
        .state = PS_HAL_BUSY,
        .used = true,
    };
    if (nvme->step == OFF) {
        restart(nvme);
    }
    work(nvme);
    return PS_HAL_BUSY;
}

ps_hal_state ps_nvme_poll(ps_nvme *nvme, uint32_t buffer)
{
    if (buffer >= nvme->port.buffers || !nvme->gathers[buffer].used) {
        return PS_HAL_MISUSED;
    }
    ps_nvme_gather *gather = &nvme->gathers[buffer];
    if (awaited(gather)) {
        work(nvme);
    }
    if (!awaited(gather)) {
        gather->used = false;
    }
    return gather->state;
}

uint64_t ps_nvme_resets(const ps_nvme *nvme)
{
    return nvme->starts > 0 ? nvme->starts - 1 : 0;
}
