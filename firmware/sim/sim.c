/* The board: clock, entropy, log, and an engine that copies pages out of a file. */
#define _GNU_SOURCE
#include "sim.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

enum { TICK_US = 20 /* of the clock of one's own */ };

sim *sim_on_bus;

/* ---- clock, entropy, log ---- */

static uint64_t real_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

uint64_t sim_now_us(void *context)
{
    sim *board = context;
    return board->own_clock ? board->clock_us += TICK_US : real_us() - board->epoch_us;
}

static void idle(void *context, uint32_t us)
{
    sim *board = context;
    if (board->own_clock) {
        board->clock_us += us;
    } else {
        usleep(us);
    }
}

static bool entropy(void *context, uint8_t seed[PS_SECRET_SIZE])
{
    sim *board = context;
    if (board->secret != NULL) {
        memcpy(seed, board->secret, PS_SECRET_SIZE);
        board->secret = NULL;
        return true;
    }
    return !board->no_entropy && getrandom(seed, PS_SECRET_SIZE, 0) == PS_SECRET_SIZE;
}

static void write_log(void *context, const char *line)
{
    sim *board = context;
    if (board->log != NULL) {
        fprintf(board->log, "card: %s\n", line);
        fflush(board->log);
    }
}

static void kick(void *context)
{
    sim *board = context;
    board->kicked_us = sim_now_us(board);
}

/* ---- the engine ---- */

/* The page at a bus address, into `page`. */
static ps_hal_state fetch(sim *board, uint64_t address, uint8_t *page, size_t size)
{
    if (sim_page_refused(board, address)) {
        return PS_HAL_REFUSED;
    }
    for (uint32_t i = 0; i < board->regions_count; i++) {
        const ps_link_region *region = &board->regions[i];
        if (address >= region->gpa && address - region->gpa <= region->length - PS_PAGE_SIZE) {
            uint64_t offset = region->offset + (address - region->gpa);
            ssize_t got = pread(board->ram, page, size, (off_t)offset);
            return got == (ssize_t)size ? PS_HAL_DONE : PS_HAL_LINK_DOWN;
        }
    }
    return PS_HAL_REFUSED; /* nobody answers on the bus */
}

static ps_hal_state deliver(sim *board, uint32_t buffer, size_t size)
{
    const sim_flight *flight = &board->flights[buffer];
    for (uint32_t i = 0; i < flight->count; i++) {
        uint8_t *page = board->landing[buffer] + (size_t)i * PS_PAGE_SIZE;
        ps_hal_state state = fetch(board, flight->addresses[i], page, size);
        if (state != PS_HAL_DONE) {
            return state;
        }
    }
    return PS_HAL_DONE;
}

static bool is_misused(const sim *board, uint32_t buffer, const uint64_t *addresses,
                       uint32_t count)
{
    bool misused = buffer >= board->hal.limits.buffers || count == 0 ||
                   count > board->hal.limits.gather_max || board->flights[buffer].active;
    for (uint32_t i = 0; !misused && i < count; i++) {
        misused = addresses[i] % PS_PAGE_SIZE != 0;
    }
    return misused;
}

static ps_hal_state gather_start(void *context, uint32_t buffer, const uint64_t *addresses,
                                 uint32_t count)
{
    sim *board = context;
    if (is_misused(board, buffer, addresses, count)) {
        return PS_HAL_MISUSED;
    }
    sim_flight *flight = &board->flights[buffer];
    uint64_t number = ++board->gathers;
    if (sim_gather_meets(board, SIM_CRASH, number)) {
        _exit(SIM_CRASH_STATUS);
    }
    if (sim_link_is_down(board, number)) {
        return PS_HAL_LINK_DOWN;
    }
    if (sim_gather_meets(board, SIM_BLOCKED, number)) {
        return PS_HAL_BLOCKED;
    }
    if (flight->late) { /* into a buffer that is somebody else's now */
        deliver(board, buffer, PS_PAGE_SIZE);
    }
    *flight = (sim_flight){.active = true, .number = number, .count = count};
    flight->started_us = sim_now_us(board);
    memcpy(flight->addresses, addresses, count * sizeof *addresses);
    return PS_HAL_BUSY;
}

/* How a gather ends that the engine answers. */
static ps_hal_state complete(sim *board, uint32_t buffer)
{
    const sim_flight *flight = &board->flights[buffer];
    if (sim_gather_meets(board, SIM_ENGINE_RESET, flight->number)) {
        board->resets++;
        return PS_HAL_REFUSED;
    }
    if (sim_gather_meets(board, SIM_STALE_COMPLETION, flight->number)) {
        return PS_HAL_DONE;
    }
    bool half = sim_gather_meets(board, SIM_HALF_PAGE, flight->number);
    return deliver(board, buffer, half ? PS_PAGE_SIZE / 2 : PS_PAGE_SIZE);
}

static ps_hal_state gather_poll(void *context, uint32_t buffer)
{
    sim *board = context;
    if (buffer >= board->hal.limits.buffers || !board->flights[buffer].active) {
        return PS_HAL_MISUSED;
    }
    sim_flight *flight = &board->flights[buffer];
    ps_hal_state state;
    bool late = sim_gather_meets(board, SIM_LATE_COMPLETION, flight->number);
    if (sim_link_is_down(board, flight->number)) {
        state = PS_HAL_LINK_DOWN;
    } else if (late || sim_gather_meets(board, SIM_LOST_DOORBELL, flight->number)) {
        if (sim_now_us(board) - flight->started_us < board->hal.limits.gather_timeout_us) {
            return PS_HAL_BUSY;
        }
        flight->late = late;
        board->resets++;
        state = PS_HAL_TIMEOUT;
    } else if (!flight->looked_at) {
        flight->looked_at = true;
        return PS_HAL_BUSY;
    } else {
        state = complete(board, buffer);
    }
    flight->active = false;
    return state;
}

static uint8_t *landing(void *context, uint32_t buffer)
{
    sim *board = context;
    return board->landing[buffer];
}

static uint64_t engine_resets(void *context)
{
    sim *board = context;
    return board->resets;
}

static const uint8_t *window(void *context, uint64_t offset)
{
    sim *board = context;
    return board->window == NULL || board->link_down ? NULL : board->window + offset;
}

/* ---- */

bool sim_open(sim *board, uint32_t engine, int ram, uint64_t ram_size, uint8_t *mailbox)
{
    memset(board, 0, sizeof *board);
    board->ram = ram;
    board->ram_size = ram_size;
    board->epoch_us = real_us();
    board->hal = (ps_hal){
        .context = board,
        .limits = {engine, PS_HAL_GATHER_MAX, PS_HAL_BUFFERS_MAX, SIM_TIMEOUT_US, 0},
        .mailbox = mailbox,
        .now_us = sim_now_us,
        .idle = idle,
        .entropy = entropy,
        .log = write_log,
        .kick = kick,
        .gather_start = gather_start,
        .gather_poll = gather_poll,
        .landing = landing,
        .engine_resets = engine_resets,
        .window = window,
    };
    bool ready = true;
    for (uint32_t i = 0; i < PS_HAL_BUFFERS_MAX; i++) {
        board->landing[i] = aligned_alloc(PS_PAGE_SIZE, PS_HAL_GATHER_MAX * PS_PAGE_SIZE);
        ready &= board->landing[i] != NULL;
    }
    if (engine == PS_LINK_ENGINE_WINDOW) {
        board->hal.limits.window_size = ram_size;
        void *mapped = mmap(NULL, ram_size, PROT_READ, MAP_SHARED, ram, 0);
        ready &= mapped != MAP_FAILED;
        board->window = mapped == MAP_FAILED ? NULL : mapped;
    }
    return ready;
}

void sim_close(sim *board)
{
    for (uint32_t i = 0; i < PS_HAL_BUFFERS_MAX; i++) {
        free(board->landing[i]);
    }
    if (board->window != NULL) {
        munmap((void *)(uintptr_t)board->window, board->ram_size);
    }
}

void sim_start(sim *board)
{
    if (board->regions_count == 0) {
        board->regions[board->regions_count++] = (ps_link_region){0, board->ram_size, 0};
    }
    memset(board->flights, 0, sizeof board->flights);
    sim_on_bus = board;
    board->kicked_us = sim_now_us(board);
    ps_card_init(&board->card, &board->hal);
}

bool sim_turn(sim *board)
{
    sim_on_bus = board;
    if (!sim_hangs(board)) {
        return ps_card_turn(&board->card);
    }
    if (sim_now_us(board) - board->kicked_us < SIM_WATCHDOG_US) {
        return false;
    }
    sim_start(board);
    ps_card_log(&board->card, "started anew by the watchdog");
    return true;
}
