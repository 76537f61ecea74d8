/* Watch lists: 64-bit values here and there, held against what they should be.
 *
 * Values are compared in blocks under the guard. A block in which all is well costs no more
 * than its loads; in one that holds a hole, a difference or a fault, each value is looked at
 * once more on its own.
 */
#include <string.h>

#include "ps_internal.h"

enum { BLOCK = 512, VALUE_SIZE = 8 };

/* The values of a call from one of them on. */
typedef struct {
    const uint8_t *base;
    size_t length;
    const uint64_t *offsets;
    const uint64_t *expected;
    size_t count;
    ps_watch_fn *compare;
    bool equal; /* out */
} watch_values;

typedef struct {
    uint8_t *statuses;
    uint64_t *indices;
    size_t indices_max;
    ps_tally *tally;
} watch_report;

bool ps_watch_equal_portable(const uint8_t *base, uint64_t offset_max, const uint64_t *offsets,
                             const uint64_t *expected, size_t count)
{
    uint64_t different = 0;
    for (size_t i = 0; i < count; i++) {
        uint64_t value;
        if (offsets[i] > offset_max) {
            return false;
        }
        memcpy(&value, base + offsets[i], sizeof value);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        value = __builtin_bswap64(value);
#endif
        different |= value ^ expected[i];
    }
    return different == 0;
}

static void run_compare(void *job)
{
    watch_values *values = job;
    values->equal = values->compare(values->base, values->length - VALUE_SIZE, values->offsets,
                                    values->expected, values->count);
}

/* False when a load faulted. */
static bool compare_guarded(watch_values *values)
{
    return ps_guard_run(values->base, values->length, run_compare, values);
}

/* The value at the head of `values`, on its own. */
static void compare_one(watch_values one, size_t index, const watch_report *to)
{
    one.count = 1;
    ps_page_status status = PS_PAGE_OK;
    if (one.length < VALUE_SIZE || one.offsets[0] > one.length - VALUE_SIZE) {
        status = PS_PAGE_HOLE;
    } else if (!compare_guarded(&one)) {
        status = PS_PAGE_LINK_DOWN;
    }
    to->statuses[index] = (uint8_t)status;
    if (status == PS_PAGE_OK && one.equal) {
        to->tally->ok++;
        return;
    }
    *(status == PS_PAGE_OK ? &to->tally->mismatched : &to->tally->unreadable) += 1;
    if (to->tally->listed < to->indices_max) {
        to->indices[to->tally->listed++] = index;
    }
}

static void compare_all(watch_values values, size_t count, const watch_report *to)
{
    for (size_t first = 0; first < count; first += values.count) {
        values.count = count - first < BLOCK ? count - first : BLOCK;
        watch_values block = values;
        block.offsets += first;
        block.expected += first;
        block.equal = false;
        if (block.length >= VALUE_SIZE && compare_guarded(&block) && block.equal) {
            memset(to->statuses + first, PS_PAGE_OK, block.count);
            to->tally->ok += block.count;
            continue;
        }
        for (size_t i = 0; i < values.count; i++, block.offsets++, block.expected++) {
            compare_one(block, first + i, to);
        }
    }
}

int ps_watch_compare(const uint8_t *base, size_t base_length, const uint64_t *offsets,
                     const uint64_t *expected, size_t count, uint8_t *statuses,
                     uint64_t *indices, size_t indices_max, ps_tally *tally)
{
    bool per_value = base != NULL && offsets != NULL && expected != NULL && statuses != NULL;
    bool lists = tally != NULL && (indices_max == 0 || indices != NULL);
    if ((count > 0 && !per_value) || !lists || base_length > UINTPTR_MAX - (uintptr_t)base) {
        return PS_ERR_ARGUMENT;
    }
    *tally = (ps_tally){0};
    int result = ps_guard_install();
    if (result == PS_OK) {
        const watch_values values = {base,     base_length, offsets,
                                     expected, 0,           ps_dispatch_watch(), false};
        compare_all(values, count, &(watch_report){statuses, indices, indices_max, tally});
    }
    return result;
}
