/* A reader of flattened device trees that is as small as this board allows. Every offset and
 * length is checked against the blob. */
#include "board.h"

#define MAGIC UINT32_C(0xd00dfeed)

enum { SIZE_MAX_BYTES = 1 << 21, HEADER_SIZE = 40 };
enum { BEGIN_NODE = 1, END_NODE = 2, PROPERTY = 3, NOP = 4 };

typedef struct {
    uint8_t *structure;
    const uint8_t *strings;
    uint32_t structure_size, strings_size;
} tree_view;

/* A token of the structure block. */
typedef struct {
    uint32_t kind;
    const char *name; /* of a node or property */
    uint8_t *data;    /* of a property */
    uint32_t length;
} token;

static uint32_t get32(const uint8_t *at)
{
    return (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
}

static uint64_t get64(const uint8_t *at)
{
    return (uint64_t)get32(at) << 32 | get32(at + 4);
}

static bool equal(const char *left, const char *right)
{
    while (*left != '\0' && *left == *right) {
        left++;
        right++;
    }
    return *left == *right;
}

/* Length of a string that ends within `room` bytes, or `room`. */
static uint32_t length_of(const uint8_t *text, uint32_t room)
{
    uint32_t length = 0;
    while (length < room && text[length] != '\0') {
        length++;
    }
    return length;
}

/* Reads the token at *at and moves behind it; false at the end, or when the tree is broken. */
static bool next_token(const tree_view *tree, uint32_t *at, token *found)
{
    uint32_t room = tree->structure_size - *at;
    uint8_t *here = tree->structure + *at;
    if (room < 4) {
        return false;
    }
    *found = (token){.kind = get32(here)};
    uint32_t size = 4;
    if (found->kind == BEGIN_NODE) {
        uint32_t length = length_of(here + 4, room - 4);
        found->name = (const char *)here + 4;
        size += length + 1;
    } else if (found->kind == PROPERTY) {
        if (room < 12) {
            return false;
        }
        uint32_t name = get32(here + 8);
        found->length = get32(here + 4);
        found->data = here + 12;
        if (found->length > room - 12 || name >= tree->strings_size ||
            length_of(tree->strings + name, tree->strings_size - name) ==
                tree->strings_size - name) {
            return false;
        }
        found->name = (const char *)tree->strings + name;
        size = 12 + found->length;
    } else if (found->kind != END_NODE && found->kind != NOP) {
        return false;
    }
    size = (size + 3) & ~3u;
    if (size > room) {
        return false;
    }
    *at += size;
    return true;
}

/* A property of the node whose first token is at `node`, with at least `length` bytes. */
static uint8_t *property(const tree_view *tree, uint32_t node, const char *name, uint32_t length)
{
    token found;
    while (next_token(tree, &node, &found) && (found.kind == PROPERTY || found.kind == NOP)) {
        if (found.kind == PROPERTY && equal(found.name, name)) {
            return found.length >= length ? found.data : NULL;
        }
    }
    return NULL;
}

/* Whether "compatible" of a node holds `model`. */
static bool compatible(const tree_view *tree, uint32_t node, const char *model)
{
    token found;
    while (next_token(tree, &node, &found) && (found.kind == PROPERTY || found.kind == NOP)) {
        if (found.kind != PROPERTY || !equal(found.name, "compatible")) {
            continue;
        }
        for (uint32_t at = 0; at < found.length;) {
            uint32_t length = length_of(found.data + at, found.length - at);
            if (at + length < found.length && equal((const char *)found.data + at, model)) {
                return true;
            }
            at += length + 1;
        }
    }
    return false;
}

/* Whether a node's name is `name`, before its unit address. */
static bool named(const char *node, const char *name)
{
    while (*name != '\0' && *node == *name) {
        node++;
        name++;
    }
    return *name == '\0' && (*node == '\0' || *node == '@');
}

/* The first node with that model or, where `model` is NULL, that name; 0: none. */
static uint32_t find_node(const tree_view *tree, const char *model, const char *name)
{
    token found;
    uint32_t at = 0;
    while (next_token(tree, &at, &found)) {
        if (found.kind == BEGIN_NODE &&
            (model != NULL ? compatible(tree, at, model) : named(found.name, name))) {
            return at;
        }
    }
    return 0;
}

/* Address and size of a node's first "reg", two cells each as on this machine. */
static void get_reg(const tree_view *tree, uint32_t node, uint64_t *address, uint64_t *size)
{
    const uint8_t *reg = node != 0 ? property(tree, node, "reg", 16) : NULL;
    if (reg != NULL) {
        *address = get64(reg);
        *size = get64(reg + 8);
    }
}

/* The 64-bit memory window: PCI bus binding to Open Firmware, 2.2.1.1; seven cells an entry. */
static void get_window(const tree_view *tree, uint32_t node, board_machine *machine)
{
    enum { ENTRY = 28, SPACE_MASK = 0x03000000, SPACE_64 = 0x03000000 };
    token found;
    while (next_token(tree, &node, &found) && (found.kind == PROPERTY || found.kind == NOP)) {
        if (found.kind != PROPERTY || !equal(found.name, "ranges")) {
            continue;
        }
        for (uint32_t at = 0; at + ENTRY <= found.length; at += ENTRY) {
            const uint8_t *entry = found.data + at;
            /* Bus and machine must call the same byte by the same address. */
            if ((get32(entry) & SPACE_MASK) == SPACE_64 && get64(entry + 4) == get64(entry + 12)) {
                machine->window = get64(entry + 12);
                machine->window_size = get64(entry + 20);
            }
        }
    }
}

static bool open_tree(tree_view *view, uint8_t *tree)
{
    if (tree == NULL || get32(tree) != MAGIC) {
        return false;
    }
    uint32_t total = get32(tree + 4), structure = get32(tree + 8), strings = get32(tree + 12);
    *view = (tree_view){.structure = tree + structure,
                        .strings = tree + strings,
                        .structure_size = get32(tree + 36),
                        .strings_size = get32(tree + 32)};
    return total >= HEADER_SIZE && total <= SIZE_MAX_BYTES && structure % 4 == 0 &&
           structure <= total && view->structure_size <= total - structure && strings <= total &&
           view->strings_size <= total - strings;
}

bool fdt_read(board_machine *machine, uint8_t *blob)
{
    tree_view tree;
    uint64_t size;
    *machine = (board_machine){0};
    if (!open_tree(&tree, blob)) {
        return false;
    }
    uint32_t pci = find_node(&tree, "pci-host-ecam-generic", NULL);
    get_reg(&tree, pci, &machine->ecam, &machine->ecam_size);
    if (pci != 0) {
        get_window(&tree, pci, machine);
    }
    get_reg(&tree, find_node(&tree, "ns16550a", NULL), &machine->uart, &size);
    get_reg(&tree, find_node(&tree, "riscv,clint0", NULL), &machine->clint, &size);
    get_reg(&tree, find_node(&tree, "sifive,test0", NULL), &machine->finisher, &size);
    get_reg(&tree, find_node(&tree, NULL, "memory"), &machine->ram, &machine->ram_size);
    uint32_t cpus = find_node(&tree, NULL, "cpus"), chosen = find_node(&tree, NULL, "chosen");
    uint8_t *timebase = cpus != 0 ? property(&tree, cpus, "timebase-frequency", 4) : NULL;
    machine->timebase_hz = timebase != NULL ? get32(timebase) : 0;
    machine->seed = chosen != 0 ? property(&tree, chosen, "rng-seed", BOARD_SEED_SIZE) : NULL;
    return true;
}
