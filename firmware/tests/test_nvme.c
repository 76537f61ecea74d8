/* The NVMe driver against a model of a controller, with faults. Runs on the host.
 *
 *     make -C firmware check
 */
#include <stdlib.h>

#include "nvme_model.h"

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
    for (int i = 0; i < ENTRIES * 2; i++) {
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
    for (uint32_t i = 0; i < 10 * ENTRIES; i++) {
        good &= ps_nvme_start(&nvme, 0, pages[0], 1 + i % GATHER_MAX) == PS_HAL_BUSY;
        good &= ps_nvme_start(&nvme, 1, pages[1], 1 + i % 7) == PS_HAL_BUSY;
        good &= finish(i % 2) == PS_HAL_DONE && finish(1 - i % 2) == PS_HAL_DONE;
    }
    CHECK(good);
    CHECK(world.commands == 20 * ENTRIES && world.proofs == 0 && world.enabled == 1);
    CHECK(world.accesses < world.commands + world.commands / 8 + 32);
}

static void test_data_error(void)
{
    bring_up();
    world.status = 0x4; /* Data Transfer Error, figure 126 */
    CHECK(gather(0, 5) == PS_HAL_REFUSED);
    world.status = TRANSFER_ERROR; /* the same, with Do Not Retry */
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
    memset(world.memory + COMPLETIONS, 0xff, PAGE);
    CHECK(ps_nvme_poll(&nvme, 0) == PS_HAL_BUSY);
    complete_io(&world, id, 0); /* at last the true one */
    CHECK(finish(0) == PS_HAL_DONE);
    memset(world.memory + COMPLETIONS, 0xff, PAGE);
    CHECK(gather(0, 2) == PS_HAL_TIMEOUT);
    world.silent = false;
    check_alive();
}

/* Someone on the target's bus changes the command or the list while it is under way. */
static void test_changed(void)
{
    static const uint32_t places[] = {LISTS, LISTS + 8 * 98, SUBMISSIONS + 64 + 24,
                                      SUBMISSIONS + 64 + 48};
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
    world.memory[LISTS + 8 * 99] ^= 1;
    complete_io(&world, world.first[0] >> 16 & 0xffff, 0);
    CHECK(finish(0) == PS_HAL_DONE);
}

/* Controllers that do not come up. */
static void test_broken(void)
{
    static const uint64_t caps[] = {
        UINT64_C(0x004018200f0103fe), /* queues too short */
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
    world.landing = aligned_alloc(PAGE, LANDING_SIZE);
    if (world.memory == NULL || world.landing == NULL) {
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
    test_proofs();
    free(world.memory);
    free(world.landing);
    printf("nvme: %d checks passed, %d failed\n", passed, failed);
    return failed == 0 ? 0 : 1;
}
