/* The memory map: regions that are none, and where holes begin. */
#include <stdlib.h>
#include <string.h>

#include "host.h"

#define TOP (UINT64_C(1) << 52)

typedef struct {
    const char *what;
    bool dma, window; /* whether it is a map with that engine */
    uint32_t count;
    ps_link_region regions[2];
} map_case;

static const map_case cases[] = {
    {"a page", true, true, 1, {{0, PAGE, 0}}},
    {"two that touch", true, true, 2, {{0, PAGE, 0}, {PAGE, PAGE, PAGE}}},
    {"two of the same offset", true, true, 2, {{0, PAGE, 0}, {PAGE, PAGE, 0}}},
    {"up to the top", true, true, 1, {{TOP - PAGE, PAGE, 0}}},
    {"beyond the top", false, false, 1, {{TOP - PAGE, 2 * PAGE, 0}}},
    {"at the top", false, false, 1, {{TOP, PAGE, 0}}},
    {"beyond 64 bits", false, false, 1, {{UINT64_MAX - PAGE + 1, PAGE, 0}}},
    {"longer than all", false, false, 1, {{0, UINT64_MAX - PAGE + 1, 0}}},
    {"all there can be", true, false, 1, {{0, TOP, 0}}},
    {"no length", false, false, 1, {{0, 0, 0}}},
    {"address within a page", false, false, 1, {{8, PAGE, 0}}},
    {"length within a page", false, false, 1, {{0, PAGE + 8, 0}}},
    {"overlapping", false, false, 2, {{0, 2 * PAGE, 0}, {PAGE, PAGE, 0}}},
    {"descending", false, false, 2, {{PAGE, PAGE, 0}, {0, PAGE, 0}}},
    {"twice", false, false, 2, {{PAGE, PAGE, 0}, {PAGE, PAGE, 0}}},
    {"offset within a page", true, false, 1, {{0, PAGE, 8}}},
    {"last page of the window", true, true, 1, {{0, PAGE, (RAM_PAGES - 1) * PAGE}}},
    {"beyond the window", true, false, 1, {{0, 2 * PAGE, (RAM_PAGES - 1) * PAGE}}},
    {"offset beyond 64 bits", true, false, 1, {{0, 2 * PAGE, UINT64_MAX - PAGE + 1}}},
};

static uint64_t pages_mapped(const ps_map *map)
{
    uint64_t pages = 0;
    for (uint32_t i = 0; i < map->count; i++) {
        pages += map->regions[i].length / PAGE;
    }
    return pages;
}

static void test_cases(uint32_t engine)
{
    bench *on = bench_open(engine);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const map_case *one = &cases[i];
        bool good = engine == PS_LINK_ENGINE_DMA ? one->dma : one->window;
        bench_begin(on);
        check(bench_map(on, one->regions, one->count) == (good ? PS_LINK_OK : PS_LINK_BAD_ARGUMENT),
              one->what, __FILE__, __LINE__);
        /* one that is none leaves the map as it was */
        CHECK(good ? on->board.card.map.count == one->count
                   : pages_mapped(&on->board.card.map) == RAM_PAGES);
    }
    CHECK(bench_map(on, cases[0].regions, 0) == PS_LINK_OK);
    CHECK(on->board.card.map.count == 0);
    bench_close(on);
}

/* Each second page of the first thousand, as many regions as there can be. */
static void test_most(void)
{
    static ps_link_region regions[PS_LINK_REGIONS_MAX];
    bench *on = bench_open(PS_LINK_ENGINE_DMA);
    for (uint64_t i = 0; i < PS_LINK_REGIONS_MAX; i++) {
        regions[i] = (ps_link_region){(2 * i + 1) * PAGE, PAGE, 0};
    }
    bench_begin(on);
    CHECK(bench_map(on, regions, PS_LINK_REGIONS_MAX) == PS_LINK_OK);
    const ps_map *map = &on->board.card.map;
    bool right = true;
    for (uint64_t frame = 0; frame < 2 * PS_LINK_REGIONS_MAX + 2; frame++) {
        const ps_link_region *found = ps_map_find(map, frame);
        bool inside = frame % 2 == 1 && frame < 2 * PS_LINK_REGIONS_MAX;
        right &= inside ? found != NULL && found->gpa == frame * PAGE : found == NULL;
    }
    CHECK(right);
    bench_close(on);
}

static void test_edges(void)
{
    static ps_map map = {2, {{PAGE, 2 * PAGE, 0}, {TOP - PAGE, PAGE, 0}}};
    static const uint64_t frames[] = {0, 1, 2, 3, TOP / PAGE - 2, TOP / PAGE - 1, TOP / PAGE,
                                      TOP, UINT64_MAX / PAGE, UINT64_MAX};
    static const bool inside[] = {false, true,  true,  false, false,
                                  true,  false, false, false, false};
    for (size_t i = 0; i < sizeof frames / sizeof *frames; i++) {
        CHECK((ps_map_find(&map, frames[i]) != NULL) == inside[i]);
    }
    map.count = 0;
    CHECK(ps_map_find(&map, 1) == NULL);
}

void test_map(void)
{
    test_cases(PS_LINK_ENGINE_DMA);
    test_cases(PS_LINK_ENGINE_WINDOW);
    test_most();
    test_edges();
}
