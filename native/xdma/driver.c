/* Test driver of ps_xdma.c, for sanitizers: a stand-in for pread(2) that follows a script. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ps_xdma.h"

#define PAGE ((size_t)PS_XDMA_PAGE_BYTES)

enum { PAGES = 2000, DESCRIPTOR = 77 };

static struct {
    size_t calls;
    size_t bytes_most;      /* of one call */
    uint64_t bad;           /* a transfer that holds this address fails with `error` */
    int error;              /* -1: returns -1 and leaves errno alone */
    int64_t count;          /* returned in place of the bytes asked for; -1: the truth */
    int64_t written;        /* bytes really written; -1: all */
    bool unaligned;         /* a buffer, address or length was not page aligned */
    bool signals;           /* a signal was not blocked */
    const uint8_t *buffers[2];
} card;

static unsigned passed;
static unsigned failed;

static void check(bool right, const char *what) {
    if (right) {
        passed++;
    } else {
        failed++;
        printf("FAILED: %s\n", what);
    }
}

/* The memory behind the card: every page starts and ends with its address. */
static void fill(uint8_t *page, uint64_t address) {
    memset(page, (int)(address / PAGE % 251), PAGE);
    memcpy(page, &address, sizeof address);
    memcpy(page + PAGE - sizeof address, &address, sizeof address);
}

static bool is_page(const uint8_t *page, uint64_t address) {
    uint8_t expected[PS_XDMA_PAGE_BYTES];
    fill(expected, address);
    return memcmp(page, expected, PAGE) == 0;
}

static int64_t card_read(int descriptor, void *buffer, size_t bytes, int64_t offset) {
    uint64_t address = (uint64_t)offset;
    sigset_t blocked;
    pthread_sigmask(SIG_SETMASK, NULL, &blocked);
    card.signals |= sigismember(&blocked, SIGINT) != 1 || sigismember(&blocked, SIGUSR1) != 1;
    card.unaligned |= (uintptr_t)buffer % PAGE != 0 || bytes % PAGE != 0 || address % PAGE != 0;
    card.bytes_most = bytes > card.bytes_most ? bytes : card.bytes_most;
    card.buffers[card.calls % 2] = buffer;
    card.calls++;
    if (descriptor != DESCRIPTOR) {
        errno = EBADF;
        return -1;
    }
    if (card.error != 0 && card.bad >= address && card.bad - address < bytes) {
        if (card.error > 0) {
            errno = card.error;
        }
        return -1;
    }
    size_t wanted = card.written < 0 ? bytes : (size_t)card.written;
    uint8_t page[PS_XDMA_PAGE_BYTES];
    for (size_t at = 0; at < bytes && at < wanted; at += PAGE) {
        fill(page, address + at);
        memcpy((uint8_t *)buffer + at, page, wanted - at < PAGE ? wanted - at : PAGE);
    }
    return card.count < 0 ? (int64_t)bytes : card.count;
}

static void reset(void) {
    memset(&card, 0, sizeof card);
    card.count = -1;
    card.written = -1;
}

static void test_runs(ps_xdma_channel *channel, uint64_t *addresses, uint8_t *pages) {
    ps_xdma_result result;
    reset();
    for (size_t i = 0; i < PAGES; i++) {
        addresses[i] = ((uint64_t)1 << 40) + i * PAGE;
    }
    ps_xdma_read(channel, addresses, PAGES, PS_XDMA_TRANSFER_PAGES, pages, &result);
    check(result.done == PAGES && result.asked == 0 && result.error == 0, "one long run");
    check(card.calls == (PAGES + PS_XDMA_TRANSFER_PAGES - 1) / PS_XDMA_TRANSFER_PAGES,
          "a run is as few transfers as can be");
    check(card.bytes_most == PAGE * PS_XDMA_TRANSFER_PAGES, "no transfer is too long");
    check(!card.unaligned, "everything is aligned to pages");
    check(!card.signals, "signals are blocked");
    bool right = true;
    for (size_t i = 0; i < PAGES; i++) {
        right = right && is_page(pages + i * PAGE, addresses[i]);
    }
    check(right, "the pages of a long run");
    sigset_t blocked;
    pthread_sigmask(SIG_SETMASK, NULL, &blocked);
    check(sigismember(&blocked, SIGINT) == 0, "the mask is as before");

    reset();
    for (size_t i = 0; i < PAGES; i++) { /* backwards, each third skipped */
        addresses[i] = i % 3 == 0 ? UINT64_MAX : (PAGES - i) * PAGE;
        memset(pages + i * PAGE, 0x5a, PAGE);
    }
    ps_xdma_read(channel, addresses, PAGES, PS_XDMA_TRANSFER_PAGES * 9, pages, &result);
    check(result.done == PAGES && result.asked == 0, "scattered pages");
    right = true;
    for (size_t i = 0; i < PAGES; i++) {
        right = right && (i % 3 == 0 ? pages[i * PAGE] == 0x5a && pages[i * PAGE + 4095] == 0x5a
                                     : is_page(pages + i * PAGE, addresses[i]));
    }
    check(right, "the pages of a scattered read");
    ps_xdma_read(channel, addresses, 0, PS_XDMA_TRANSFER_PAGES, pages, &result);
    check(result.done == 0 && result.asked == 0, "nothing asked");
}

static void test_failures(ps_xdma_channel *channel, uint64_t *addresses, uint8_t *pages) {
    static const int errors[] = {EIO, ETIMEDOUT, EINVAL, EBUSY, EINTR, ENODEV, 512};
    ps_xdma_result result;
    for (size_t i = 0; i < PAGES; i++) {
        addresses[i] = i * PAGE;
    }
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++) {
        reset();
        card.error = errors[i];
        card.bad = 700 * PAGE;
        ps_xdma_read(channel, addresses, PAGES, 512, pages, &result);
        check(result.done == 512 && result.asked == 512 && result.error == errors[i],
              "the transfer that fails is told");
        ps_xdma_read(channel, addresses + 512, 512, 1, pages, &result);
        check(result.done == 188 && result.asked == 1, "page by page up to the bad one");
    }
    reset();
    card.error = -1;
    ps_xdma_read(channel, addresses, 1, 1, pages, &result);
    check(result.done == 0 && result.asked == 1 && result.error == EIO, "no errno is EIO");
    reset();
    card.count = 0;
    ps_xdma_read(channel, addresses, 3, 512, pages, &result);
    check(result.done == 0 && result.asked == 3 && result.error == 0, "end of file");
    reset();
    card.count = (int64_t)PAGE - 1;
    ps_xdma_read(channel, addresses, 3, 512, pages, &result);
    check(result.done == 0 && result.asked == 3, "less than a page is no page");
    reset();
    card.count = (int64_t)PAGE * 2 + 5; /* two pages a transfer, then one, then too many */
    ps_xdma_read(channel, addresses, 5, 3, pages, &result);
    check(result.done == 4 && result.asked == 1 && result.error == EIO && card.calls == 3,
          "short counts are progress, and a count beyond the request is none");
    reset();
    card.count = INT64_MAX;
    ps_xdma_read(channel, addresses, 3, 512, pages, &result);
    check(result.done == 0 && result.error == EIO, "a wild count");
}

static void test_unwritten(ps_xdma_channel *channel, uint64_t *addresses, uint8_t *pages) {
    ps_xdma_result result;
    for (size_t i = 0; i < 8; i++) {
        addresses[i] = i * PAGE;
    }
    reset();
    ps_xdma_read(channel, addresses, 8, 512, pages, &result); /* the buffer holds them now */
    memset(pages, 0x5a, 8 * PAGE);
    card.written = (int64_t)PAGE * 3 + 100;
    ps_xdma_read(channel, addresses, 8, 512, pages, &result);
    check(result.done == 8 && card.calls == 4 && is_page(pages + 3 * PAGE, addresses[3]),
          "a page that was written in part is read again");
    card.written = 0;
    memset(pages, 0x5a, 8 * PAGE);
    ps_xdma_read(channel, addresses, 8, 512, pages, &result);
    check(result.done == 0 && result.asked == 8 && result.error == ESTALE, "nothing written");
    check(pages[0] == 0x5a, "an old page does not come");
    card.written = (int64_t)PAGE - 8;
    ps_xdma_read(channel, addresses, 1, 512, pages, &result);
    check(result.done == 0 && result.error == ESTALE, "a page that ends early");
}

static void test_rest(ps_xdma_channel *channel, uint64_t *addresses, uint8_t *pages) {
    ps_xdma_result result;
    reset();
    addresses[0] = 0;
    ps_xdma_read(channel, addresses, 1, 1, pages, &result);
    ps_xdma_rest(channel);
    ps_xdma_read(channel, addresses, 1, 1, pages, &result);
    check(card.buffers[0] != card.buffers[1], "a buffer that rests is not used");
    ps_xdma_rest(channel);
    const uint8_t *first = card.buffers[0];
    card.calls = 0;
    ps_xdma_read(channel, addresses, 1, 1, pages, &result);
    check(card.buffers[0] == first, "until the other one rests");
}

int main(void) {
    uint64_t *addresses = calloc(PAGES, sizeof *addresses);
    /* Odd, as the caller's buffer may be. */
    uint8_t *memory = malloc(PAGES * PAGE + 1);
    ps_xdma_channel *channel = ps_xdma_new(DESCRIPTOR, card_read);
    if (addresses == NULL || memory == NULL || channel == NULL) {
        puts("no memory");
        return 1;
    }
    test_runs(channel, addresses, memory + 1);
    test_failures(channel, addresses, memory + 1);
    test_unwritten(channel, addresses, memory + 1);
    test_rest(channel, addresses, memory + 1);
    ps_xdma_free(channel);
    ps_xdma_free(NULL);
    free(memory);
    free(addresses);
    printf("%u passed, %u failed\n", passed, failed);
    return failed != 0;
}
