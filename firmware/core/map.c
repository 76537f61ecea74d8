/* The target's memory map (docs/spec/card-link.md, 5.2). */
#include "core.h"

static const uint64_t end_max = UINT64_C(1) << 52;

static bool is_aligned(uint64_t value)
{
    return value % PS_PAGE_SIZE == 0;
}

/* Whether it is one, and lies at or above `lowest`. */
static bool is_region(const ps_link_region *region, uint64_t lowest, uint64_t window_size)
{
    if (!is_aligned(region->gpa) || !is_aligned(region->length) || region->length == 0 ||
        region->length > end_max || region->gpa > end_max - region->length ||
        region->gpa < lowest) {
        return false;
    }
    return window_size == 0 || (is_aligned(region->offset) && region->length <= window_size &&
                                region->offset <= window_size - region->length);
}

bool ps_map_read(ps_map *map, const uint8_t *from, uint32_t count, uint64_t window_size)
{
    uint64_t lowest = 0;
    for (uint32_t i = 0; i < count; i++) {
        ps_link_region *region = &map->regions[i];
        ps_mailbox_read(region, from + i * sizeof *region, sizeof *region / sizeof(uint64_t));
        if (!is_region(region, lowest, window_size)) {
            return false;
        }
        lowest = region->gpa + region->length;
    }
    map->count = count;
    return true;
}

const ps_link_region *ps_map_find(const ps_map *map, uint64_t frame)
{
    if (frame >= end_max / PS_PAGE_SIZE) {
        return NULL;
    }
    uint64_t gpa = frame * PS_PAGE_SIZE;
    uint32_t low = 0, high = map->count; /* the first region that ends above it */
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        const ps_link_region *region = &map->regions[middle];
        if (region->gpa + region->length > gpa) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low < map->count && map->regions[low].gpa <= gpa ? &map->regions[low] : NULL;
}
