/* What of the board "riscv-virt" needs no such board: its reader of device trees, hostile ones
 * too, and its random bytes. Runs on the host.
 *
 *     make -C firmware check
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "board/riscv-virt/board.h"

enum { TREE_MAX = 4096, STRUCTURE_AT = 64, STRINGS_AT = 3072 };

static int passed, failed;

#define CHECK(condition) check((condition), #condition, __LINE__)
static void check(bool holds, const char *condition, int line)
{
    if (holds) {
        passed++;
    } else {
        failed++;
        printf("test_board.c:%d: not so: %s\n", line, condition);
    }
}

/* ---- a tree ---- */

static uint8_t tree[TREE_MAX];
static uint32_t structure, strings;

static void put32(uint32_t at, uint32_t value)
{
    for (uint32_t i = 0; i < 4; i++) {
        tree[at + i] = (uint8_t)(value >> (24 - 8 * i));
    }
}

static void token(uint32_t value)
{
    put32(STRUCTURE_AT + structure, value);
    structure += 4;
}

static void bytes(const void *data, size_t size)
{
    memcpy(tree + STRUCTURE_AT + structure, data, size);
    structure += (uint32_t)(size + 3) & ~3u;
}

static void node(const char *name)
{
    token(1);
    bytes(name, strlen(name) + 1);
}

static void end(void)
{
    token(2);
}

static void header(const char *name, size_t size)
{
    token(3);
    token((uint32_t)size);
    token(strings);
    memcpy(tree + STRINGS_AT + strings, name, strlen(name) + 1);
    strings += (uint32_t)strlen(name) + 1;
}

static void cells(const char *name, const uint32_t *values, size_t count)
{
    header(name, 4 * count);
    for (size_t i = 0; i < count; i++) {
        token(values[i]);
    }
}

static void text(const char *name, const char *value, size_t size)
{
    header(name, size);
    bytes(value, size);
}

static void device(const char *name, const char *model, size_t size, uint32_t address)
{
    node(name);
    cells("reg", (const uint32_t[]){0, address, 0, 0x1000}, 4);
    text("compatible", model, size);
    end();
}

/* The tree of QEMU 7.2, as far as the board looks at it. Returns its size. */
static uint32_t make_tree(bool with_seed)
{
    static const uint8_t seed[BOARD_SEED_SIZE] = "0123456789abcdef0123456789abcde";
    static const uint32_t ranges[] = {
        0x01000000, 0, 0,          0, 0x03000000, 0, 0x10000,    /* ports */
        0x02000000, 0, 0x40000000, 0, 0x40000000, 0, 0x40000000, /* 32 bits */
        0x03000000, 4, 0,          4, 0,          4, 0,          /* 64 bits */
    };
    memset(tree, 0, sizeof tree);
    structure = strings = 0;
    node("");
    node("chosen");
    if (with_seed) {
        text("rng-seed", (const char *)seed, sizeof seed);
    }
    end();
    node("memory@80000000");
    cells("reg", (const uint32_t[]){0, 0x80000000, 0, 0x4000000}, 4);
    end();
    node("cpus");
    cells("timebase-frequency", (const uint32_t[]){10000000}, 1);
    end();
    node("soc");
    device("serial@10000000", "ns16550a", 9, 0x10000000);
    device("test@100000", "sifive,test1\0sifive,test0\0syscon", 33, 0x100000);
    token(4);
    node("pci@30000000");
    cells("ranges", ranges, sizeof ranges / sizeof *ranges);
    cells("reg", (const uint32_t[]){0, 0x30000000, 0, 0x10000000}, 4);
    text("compatible", "pci-host-ecam-generic", 22);
    end();
    device("clint@2000000", "sifive,clint0\0riscv,clint0", 27, 0x2000000);
    end();
    end();
    token(9);
    put32(0, 0xd00dfeed);
    put32(4, STRINGS_AT + strings);
    put32(8, STRUCTURE_AT);
    put32(12, STRINGS_AT);
    put32(32, strings);
    put32(36, structure);
    return STRINGS_AT + strings;
}

/* ---- what is tested ---- */

static void test_tree(void)
{
    board_machine machine;
    make_tree(true);
    CHECK(fdt_read(&machine, tree));
    CHECK(machine.ecam == 0x30000000 && machine.ecam_size == 0x10000000);
    CHECK(machine.window == UINT64_C(0x400000000) && machine.window_size == UINT64_C(0x400000000));
    CHECK(machine.uart == 0x10000000 && machine.finisher == 0x100000);
    CHECK(machine.clint == 0x2000000 && machine.timebase_hz == 10000000);
    CHECK(machine.ram == 0x80000000 && machine.ram_size == 0x4000000);
    CHECK(machine.seed != NULL && memcmp(machine.seed, "0123456789abcdef", 16) == 0);
    make_tree(false);
    CHECK(fdt_read(&machine, tree) && machine.seed == NULL && machine.ecam == 0x30000000);
    tree[0] ^= 1;
    CHECK(!fdt_read(&machine, tree) && !fdt_read(&machine, NULL));
}

/* A seed that is too short is none, and a window that the bus sees elsewhere is none. */
static void test_unfit(void)
{
    board_machine machine;
    make_tree(true);
    for (uint32_t at = STRUCTURE_AT; at < STRUCTURE_AT + structure; at += 4) {
        if (memcmp(tree + at, "0123", 4) == 0) {
            put32(at - 8, BOARD_SEED_SIZE - 1);
            break;
        }
    }
    CHECK(fdt_read(&machine, tree) && machine.seed == NULL);
    make_tree(true);
    for (uint32_t at = STRUCTURE_AT; at < STRUCTURE_AT + structure; at += 4) {
        if (memcmp(tree + at, "\3\0\0\0\0\0\0\4", 8) == 0) {
            put32(at + 4, 5);
        }
    }
    CHECK(fdt_read(&machine, tree) && machine.window == 0);
}

/* Reads a copy that ends where the blob ends, so that the sanitizer sees a byte too many. */
static void read_copy(uint32_t size)
{
    board_machine machine;
    uint8_t *copy = malloc(size);
    if (copy == NULL) {
        exit(2);
    }
    memcpy(copy, tree, size);
    bool read = fdt_read(&machine, copy);
    CHECK(!read || machine.seed == NULL ||
          (machine.seed >= copy && machine.seed + BOARD_SEED_SIZE <= copy + size));
    free(copy);
}

static void test_hostile(void)
{
    uint32_t state = 1;
    for (uint32_t round = 0; round < 20000; round++) {
        uint32_t size = make_tree(true);
        for (uint32_t change = 0; change <= round % 4; change++) {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            /* The header's total is the blob's true size: the machine's maker says so. */
            uint32_t at = 8 + state % (STRUCTURE_AT + structure - 8);
            tree[at] = (uint8_t)(state >> 16);
        }
        read_copy(size);
    }
    for (uint32_t size = 0; size < structure; size++) { /* ends in the midst of anything */
        uint32_t whole = make_tree(true);
        put32(36, size);
        read_copy(whole);
    }
    for (uint32_t size = 0; size < strings; size++) {
        uint32_t whole = make_tree(true);
        put32(32, size);
        read_copy(whole);
    }
}

static void test_entropy(void)
{
    uint8_t seed[BOARD_SEED_SIZE] = "the same seed";
    uint8_t draws[3][BOARD_SEED_SIZE], again[BOARD_SEED_SIZE];
    static const uint8_t zeros[BOARD_SEED_SIZE];
    entropy_init(seed);
    CHECK(memcmp(seed, zeros, sizeof seed) == 0); /* wiped where it lay */
    for (int i = 0; i < 3; i++) {
        entropy_draw(draws[i]);
        CHECK(memcmp(draws[i], zeros, sizeof zeros) != 0);
    }
    CHECK(memcmp(draws[0], draws[1], sizeof zeros) != 0);
    CHECK(memcmp(draws[1], draws[2], sizeof zeros) != 0);
    memcpy(seed, "the same seed", 14);
    entropy_init(seed);
    entropy_draw(again);
    CHECK(memcmp(again, draws[0], sizeof again) == 0); /* of the seed and nothing else */
    memcpy(seed, "another  seed", 14);
    entropy_init(seed);
    entropy_draw(again);
    CHECK(memcmp(again, draws[0], sizeof again) != 0);
}

int main(void)
{
    test_tree();
    test_unfit();
    test_hostile();
    test_entropy();
    printf("board: %d checks passed, %d failed\n", passed, failed);
    return failed == 0 ? 0 : 1;
}
