/* The driver behind nvme.h. Figures and section numbers are those of the NVM Express base
 * specification 1.4. */
#include "engine/nvme_queue.h"

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

/* Admin commands: 5.3, 5.4. */
enum { ADMIN_MAKE_SUBMISSIONS = 0x01, ADMIN_MAKE_COMPLETIONS = 0x05 };

enum {
    ACCESS_MAX_US = 250000, /* without an answer from the link, which is then down */
    STOP_MAX_US = 100000,   /* for a controller to stop */
    TIMEOUTS_MAX = 4,       /* that a gather may take in all, however often it makes progress */
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

static void end_all(ps_nvme *nvme, ps_hal_state state)
{
    for (uint32_t b = 0; b < nvme->port.buffers; b++) {
        if (ps_nvme_awaited(&nvme->gathers[b])) {
            nvme->gathers[b].state = state;
        }
    }
}

/* ---- starting and stopping ---- */

static void restart(ps_nvme *nvme)
{
    nvme->step = READ_CAP;
    nvme->starts++;
    ps_nvme_forget(nvme);
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
    ps_nvme_completion entry = ps_nvme_get_completion(nvme, ADMIN_COMPLETIONS + 16 * number);
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
        uint64_t limit = nvme->port.gather_timeout_us;
        late |= ps_nvme_awaited(gather) && (now - gather->moved_us > limit ||
                                    now - gather->started_us > TIMEOUTS_MAX * limit);
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
    uint64_t command[COMMAND_WORDS] = {opcode | (uint64_t)ps_nvme_next_id(nvme) << 16,
                                       [3] = nvme->memory + at, [5] = queue};
    ps_nvme_put_command(nvme, ADMIN_SUBMISSIONS + 64 * number, command);
    ring(nvme, 0, false, number + 1);
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

/* With the engine up: tells the controller what is new to it. */
static void serve(ps_nvme *nvme)
{
    bool waiting = false;
    for (uint32_t b = 0; b < nvme->port.buffers; b++) {
        waiting |= ps_nvme_awaited(&nvme->gathers[b]);
    }
    if ((nvme->head - nvme->head_rung) % ENTRIES >= HEAD_LAG) {
        nvme->head_rung = nvme->head;
        ring(nvme, 1, true, nvme->head);
    } else if (nvme->tail != nvme->tail_rung) {
        nvme->tail_rung = nvme->tail;
        ring(nvme, 1, false, nvme->tail);
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
        ps_nvme_clear(nvme);
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

static void trade(ps_nvme *nvme)
{
    if (nvme->step == UP) {
        ps_nvme_trade(nvme);
    }
}

static void work(ps_nvme *nvme)
{
    trade(nvme);
    if (nvme->accessing && !take_access(nvme)) {
        return;
    }
    take_time(nvme);
    trade(nvme);
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
    uint64_t now = nvme->port.now_us(nvme->port.context);
    nvme->gathers[buffer] = (ps_nvme_gather){
        .addresses = addresses,
        .started_us = now,
        .moved_us = now,
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
    if (ps_nvme_awaited(gather)) {
        work(nvme);
    }
    if (!ps_nvme_awaited(gather)) {
        gather->used = false;
    }
    return gather->state;
}

uint64_t ps_nvme_resets(const ps_nvme *nvme)
{
    return nvme->starts > 0 ? nvme->starts - 1 : 0;
}
