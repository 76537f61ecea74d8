/* See ps_xdma.h. */
#define _GNU_SOURCE
#include "ps_xdma.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

enum { BUFFERS = 2, MARK_BYTES = 8 };

#define PAGE ((size_t)PS_XDMA_PAGE_BYTES)
#define BUFFER_BYTES (PAGE * PS_XDMA_TRANSFER_PAGES)

static_assert(sizeof(off_t) == sizeof(int64_t), "AXI addresses need a 64-bit off_t");

struct ps_xdma_channel {
    int descriptor;
    ps_xdma_call call;
    uint8_t *buffers; /* BUFFERS of them, one behind the other */
    size_t current;
    /* Stands at both ends of each page before a transfer. A page that still has it was not
     * written, whatever the driver says, and would show what the buffer held before. */
    uint8_t mark[MARK_BYTES];
};

static int64_t system_pread(int descriptor, void *buffer, size_t bytes, int64_t offset) {
    return pread(descriptor, buffer, bytes, offset);
}

ps_xdma_channel *ps_xdma_new(int descriptor, ps_xdma_call call) {
    ps_xdma_channel *channel = calloc(1, sizeof *channel);
    if (channel == NULL) {
        return NULL;
    }
    channel->descriptor = descriptor;
    channel->call = call == NULL ? system_pread : call;
    channel->buffers = aligned_alloc(PAGE, BUFFERS * BUFFER_BYTES);
    if (channel->buffers == NULL ||
        getrandom(channel->mark, MARK_BYTES, 0) != (ssize_t)MARK_BYTES) {
        ps_xdma_free(channel);
        return NULL;
    }
    return channel;
}

void ps_xdma_free(ps_xdma_channel *channel) {
    if (channel != NULL) {
        free(channel->buffers);
        free(channel);
    }
}

void ps_xdma_rest(ps_xdma_channel *channel) {
    channel->current = (channel->current + 1) % BUFFERS;
}

static void put_marks(const ps_xdma_channel *channel, uint8_t *page) {
    memcpy(page, channel->mark, MARK_BYTES);
    memcpy(page + PAGE - MARK_BYTES, channel->mark, MARK_BYTES);
}

static bool is_written(const ps_xdma_channel *channel, const uint8_t *page) {
    return memcmp(page, channel->mark, MARK_BYTES) != 0 &&
           memcmp(page + PAGE - MARK_BYTES, channel->mark, MARK_BYTES) != 0;
}

/* How many pages follow each other from addresses[0] on. */
static size_t run_length(const uint64_t *addresses, size_t count) {
    size_t length = 1;
    while (length < count && addresses[length] == addresses[0] + length * PAGE) {
        length++;
    }
    return length;
}

/* One transfer of `length` pages. Returns how many came whole; if none, *error says why. */
static size_t transfer(const ps_xdma_channel *channel, uint64_t address, size_t length,
                       uint8_t *pages, int *error) {
    uint8_t *buffer = channel->buffers + channel->current * BUFFER_BYTES;
    for (size_t page = 0; page < length; page++) {
        put_marks(channel, buffer + page * PAGE);
    }
    errno = 0;
    int64_t bytes = channel->call(channel->descriptor, buffer, length * PAGE, (int64_t)address);
    if (bytes < 0) {
        *error = errno == 0 ? EIO : errno;
        return 0;
    }
    size_t came = (size_t)bytes / PAGE;
    if (came > length) { /* a driver that has lost count */
        *error = EIO;
        return 0;
    }
    size_t whole = 0;
    while (whole < came && is_written(channel, buffer + whole * PAGE)) {
        whole++;
    }
    *error = whole < came ? ESTALE : 0;
    memcpy(pages, buffer, whole * PAGE);
    return whole;
}

void ps_xdma_read(ps_xdma_channel *channel, const uint64_t *addresses, size_t count,
                  size_t transfer_pages, uint8_t *pages, ps_xdma_result *result) {
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (transfer_pages > PS_XDMA_TRANSFER_PAGES) {
        transfer_pages = PS_XDMA_TRANSFER_PAGES;
    }
    *result = (ps_xdma_result){0};
    while (result->done < count && result->asked == 0) {
        size_t at = result->done;
        if (addresses[at] == UINT64_MAX) {
            result->done++;
            continue;
        }
        size_t most = count - at < transfer_pages ? count - at : transfer_pages;
        size_t length = run_length(addresses + at, most);
        size_t whole =
            transfer(channel, addresses[at], length, pages + at * PAGE, &result->error);
        result->done += whole;
        /* A short count is progress: the next transfer says what is wrong with the rest. */
        result->asked = whole == 0 ? length : 0;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}
