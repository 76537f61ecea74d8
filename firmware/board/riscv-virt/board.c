/* The card on QEMU's "virt": what is in which slot, and the ps_hal over it. */
#include "board.h"

/* Slots of the card's bus. */
enum { SLOT_MAILBOX = 2, SLOT_LANDING = 3, SLOT_ENGINE = 4, SLOT_WINDOW = 5 };

enum {
    GATHER_TIMEOUT_US = 500000,
    LANDING_SIZE_MIN = PS_HAL_BUFFERS_MAX * BOARD_PAGE
};

static struct {
    board_machine machine;
    pci_memory mailbox, landing, engine, window;
    link_bus bus;
    ps_nvme nvme;
    uint32_t gather_max;
    const char *told; /* the last fault of the engine that was told */
    const char *news; /* one that was not */
} board;

/* First byte behind what the firmware uses; link.ld. */
extern uint8_t ps_stack_top[];

/* ---- ps_hal ---- */

static uint64_t now_us(void *context)
{
    (void)context;
    return timer_us();
}

static void idle(void *context, uint32_t us)
{
    (void)context;
    timer_sleep(us);
}

static bool entropy(void *context, uint8_t seed[BOARD_SEED_SIZE])
{
    (void)context;
    entropy_draw(seed);
    return true;
}

static void log_line(void *context, const char *line)
{
    (void)context;
    uart_line(line);
}

static void kick(void *context)
{
    (void)context;
    timer_kick();
}

static ps_hal_state gather_start(void *context, uint32_t buffer, const uint64_t *addresses,
                                 uint32_t count)
{
    (void)context;
    return ps_nvme_start(&board.nvme, buffer, addresses, count);
}

static ps_hal_state gather_poll(void *context, uint32_t buffer)
{
    (void)context;
    ps_hal_state state = ps_nvme_poll(&board.nvme, buffer);
    if (state == PS_HAL_DONE) {
        board.told = NULL;
    } else if (state != PS_HAL_BUSY && board.nvme.fault != board.told) {
        board.told = board.news = board.nvme.fault;
    }
    return state;
}

static uint8_t *landing(void *context, uint32_t buffer)
{
    (void)context;
    return board.landing.memory + (uint64_t)buffer * board.gather_max * BOARD_PAGE;
}

static uint64_t engine_resets(void *context)
{
    (void)context;
    return ps_nvme_resets(&board.nvme);
}

static const uint8_t *window(void *context, uint64_t offset)
{
    (void)context;
    bool inside = board.window.size >= BOARD_PAGE && offset <= board.window.size - BOARD_PAGE;
    return inside ? board.window.memory + offset : NULL;
}

/* ---- the engine's ground ---- */

static void bus_start(void *context, const ps_nvme_access *access)
{
    (void)context;
    bus_begin(&board.bus, access);
}

static ps_nvme_reply bus_poll(void *context)
{
    (void)context;
    return bus_answer(&board.bus);
}

static void open_engine(void)
{
    uint64_t pages = board.landing.size / BOARD_PAGE / PS_HAL_BUFFERS_MAX;
    uint8_t seed[BOARD_SEED_SIZE];
    board.gather_max = pages < PS_HAL_GATHER_MAX ? (uint32_t)pages : PS_HAL_GATHER_MAX;
    entropy_draw(seed);
    bus_init(&board.bus, board.mailbox.memory,
             seed[0] | (uint32_t)seed[1] << 8 | (uint32_t)seed[2] << 16 | (uint32_t)seed[3] << 24);
    ps_nvme_port port = {.memory = board.engine.memory,
                         .landing = board.landing.memory,
                         .buffers = PS_HAL_BUFFERS_MAX,
                         .gather_max = board.gather_max,
                         .gather_timeout_us = GATHER_TIMEOUT_US,
                         .now_us = now_us,
                         .bus_start = bus_start,
                         .bus_poll = bus_poll};
    ps_nvme_init(&board.nvme, &port);
}

/* ---- opening ---- */

static const char *open_machine(uint8_t *tree)
{
    board_machine *machine = &board.machine;
    if (!fdt_read(machine, tree)) {
        return "there is no device tree";
    }
    uart_init(machine->uart);
    uint64_t ram_end = machine->ram + machine->ram_size;
    if ((uint64_t)ps_stack_top < machine->ram || (uint64_t)ps_stack_top > ram_end) {
        return "the machine has too little memory";
    }
    if (machine->clint == 0 || machine->finisher == 0 || !timer_init(machine)) {
        return "the machine has no timer or no reset that is known here";
    }
    if (machine->seed == NULL) {
        return "the device tree has no rng-seed, so there can be no key: use QEMU 7.1 or newer";
    }
    entropy_init(machine->seed);
    return NULL;
}

static const char *open_devices(void)
{
    pci_bus bus;
    if (!pci_init(&bus, &board.machine)) {
        return "the machine has no PCI bus that is known here";
    }
    if (!pci_take_memory(&bus, SLOT_MAILBOX, &board.mailbox) ||
        !pci_take_memory(&bus, SLOT_LANDING, &board.landing) ||
        !pci_take_memory(&bus, SLOT_ENGINE, &board.engine) ||
        !pci_take_memory(&bus, SLOT_WINDOW, &board.window)) {
        return "a device in slots 2 to 5 is no ivshmem-plain, or its memory does not fit";
    }
    if (board.mailbox.size != PS_LINK_MAILBOX_SIZE) {
        return "slot 2 has no mailbox of 8 MiB";
    }
    if (board.engine.memory != NULL && board.engine.size < PS_NVME_MEMORY_SIZE) {
        return "engine memory in slot 4 is too small";
    }
    if (board.engine.memory != NULL && board.landing.size < LANDING_SIZE_MIN) {
        return "slot 4 has engine memory, but slot 3 has no landing memory";
    }
    if (board.engine.memory == NULL && board.window.memory == NULL) {
        return "there is neither engine memory in slot 4 nor a window in slot 5";
    }
    return NULL;
}

const char *board_open(ps_hal *hal, uint8_t *tree)
{
    const char *fault = open_machine(tree);
    fault = fault == NULL ? open_devices() : fault;
    if (fault != NULL) {
        return fault;
    }
    bool dma = board.engine.memory != NULL;
    if (dma) {
        open_engine();
    }
    *hal = (ps_hal){
        .limits = {.engine = dma ? PS_LINK_ENGINE_DMA : PS_LINK_ENGINE_WINDOW,
                   .gather_max = dma ? board.gather_max : PS_HAL_GATHER_MAX,
                   .buffers = PS_HAL_BUFFERS_MAX,
                   .gather_timeout_us = GATHER_TIMEOUT_US,
                   .window_size = dma ? 0 : board.window.size},
        .mailbox = board.mailbox.memory,
        .now_us = now_us,
        .idle = idle,
        .entropy = entropy,
        .log = log_line,
        .kick = kick,
        .gather_start = gather_start,
        .gather_poll = gather_poll,
        .landing = landing,
        .engine_resets = engine_resets,
        .window = window,
    };
    return NULL;
}

const char *board_news(void)
{
    const char *news = board.news;
    board.news = NULL;
    return news;
}
