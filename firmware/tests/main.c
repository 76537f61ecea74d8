/* Unit tests of the firmware's core on the host, under sanitizers.
 *
 *     make -C firmware check
 */
#include <stdio.h>
#include <stdlib.h>

#include "host.h"

static int passed, failed;

void check(bool holds, const char *condition, const char *file, int line)
{
    if (holds) {
        passed++;
    } else {
        failed++;
        printf("%s:%d: not so: %s\n", file, line, condition);
    }
}

void require(bool holds, const char *what)
{
    if (!holds) {
        perror(what);
        exit(2);
    }
}

static void run(const char *name, void (*group)(void))
{
    int passed_before = passed, failed_before = failed;
    group();
    printf("%s: %d passed, %d failed\n", name, passed - passed_before, failed - failed_before);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: firmware-tests SHA256-PAGES.json NH4AES-PAGES.json\n");
        return 2;
    }
    run("crc", test_crc);
    test_vectors(argv[1], argv[2]);
    run("link", test_link);
    run("map", test_map);
    run("plan", test_plan);
    run("faults", test_faults);
    run("hostile", test_hostile);
    if (failed > 0) {
        printf("firmware: %d checks passed, %d failed\n", passed, failed);
        return 1;
    }
    printf("firmware: %d checks passed\n", passed);
    return 0;
}
