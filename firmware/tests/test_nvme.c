/* The NVMe driver against a model of a controller, with faults. Runs on the host.
 *
 *     make -C firmware check
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/nvme.h"

enum {
    PAGE = 4096,
    MEMORY_AT = 0x40000000, /* bus address of engine memory */
    GATHER_MAX = PS_HAL_GATHER_MAX,
    TIMEOUT_US = 500000,
    ENTRIES_MAX = 64
};

static int passed, failed;

#define CHECK(condition) check((condition), #condition, __LINE__)
static void check(bool holds, const char *condition, int line)
{
    if (holds) {
        passed++;
    } else {
        failed++;
        printf("test_nvme.c:%d: not so: %s\n", line, condition);
    }
}

/* ---- the model ---- */

typedef struct {
    /* faults */
    bool down;         /* the link says so */
    bool mute;         /* the link answers nothing */
    bool ones;         /* registers read as ones */
    bool unreachable;  /* queues cannot be fetched: CSTS.CFS, as QEMU does it */
    bool silent_admin; /* admin commands are swallowed, and CSTS stays well */
    bool silent;       /* I/O commands are swallowed */
    bool stuck;        /* never gets ready */
    bool endless;      /* never gets disabled */
    uint32_t status;   /* of the next completions */
    uint32_t admin_status;
    uint64_t cap;
    uint64_t memory_at;

    uint8_t *memory;
    uint64_t now_us;
    uint32_t generation;
    bool asked;
    ps_nvme_access access;
    uint32_t cc, csts, aqa;
    uint64_t asq, acq, isq, icq;
    uint32_t isq_size, icq_size;
    uint32_t asq_head, acq_tail, isq_head, icq_tail, icq_head;
    uint32_t acq_phase, icq_phase;

    /* what was seen */
    uint64_t commands, accesses, enabled;
    uint64_t first[8]; /* words of the command fetched last */
    uint64_t gathered[GATHER_MAX];
    uint32_t gathered_count;
} model;

static uint64_t load(const model *m, uint64_t bus)
{
    uint64_t value;
    memcpy(&value, m->memory + (bus - MEMORY_AT), 8);
    return value;
}

static void complete(model *m, uint64_t queue, uint32_t slot, uint32_t phase, uint32_t sqid,
                     uint32_t id, uint32_t status)
{
    uint64_t half = (uint64_t)sqid << 16 | (uint64_t)id << 32 | (uint64_t)phase << 48 |
                    (uint64_t)status << 49;
    memcpy(m->memory + (queue - MEMORY_AT) + 16 * slot + 8, &half, 8);
}

static void complete_io(model *m, uint32_t id, uint32_t status)
{
    uint32_t next = (m->icq_tail + 1) % m->icq_size;
    if (next == m->icq_head) {
        return; /* full: the driver has not told how far it has come */
    }
    complete(m, m->icq, m->icq_tail, m->icq_phase, 1, id, status);
    m->icq_tail = next;
    m->icq_phase ^= next == 0;
}

static void admin_bell(model *m, uint32_t tail)
{
    while (m->asq_head != tail && m->asq_head < (m->aqa & 0xfff) + 1) {
        uint64_t at = m->asq + 64 * m->asq_head++;
        uint64_t head = load(m, at), prp = load(m, at + 24), queue = load(m, at + 40);
        if ((head & 0xff) == 5) {
            m->icq = prp;
            m->icq_size = (uint32_t)(queue >> 16 & 0xffff) + 1;
            m->icq_phase = 1;
        } else {
            m->isq = prp;
            m->isq_size = (uint32_t)(queue >> 16 & 0xffff) + 1;
        }
        if (!m->silent_admin) {
            complete(m, m->acq, m->acq_tail++, 1, 0, head >> 16 & 0xffff, m->admin_status);
        }
    }
}

/* Fetches a command as a controller would: its pages by PRP entries and list. */
static void fetch(model *m, uint64_t at)
{
    for (uint32_t i = 0; i < 8; i++) {
        m->first[i] = load(m, at + 8 * i);
    }
    uint32_t count = (uint32_t)((m->first[6] & 0xffff) + 1) / 8;
    m->gathered_count = count;
    m->gathered[0] = m->first[3];
    for (uint32_t i = 1; i < count; i++) {
        m->gathered[i] = count == 2 ? m->first[4] : load(m, m->first[4] + 8 * (i - 1));
    }
    m->commands++;
}

static void io_bell(model *m, uint32_t tail)
{
    while (m->isq != 0 && m->isq_head != tail) {
        fetch(m, m->isq + 64 * m->isq_head);
        m->isq_head = (m->isq_head + 1) % m->isq_size;
        if (!m->silent) {
            complete_io(m, m->first[0] >> 16 & 0xffff, m->status);
        }
    }
}

static void reset(model *m)
{
    m->asq_head = m->acq_tail = m->isq_head = m->icq_tail = m->icq_head = 0;
    m->isq = m->icq = 0;
}

static void write_register(model *m, uint32_t offset, uint64_t value)
{
    uint32_t stride = 4u << (m->cap >> 32 & 0xf);
    if (offset == 0x14) {
        m->enabled += value & 1;
        if (!(value & 1) && !m->endless) {
            reset(m);
            m->csts &= ~1u;
        } else if ((value & 1) && !m->stuck) {
            m->csts = 1;
        }
        m->cc = (uint32_t)value;
    } else if (offset == 0x24) {
        m->aqa = (uint32_t)value;
    } else if (offset == 0x28) {
        m->asq = value;
    } else if (offset == 0x30) {
        m->acq = value;
    } else if (offset >= 0x1000 && m->unreachable) {
        m->csts = 2;
    } else if (offset == 0x1000) {
        admin_bell(m, (uint32_t)value);
    } else if (offset == 0x1000 + 2 * stride) {
        io_bell(m, (uint32_t)value);
    } else if (offset == 0x1000 + 3 * stride) {
        m->icq_head = (uint32_t)value;
    }
}

static uint64_t model_now(void *context)
{
    model *m = context;
    return m->now_us += 10;
}

static void model_start(void *context, const ps_nvme_access *access)
{
    model *m = context;
    CHECK(access->offset + access->width <= PS_NVME_BUS_SIZE && access->width % 4 == 0);
    m->access = *access;
    m->asked = true;
    m->accesses++;
}

static ps_nvme_reply model_poll(void *context)
{
    model *m = context;
    ps_nvme_reply reply = {PS_NVME_ACCESS_BUSY, 0, m->memory_at, m->generation};
    if (m->mute || !m->asked) {
        return reply;
    }
    m->asked = false;
    reply.state = m->down ? PS_NVME_ACCESS_DOWN : PS_NVME_ACCESS_DONE;
    if (m->down) {
        return reply;
    }
    if (m->access.write) {
        if (!m->ones) {
            write_register(m, m->access.offset, m->access.value);
        }
    } else {
        uint64_t value = m->access.offset == 0 ? m->cap : m->csts;
        reply.value = m->ones ? UINT64_MAX >> (64 - 8 * m->access.width) : value;
    }
    return reply;
}

/* ---- a driver with its model ---- */

static model world;
static ps_nvme nvme;
static uint64_t pages[PS_HAL_BUFFERS_MAX][GATHER_MAX];

static void begin(void)
{
    uint8_t *memory = world.memory;
    memset(memory, 0xff, PS_NVME_MEMORY_SIZE);
    /* CAP of QEMU: queues of 2048 entries, contiguous, time-out 7.5 s, stride 0. */
    world = (model){.memory = memory, .memory_at = MEMORY_AT, .generation = 1,
                    .cap = UINT64_C(0x004018200f0107ff)};
    ps_nvme_port port = {.context = &world, .memory = memory, .buffers = 2,
                         .gather_max = GATHER_MAX, .gather_timeout_us = TIMEOUT_US,
                         .now_us = model_now, .bus_start = model_start, .bus_poll = model_poll};
    ps_nvme_init(&nvme, &port);
    for (uint32_t b = 0; b < PS_HAL_BUFFERS_MAX; b++) {
        for (uint32_t i = 0; i < GATHER_MAX; i++) {
            pages[b][i] = UINT64_C(0x100000000) * (b + 1) + UINT64_C(4096) * (3 * i + 7);
        }
    }
}

static ps_hal_state finish(uint32_t buffer)
{
    for (uint32_t polls = 0; polls < 1000000; polls++) {
        ps_hal_state state = ps_nvme_poll(&nvme, buffer);
        if (state != PS_HAL_BUSY) {
            return state;
        }
    }
    printf("test_nvme.c: a gather has no end\n");
    exit(2);
}

static ps_hal_state gather(uint32_t buffer, uint32_t count)
{
    ps_hal_state state = ps_nvme_start(&nvme, buffer, pages[buffer], count);
    return state == PS_HAL_BUSY ? finish(buffer) : state;
}

/* A gather of two pages right after set-up: brings the engine up. */
static void bring_up(void)
{
    begin();
    CHECK(gather(0, 2) == PS_HAL_DONE);
}

/* The engine works (again). */
static void check_alive(void)
{
    CHECK(gather(1, 3) == PS_HAL_DONE);
    CHECK(world.gathered_count == 3 && world.gathered[2] == pages[1][2]);
}

/* ---- what is tested ---- */

static void test_pages(void)
{
    static const uint32_t counts[] = {1, 2, 3, 511, 512};
    begin();
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        for (uint32_t b = 0; b < 2; b++) {
            CHECK(gather(b, counts[i]) == PS_HAL_DONE);
            CHECK(world.gathered_count == counts[i]);
            CHECK(memcmp(world.gathered, pages[b], 8 * counts[i]) == 0);
            CHECK((world.first[0] & 0xff) == 1 && world.first[0] >> 32 == 1);
            CHECK(world.first[5] == b * GATHER_MAX * 8);
        }
    }
    CHECK(world.enabled == 1 && ps_nvme_resets(&nvme) == 0);
}

static void test_stride(void)
{
    begin();
    world.cap |= UINT64_C(8) << 32; /* doorbells 1 KiB apart: the last one that fits */
    for (int i = 0; i < ENTRIES_MAX * 2; i++) {
        CHECK(gather((uint32_t)i % 2, 3) == PS_HAL_DONE);
    }
}

static void test_misuse(void)
{
    begin();
    CHECK(ps_nvme_start(&nvme, 2, pages[0], 1) == PS_HAL_MISUSED);
    CHECK(ps_nvme_start(&nvme, 0, pages[0], 0) == PS_HAL_MISUSED);
    CHECK(ps_nvme_start(&nvme, 0, pages[0], GATHER_MAX + 1) == PS_HAL_MISUSED);
    CHECK(ps_nvme_poll(&nvme, 0) == PS_HAL_MISUSED && ps_nvme_poll(&nvme, 9) == PS_HAL_MISUSED);
    pages[0][1] += 8;
    CHECK(ps_nvme_start(&nvme, 0, pages[0], 2) == PS_HAL_MISUSED);
    CHECK(world.accesses == 0);
    CHECK(ps_nvme_start(&nvme, 0, pages[0], 1) == PS_HAL_BUSY);
    CHECK(ps_nvme_start(&nvme, 0, pages[0], 1) == PS_HAL_MISUSED);
    CHECK(finish(0) == PS_HAL_DONE && ps_nvme_poll(&nvme, 0) == PS_HAL_MISUSED);
}

/* Both buffers at once, many times round the queues: the phase turns, and the controller is told
 * how far the driver has come. */
static void test_many(void)
{
    bool good = true;
    begin();
    for (uint32_t i = 0; i < 100 * ENTRIES_MAX; i++) {
        good &= ps_nvme_start(&nvme, 0, pages[0], 1 + i % GATHER_MAX) == PS_HAL_BUSY;
        good &= ps_nvme_start(&nvme, 1, pages[1], 1 + i % 7) == PS_HAL_BUSY;
        good &= finish(i % 2) == PS_HAL_DONE && finish(1 - i % 2) == PS_HAL_DONE;
    }
    CHECK(good);
    CHECK(world.commands == 200 * ENTRIES_MAX && world.enabled == 1);
    CHECK(world.accesses < world.commands + world.commands / 8 + 32);
}

static void test_data_error(void)
{
    bring_up();
    world.status = 0x4; /* Data Transfer Error, figure 126 */
    CHECK(gather(0, 5) == PS_HAL_REFUSED);
    world.status = 0x2004; /* the same, with Do Not Retry */
    CHECK(gather(0, 1) == PS_HAL_REFUSED);
    world.status = 0;
    check_alive();
    CHECK(world.enabled == 1);
}

static void test_blocked(void)
{
    begin();
    world.unreachable = true;
    CHECK(gather(0, 4) == PS_HAL_BLOCKED);
    CHECK(world.now_us < TIMEOUT_US && !(world.cc & 1));
    world.unreachable = false;
    check_alive();
    world.unreachable = true; /* taken away while the engine is up */
    uint64_t before = world.now_us;
    CHECK(ps_nvme_start(&nvme, 0, pages[0], 9) == PS_HAL_BUSY);
    CHECK(ps_nvme_start(&nvme, 1, pages[1], 9) == PS_HAL_BUSY);
    CHECK(finish(0) == PS_HAL_BLOCKED && finish(1) == PS_HAL_BLOCKED);
    CHECK(world.now_us - before < TIMEOUT_US);
    world.unreachable = false;
    check_alive();
    begin();
    world.silent_admin = true;
    CHECK(gather(0, 4) == PS_HAL_BLOCKED);
    world.silent_admin = false;
    check_alive();
}

static void test_link(void)
{
    begin();
    world.down = true;
    CHECK(gather(0, 1) == PS_HAL_LINK_DOWN);
    world.down = false;
    check_alive();
    world.down = true;
    CHECK(gather(0, 1) == PS_HAL_LINK_DOWN);
    world.down = false;
    world.mute = true;
    CHECK(gather(0, 1) == PS_HAL_LINK_DOWN);
    world.mute = false;
    check_alive();
    world.ones = true;
    CHECK(gather(0, 1) == PS_HAL_LINK_DOWN);
    world.silent = true;
    CHECK(gather(0, 1) == PS_HAL_LINK_DOWN);
    world.ones = world.silent = false;
    check_alive();
    begin();
    world.memory_at = 0;
    CHECK(gather(0, 1) == PS_HAL_LINK_DOWN);
    world.memory_at = MEMORY_AT + 8;
    CHECK(gather(0, 1) == PS_HAL_LINK_DOWN);
}

/* The link was away and is back: the controller knows nothing any more, and what is under way
 * begins anew by itself. */
static void test_generation(void)
{
    bring_up();
    reset(&world);
    world.csts = 0;
    world.generation++;
    CHECK(gather(0, 100) == PS_HAL_DONE);
    CHECK(world.gathered_count == 100 && world.gathered[99] == pages[0][99]);
    CHECK(world.enabled == 2 && ps_nvme_resets(&nvme) == 1);
    world.silent = true;
    CHECK(ps_nvme_start(&nvme, 0, pages[0], 8) == PS_HAL_BUSY);
    for (int i = 0; i < 4; i++) {
        CHECK(ps_nvme_poll(&nvme, 0) == PS_HAL_BUSY);
    }
    world.silent = false;
    world.generation++;
    CHECK(finish(0) == PS_HAL_DONE && world.gathered_count == 8);
}

static void test_timeout(void)
{
    bring_up();
    world.silent = true;
    CHECK(ps_nvme_start(&nvme, 0, pages[0], 8) == PS_HAL_BUSY);
    CHECK(ps_nvme_start(&nvme, 1, pages[1], 8) == PS_HAL_BUSY);
    CHECK(finish(0) == PS_HAL_TIMEOUT && finish(1) == PS_HAL_TIMEOUT);
    CHECK(!(world.cc & 1)); /* stopped before the buffers are given back */
    world.silent = false;
    check_alive();
    CHECK(world.enabled == 2);
}

/* The completion of a command that was given up does not count for the one after it. */
static void test_late(void)
{
    bring_up();
    world.silent = true;
    CHECK(gather(0, 8) == PS_HAL_TIMEOUT);
    uint32_t abandoned = world.first[0] >> 16 & 0xffff;
    CHECK(ps_nvme_start(&nvme, 0, pages[0], 8) == PS_HAL_BUSY);
    uint64_t commands = world.commands;
    for (int i = 0; i < 100 && world.commands == commands; i++) {
        CHECK(ps_nvme_poll(&nvme, 0) == PS_HAL_BUSY);
    }
    complete(&world, world.icq, 0, 1, 1, abandoned, 0);
    for (int i = 0; i < 100; i++) {
        CHECK(ps_nvme_poll(&nvme, 0) == PS_HAL_BUSY);
    }
    complete_io(&world, world.first[0] >> 16 & 0xffff, 0);
    CHECK(finish(0) == PS_HAL_DONE);
    world.silent = false;
    check_alive();
}

/* Entries that the controller has not made: other queue, other id, other phase. */
static void test_hostile_completions(void)
{
    bring_up();
    world.silent = true;
    CHECK(ps_nvme_start(&nvme, 0, pages[0], 2) == PS_HAL_BUSY);
    while (world.gathered_count != 2 || world.commands < 2) {
        CHECK(ps_nvme_poll(&nvme, 0) == PS_HAL_BUSY);
    }
    uint32_t id = world.first[0] >> 16 & 0xffff;
    uint32_t at = world.icq_tail, phase = world.icq_phase;
    complete(&world, world.icq, at, phase, 0, id, 0);
    CHECK(ps_nvme_poll(&nvme, 0) == PS_HAL_BUSY);
    complete(&world, world.icq, at, phase, 1, id + 1, 0);
    CHECK(ps_nvme_poll(&nvme, 0) == PS_HAL_BUSY);
    complete(&world, world.icq, at, !phase, 1, id, 0);
    CHECK(ps_nvme_poll(&nvme, 0) == PS_HAL_BUSY);
    memset(world.memory + 0x3000, 0xff, PAGE);
    CHECK(ps_nvme_poll(&nvme, 0) == PS_HAL_BUSY);
    complete_io(&world, id, 0); /* at last the true one */
    CHECK(finish(0) == PS_HAL_DONE);
    memset(world.memory + 0x3000, 0xff, PAGE);
    CHECK(gather(0, 2) == PS_HAL_TIMEOUT);
    world.silent = false;
    check_alive();
}

/* Someone on the target's bus changes the command or the list while it is under way. */
static void test_changed(void)
{
    static const uint32_t places[] = {0x4000, 0x4000 + 8 * 98, 0x2000 + 64 + 24, 0x2000 + 64 + 48};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        bring_up();
        world.silent = true;
        CHECK(ps_nvme_start(&nvme, 0, pages[0], 100) == PS_HAL_BUSY);
        while (world.commands < 2) {
            CHECK(ps_nvme_poll(&nvme, 0) == PS_HAL_BUSY);
        }
        world.memory[places[i] + 1] ^= 0x10;
        complete_io(&world, world.first[0] >> 16 & 0xffff, 0);
        CHECK(finish(0) == PS_HAL_REFUSED);
        world.silent = false;
        check_alive();
    }
    bring_up();
    world.silent = true; /* what lies behind a list is nobody's business */
    CHECK(ps_nvme_start(&nvme, 0, pages[0], 100) == PS_HAL_BUSY);
    while (world.commands < 2) {
        CHECK(ps_nvme_poll(&nvme, 0) == PS_HAL_BUSY);
    }
    world.memory[0x4000 + 8 * 99] ^= 1;
    complete_io(&world, world.first[0] >> 16 & 0xffff, 0);
    CHECK(finish(0) == PS_HAL_DONE);
}

/* Controllers that do not come up. */
static void test_broken(void)
{
    static const uint64_t caps[] = {
        UINT64_C(0x004018200f010010), /* queues too short */
        UINT64_C(0x004018290f0107ff), /* doorbells beyond the window */
        UINT64_C(0x004118200f0107ff), /* no pages of 4096 bytes */
        0,
    };
    for (size_t i = 0; i < sizeof caps / sizeof *caps; i++) {
        begin();
        world.cap = caps[i];
        CHECK(gather(0, 1) == PS_HAL_TIMEOUT && world.enabled == 0);
    }
    begin();
    world.stuck = true;
    CHECK(gather(0, 1) == PS_HAL_TIMEOUT);
    world.stuck = false;
    check_alive();
    world.endless = world.silent = true;
    CHECK(gather(0, 1) == PS_HAL_TIMEOUT);
    CHECK(gather(0, 1) == PS_HAL_TIMEOUT);
    world.endless = world.silent = false;
    check_alive();
    begin();
    world.admin_status = 0x102; /* Invalid Queue Size */
    CHECK(gather(0, 1) == PS_HAL_TIMEOUT);
    bring_up();
    world.csts = 0; /* disabled behind our back */
    world.silent = true;
    CHECK(gather(0, 1) == PS_HAL_TIMEOUT);
    world.silent = false;
    check_alive();
}

int main(void)
{
    world.memory = aligned_alloc(PAGE, PS_NVME_MEMORY_SIZE);
    if (world.memory == NULL) {
        return 2;
    }
    test_pages();
    test_stride();
    test_misuse();
    test_many();
    test_data_error();
    test_blocked();
    test_link();
    test_generation();
    test_timeout();
    test_late();
    test_hostile_completions();
    test_changed();
    test_broken();
    free(world.memory);
    printf("nvme: %d checks passed, %d failed\n", passed, failed);
    return failed == 0 ? 0 : 1;
}
