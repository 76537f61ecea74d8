/* pyscan-card-sim: the firmware's core as a program, for tests of the host's side. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "sim.h"

enum { IDLE_US = 100, USAGE_STATUS = 2, FAILED_STATUS = 3 };

static volatile sig_atomic_t ended, link_down;

static void on_signal(int number)
{
    if (number == SIGUSR1 || number == SIGUSR2) {
        link_down = number == SIGUSR1;
    } else {
        ended = 1;
    }
}

static void help(FILE *to)
{
    fputs("usage: pyscan-card-sim --mailbox FILE --ram FILE [--engine dma|window]\n"
          "           [--map GPA:LENGTH:OFFSET]... [--fault KIND[:FIRST[:COUNT]]]...\n"
          "\n"
          "The card's firmware on this machine. It serves the mailbox, a file of 8 MiB that is\n"
          "made when it is missing, and reads the target's memory out of --ram, until SIGTERM.\n"
          "\n"
          "  --engine dma     pages are gathered at bus addresses; --map says where each lies in\n"
          "                   the file, and without any the file begins at address 0 (default)\n"
          "  --engine window  the file is a window; offsets come with the host's memory map\n"
          "  --fault          a fault; gathers and submissions are counted from 1:\n",
          to);
    sim_help(to);
    fputs("\n"
          "SIGUSR1 takes the link between card and target down, SIGUSR2 brings it back. The log\n"
          "goes to standard error. Exit status: 0 after SIGTERM, 2 usage, 3 a file, 70 a crash.\n",
          to);
}

static int fail(int status, const char *what, const char *which)
{
    fprintf(stderr, "pyscan-card-sim: %s: %s\n", what, which);
    return status;
}

static uint8_t *open_mailbox(const char *path)
{
    struct stat facts;
    void *mapped = MAP_FAILED;
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (file >= 0 && fstat(file, &facts) == 0) {
        bool fits = facts.st_size == PS_LINK_MAILBOX_SIZE ||
                    (facts.st_size == 0 && ftruncate(file, PS_LINK_MAILBOX_SIZE) == 0);
        if (fits) {
            mapped = mmap(NULL, PS_LINK_MAILBOX_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        } else if (facts.st_size != 0) {
            errno = EINVAL;
        }
    }
    if (file >= 0) {
        close(file);
    }
    return mapped == MAP_FAILED ? NULL : mapped;
}

typedef struct {
    const char *mailbox, *ram;
    uint32_t engine;
} options;

/* The exit status, or -1 to go on. Maps and faults go to `board`. */
static int read_options(int argc, char **argv, options *given, sim *board)
{
    static const struct option known[] = {
        {"mailbox", required_argument, NULL, 'm'}, {"ram", required_argument, NULL, 'r'},
        {"engine", required_argument, NULL, 'e'},  {"map", required_argument, NULL, 'a'},
        {"fault", required_argument, NULL, 'f'},   {"help", no_argument, NULL, 'h'},
        {NULL, 0, NULL, 0},
    };
    int option;
    while ((option = getopt_long(argc, argv, "", known, NULL)) != -1) {
        bool window = option == 'e' && strcmp(optarg, "window") == 0;
        if (option == 'h') {
            help(stdout);
            return EXIT_SUCCESS;
        } else if (option == 'm') {
            given->mailbox = optarg;
        } else if (option == 'r') {
            given->ram = optarg;
        } else if (option == 'e' && (window || strcmp(optarg, "dma") == 0)) {
            given->engine = window ? PS_LINK_ENGINE_WINDOW : PS_LINK_ENGINE_DMA;
        } else if (!(option == 'a' && sim_add_region(board, optarg)) &&
                   !(option == 'f' && sim_add_fault(board, optarg))) {
            return fail(USAGE_STATUS, "not an option of it, see --help", argv[optind - 1]);
        }
    }
    if (optind != argc || given->mailbox == NULL || given->ram == NULL) {
        return fail(USAGE_STATUS, "wanted", "--mailbox FILE --ram FILE, and options; see --help");
    }
    return -1;
}

static void watch_signals(void)
{
    static const int watched[] = {SIGTERM, SIGINT, SIGUSR1, SIGUSR2};
    struct sigaction action = {.sa_handler = on_signal};
    for (size_t i = 0; i < sizeof watched / sizeof *watched; i++) {
        sigaction(watched[i], &action, NULL);
    }
}

static void run(sim *board)
{
    board->log = stderr;
    sim_start(board);
    while (!ended) {
        board->link_down = link_down;
        if (!sim_turn(board)) {
            board->hal.idle(board, IDLE_US);
        }
    }
}

int main(int argc, char **argv)
{
    static sim asked, board;
    options given = {NULL, NULL, PS_LINK_ENGINE_DMA};
    int status = read_options(argc, argv, &given, &asked);
    if (status >= 0) {
        return status;
    }
    watch_signals();
    struct stat facts;
    int ram = open(given.ram, O_RDONLY | O_CLOEXEC);
    if (ram < 0 || fstat(ram, &facts) != 0 || facts.st_size < PS_PAGE_SIZE) {
        return fail(FAILED_STATUS, "cannot read a page of RAM", given.ram);
    }
    uint8_t *mailbox = open_mailbox(given.mailbox);
    if (mailbox == NULL) {
        return fail(FAILED_STATUS, "the mailbox must be a file of 8 MiB", given.mailbox);
    }
    uint64_t ram_size = (uint64_t)facts.st_size / PS_PAGE_SIZE * PS_PAGE_SIZE;
    if (!sim_open(&board, given.engine, ram, ram_size, mailbox)) {
        return fail(FAILED_STATUS, "no memory for", given.ram);
    }
    board.regions_count = asked.regions_count;
    memcpy(board.regions, asked.regions, sizeof board.regions);
    board.faults_count = asked.faults_count;
    memcpy(board.faults, asked.faults, sizeof board.faults);
    run(&board);
    sim_close(&board);
    munmap(mailbox, PS_LINK_MAILBOX_SIZE);
    close(ram);
    return EXIT_SUCCESS;
}
