/* The model behind nvme_model.h. */
#include "nvme_model.h"

#include <stdlib.h>

int passed, failed;
model world;
ps_nvme nvme;
uint64_t pages[PS_HAL_BUFFERS_MAX][GATHER_MAX];

void check(bool holds, const char *condition, const char *file, int line)
{
    if (holds) {
        passed++;
    } else {
        failed++;
        printf("%s:%d: not so: %s\n", file, line, condition);
    }
}

/* ---- the controller ---- */

static uint64_t load(const model *m, uint64_t bus)
{
    uint64_t value;
    memcpy(&value, m->memory + (bus - MEMORY_AT), 8);
    return value;
}

void complete(model *m, uint64_t queue, uint32_t slot, uint32_t phase, uint32_t sqid, uint32_t id,
              uint32_t status)
{
    uint64_t half = (uint64_t)sqid << 16 | (uint64_t)id << 32 | (uint64_t)phase << 48 |
                    (uint64_t)status << 49;
    memcpy(m->memory + (queue - MEMORY_AT) + 16 * slot + 8, &half, 8);
}

void complete_io(model *m, uint32_t id, uint32_t status)
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

static bool is_hole(const model *m, uint64_t address)
{
    bool found = false;
    for (uint32_t i = 0; i < HOLES_MAX; i++) {
        found |= address == m->holes[i];
    }
    return found;
}

/* Lays a page into its place on the drive; of a hole, zeros. */
static void land(model *m, uint64_t block, uint64_t address)
{
    uint64_t *page = m->landing + block / 8 * (PAGE / 8);
    bool hole = is_hole(m, address);
    page[0] = hole ? 0 : m->content[0];
    page[1] = hole ? 0 : m->content[1];
    page[PAGE / 8 - 1] = hole ? 0 : m->content[2];
}

/* Gathers as a controller would: pages by PRP entries and list. */
static void fetch_gather(model *m, const uint64_t command[8])
{
    memcpy(m->first, command, sizeof m->first);
    uint32_t count = (uint32_t)((m->first[6] & 0xffff) + 1) / 8;
    m->gathered_count = count;
    m->gathered[0] = m->first[3];
    for (uint32_t i = 1; i < count; i++) {
        m->gathered[i] = count == 2 ? m->first[4] : load(m, m->first[4] + 8 * (i - 1));
    }
    for (uint32_t i = 0; i < count; i++) {
        land(m, m->first[5] + 8 * i, m->gathered[i]);
    }
    m->commands++;
}

/* Fetches a list of one descriptor: a proof. Nothing but a comparison of one block may come of
 * it. */
static uint32_t fetch_list(model *m, const uint64_t command[8])
{
    uint32_t i = m->proofs++ % GATHER_MAX;
    CHECK((command[0] & 0xff) == 5 && command[0] >> 32 == 1 && command[6] == 0);
    CHECK(command[4] == (UINT64_C(3) << 60 | 16) && command[5] < 2 * GATHER_MAX * 8);
    m->proven[i] = command[3];
    m->proof_ids[i] = command[0] >> 16 & 0xffff;
    return is_hole(m, command[3]) ? TRANSFER_ERROR : m->proof_status;
}

static void fetch(model *m, uint64_t at)
{
    uint64_t command[8];
    for (uint32_t i = 0; i < 8; i++) {
        command[i] = load(m, at + 8 * i);
    }
    bool proof = (command[0] >> 14 & 3) == 1;
    uint32_t status = m->status;
    if (proof) {
        status = fetch_list(m, command);
    } else {
        fetch_gather(m, command);
    }
    if (!(proof ? m->silent_proofs : m->silent)) {
        complete_io(m, command[0] >> 16 & 0xffff, status);
    }
}

static void io_bell(model *m, uint32_t tail)
{
    while (m->isq != 0 && m->isq_head != tail) {
        fetch(m, m->isq + 64 * m->isq_head);
        m->isq_head = (m->isq_head + 1) % m->isq_size;
    }
}

void reset(model *m)
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

void begin(void)
{
    uint8_t *memory = world.memory;
    uint64_t *landing = world.landing;
    memset(memory, 0xff, PS_NVME_MEMORY_SIZE);
    memset(landing, 0, LANDING_SIZE);
    /* CAP of QEMU: queues of 2048 entries, contiguous, time-out 7.5 s, stride 0. */
    world = (model){.memory = memory, .landing = landing, .memory_at = MEMORY_AT,
                    .generation = 1, .cap = UINT64_C(0x004018200f0107ff),
                    .proof_status = LENGTH_INVALID, .content = {1, 1, 1}};
    ps_nvme_port port = {.context = &world, .memory = memory, .buffers = 2,
                         .landing = (const uint8_t *)landing,
                         .gather_max = GATHER_MAX, .gather_timeout_us = TIMEOUT_US,
                         .now_us = model_now, .bus_start = model_start, .bus_poll = model_poll};
    ps_nvme_init(&nvme, &port);
    for (uint32_t b = 0; b < PS_HAL_BUFFERS_MAX; b++) {
        for (uint32_t i = 0; i < GATHER_MAX; i++) {
            pages[b][i] = UINT64_C(0x100000000) * (b + 1) + UINT64_C(4096) * (3 * i + 7);
        }
    }
}

ps_hal_state finish(uint32_t buffer)
{
    for (uint32_t polls = 0; polls < 1000000; polls++) {
        ps_hal_state state = ps_nvme_poll(&nvme, buffer);
        if (state != PS_HAL_BUSY) {
            return state;
        }
    }
    printf("a gather has no end\n");
    exit(2);
}

ps_hal_state gather(uint32_t buffer, uint32_t count)
{
    ps_hal_state state = ps_nvme_start(&nvme, buffer, pages[buffer], count);
    return state == PS_HAL_BUSY ? finish(buffer) : state;
}

void bring_up(void)
{
    begin();
    CHECK(gather(0, 2) == PS_HAL_DONE);
}

void check_alive(void)
{
    CHECK(gather(1, 3) == PS_HAL_DONE);
    CHECK(world.gathered_count == 3 && world.gathered[2] == pages[1][2]);
}
