/* Zeros that the NVMe driver does not believe without proof. */
#include "nvme_model.h"

/* All pages are zero from now on. */
static void bring_up_zeros(void)
{
    bring_up();
    memset(world.content, 0, sizeof world.content);
}

/* Polls until `proofs` have been fetched in all. */
static void await_proofs(uint32_t buffer, uint32_t proofs)
{
    for (int i = 0; i < 1000 && world.proofs < proofs; i++) {
        CHECK(ps_nvme_poll(&nvme, buffer) == PS_HAL_BUSY);
    }
    CHECK(world.proofs == proofs);
}

static void test_zeros(void)
{
    bring_up_zeros();
    CHECK(gather(0, GATHER_MAX) == PS_HAL_DONE);
    CHECK(world.proofs == GATHER_MAX && memcmp(world.proven, pages[0], sizeof *pages) == 0);
    bool good = true;
    for (uint32_t i = 0; i < 40; i++) {
        good &= ps_nvme_start(&nvme, 0, pages[0], GATHER_MAX - i) == PS_HAL_BUSY;
        good &= ps_nvme_start(&nvme, 1, pages[1], 1 + 11 * i) == PS_HAL_BUSY;
        good &= finish(i % 2) == PS_HAL_DONE && finish(1 - i % 2) == PS_HAL_DONE;
    }
    CHECK(good && world.enabled == 1);
    CHECK(world.accesses < world.proofs / 16);
}

/* One word at an edge is enough not to be taken for zeros. */
static void test_edges(void)
{
    bring_up();
    for (size_t i = 0; i < 3; i++) {
        memset(world.content, 0, sizeof world.content);
        world.content[i] = UINT64_C(1) << 63;
        CHECK(gather(i % 2, 9) == PS_HAL_DONE && world.proofs == 0);
    }
}

/* A page that nothing answers for among others, of which some are zero. */
static void test_hole(void)
{
    for (uint32_t hole = 0; hole < 8; hole++) {
        for (uint64_t content = 0; content < 2; content++) {
            bring_up();
            world.content[0] = world.content[1] = world.content[2] = content;
            world.holes[0] = pages[1][hole];
            CHECK(gather(1, 8) == PS_HAL_REFUSED);
            CHECK(strcmp(nvme.fault, "zeros of a page were not proven") == 0);
            for (uint32_t i = 0; i < 8; i++) { /* as the core repeats it */
                pages[0][0] = pages[1][i];
                CHECK(gather(0, 1) == (i == hole ? PS_HAL_REFUSED : PS_HAL_DONE));
            }
            CHECK(world.enabled == 1);
        }
    }
}

/* After a refusal no more is proven than is under way; that is waited for. */
static void test_hole_of_many(void)
{
    bring_up_zeros();
    world.silent_proofs = true;
    world.holes[0] = pages[0][0];
    CHECK(ps_nvme_start(&nvme, 0, pages[0], GATHER_MAX) == PS_HAL_BUSY);
    for (int i = 0; i < 100; i++) {
        CHECK(ps_nvme_poll(&nvme, 0) == PS_HAL_BUSY);
    }
    uint32_t given = world.proofs;
    CHECK(given > 1 && given < GATHER_MAX);
    complete_io(&world, world.proof_ids[0], TRANSFER_ERROR);
    for (uint32_t i = 1; i < given; i++) {
        CHECK(ps_nvme_poll(&nvme, 0) == PS_HAL_BUSY);
        complete_io(&world, world.proof_ids[i], LENGTH_INVALID);
    }
    CHECK(finish(0) == PS_HAL_REFUSED && world.proofs == given);
    world.silent_proofs = false;
    check_alive();
    CHECK(world.enabled == 1);
}

/* What has read the page proves it, though it be no zeros any more; all else does not. And what
 * has landed stays. */
static void test_answers(void)
{
    static const uint32_t good[] = {0, 0x4285, 0x0d, 0x0e, 0x400f, 0x200f, 0x10, 0x4011};
    static const uint32_t bad[] = {0x01, 0x4002, 0x04, 0x06, 0x07, 0x08, 0x0b, 0x0c, 0x12,
                                   0x80, 0x10f, 0x20f, 0x281, 0x284, 0x70f, 0x7ff};
    bring_up_zeros();
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        world.proof_status = good[i];
        CHECK(gather(0, 5) == PS_HAL_DONE);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        world.proof_status = bad[i];
        CHECK(gather(0, 5) == PS_HAL_REFUSED);
    }
    world.proof_status = LENGTH_INVALID;
    check_alive();
    CHECK(world.enabled == 1);
}

static void test_silent_proofs(void)
{
    bring_up_zeros();
    world.silent_proofs = true;
    uint64_t before = world.now_us;
    CHECK(ps_nvme_start(&nvme, 0, pages[0], 300) == PS_HAL_BUSY);
    CHECK(ps_nvme_start(&nvme, 1, pages[1], 300) == PS_HAL_BUSY);
    CHECK(finish(0) == PS_HAL_TIMEOUT && finish(1) == PS_HAL_TIMEOUT);
    CHECK(world.now_us - before < 2 * TIMEOUT_US && !(world.cc & 1));
    world.silent_proofs = false;
    check_alive();
    CHECK(world.enabled == 2);
}

/* Each proof that is completed gives more time, but not for ever. */
static void test_slow_proofs(void)
{
    for (uint32_t count = 6; count <= 60; count += 54) {
        bring_up_zeros();
        world.silent_proofs = true;
        uint64_t before = world.now_us;
        CHECK(ps_nvme_start(&nvme, 0, pages[0], count) == PS_HAL_BUSY);
        await_proofs(0, count);
        ps_hal_state state = PS_HAL_BUSY;
        for (uint32_t i = 0; i < count && state == PS_HAL_BUSY; i++) {
            world.now_us += TIMEOUT_US / 2;
            complete_io(&world, world.proof_ids[i], LENGTH_INVALID);
            state = ps_nvme_poll(&nvme, 0);
        }
        state = state == PS_HAL_BUSY ? finish(0) : state;
        CHECK(state == (count == 6 ? PS_HAL_DONE : PS_HAL_TIMEOUT));
        CHECK(world.now_us - before > 2 * TIMEOUT_US && world.now_us - before < 5 * TIMEOUT_US);
    }
}

/* Completions that are none of the proofs under way, one of them of the gather itself. */
static void test_hostile_proofs(void)
{
    bring_up_zeros();
    world.silent_proofs = true;
    CHECK(ps_nvme_start(&nvme, 0, pages[0], 3) == PS_HAL_BUSY);
    await_proofs(0, 3);
    uint32_t gathers_id = world.first[0] >> 16 & 0xffff, last = world.proof_ids[2];
    const uint32_t wrong[] = {gathers_id, last + 1, 0, 0xffff, last ^ 0x8000, last + ENTRIES};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        complete(&world, world.icq, world.icq_tail, world.icq_phase, 1, wrong[i], LENGTH_INVALID);
        CHECK(ps_nvme_poll(&nvme, 0) == PS_HAL_BUSY);
    }
    complete(&world, world.icq, world.icq_tail, world.icq_phase, 0, last, LENGTH_INVALID);
    CHECK(ps_nvme_poll(&nvme, 0) == PS_HAL_BUSY);
    complete(&world, world.icq, world.icq_tail, !world.icq_phase, 1, last, LENGTH_INVALID);
    CHECK(ps_nvme_poll(&nvme, 0) == PS_HAL_BUSY);
    complete_io(&world, last, LENGTH_INVALID); /* out of order */
    CHECK(ps_nvme_poll(&nvme, 0) == PS_HAL_BUSY);
    complete(&world, world.icq, world.icq_tail, world.icq_phase, 1, last, LENGTH_INVALID);
    CHECK(ps_nvme_poll(&nvme, 0) == PS_HAL_BUSY); /* twice */
    complete_io(&world, world.proof_ids[0], LENGTH_INVALID);
    for (int i = 0; i < 100; i++) {
        CHECK(ps_nvme_poll(&nvme, 0) == PS_HAL_BUSY);
    }
    complete_io(&world, world.proof_ids[1], LENGTH_INVALID);
    CHECK(finish(0) == PS_HAL_DONE && world.proofs == 3);
}

/* Someone on the target's bus lets the controller prove another page. */
static void test_changed_proof(void)
{
    bring_up_zeros();
    world.silent_proofs = true;
    CHECK(ps_nvme_start(&nvme, 0, pages[0], 2) == PS_HAL_BUSY);
    await_proofs(0, 2);
    world.memory[SUBMISSIONS + 64 * 3 + 24 + 2] ^= 1; /* the second proof's page */
    complete_io(&world, world.proof_ids[0], LENGTH_INVALID);
    CHECK(ps_nvme_poll(&nvme, 0) == PS_HAL_BUSY);
    complete_io(&world, world.proof_ids[1], LENGTH_INVALID);
    CHECK(finish(0) == PS_HAL_REFUSED);
    CHECK(strcmp(nvme.fault, "a command was changed under way") == 0);
}

/* The link was away in the midst of proofs: they are all given again. */
static void test_generation_of_proofs(void)
{
    bring_up_zeros();
    world.silent_proofs = true;
    CHECK(ps_nvme_start(&nvme, 0, pages[0], 20) == PS_HAL_BUSY);
    await_proofs(0, 20);
    complete_io(&world, world.proof_ids[0], LENGTH_INVALID);
    CHECK(ps_nvme_poll(&nvme, 0) == PS_HAL_BUSY);
    reset(&world);
    world.csts = 0;
    world.generation++;
    world.silent_proofs = false;
    uint64_t commands = world.commands;
    CHECK(finish(0) == PS_HAL_DONE && world.proofs == 40 && world.commands == commands);
    CHECK(world.enabled == 2);
}

/* A gather that lasts while the proofs of the other buffer go round the queue: its command is not
 * written over. */
static void test_round_a_gather(void)
{
    bring_up_zeros();
    world.silent = true;
    CHECK(ps_nvme_start(&nvme, 0, pages[0], 50) == PS_HAL_BUSY);
    while (world.commands < 2) {
        CHECK(ps_nvme_poll(&nvme, 0) == PS_HAL_BUSY);
    }
    uint32_t id = world.first[0] >> 16 & 0xffff;
    world.silent = false;
    uint32_t rounds = 0;
    for (ps_hal_state state = PS_HAL_DONE; state == PS_HAL_DONE && rounds < 10; rounds++) {
        state = ps_nvme_start(&nvme, 1, pages[1], GATHER_MAX);
        for (int i = 0; i < 1000 && state == PS_HAL_BUSY; i++) {
            state = ps_nvme_poll(&nvme, 1);
        }
    }
    CHECK(rounds == ENTRIES / GATHER_MAX && world.proofs > ENTRIES - 16 && world.proofs < ENTRIES);
    complete_io(&world, id, 0);
    CHECK(finish(1) == PS_HAL_DONE && finish(0) == PS_HAL_DONE);
    CHECK(world.proofs == rounds * GATHER_MAX + 50 && world.enabled == 1);
}

void test_proofs(void)
{
    test_zeros();
    test_edges();
    test_hole();
    test_hole_of_many();
    test_answers();
    test_silent_proofs();
    test_slow_proofs();
    test_hostile_proofs();
    test_changed_proof();
    test_generation_of_proofs();
    test_round_a_gather();
}
