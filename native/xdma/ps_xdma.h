/* Reading through one card-to-host channel of AMD's XDMA driver (dma_ip_drivers,
 * XDMA/linux-kernel/xdma).
 *
 * Nothing but pread(2) is used: the driver's read_iter, which readv, preadv, libaio and
 * io_uring lead to, takes the wrong offsets (cdev_sgdma.c, cdev_aio_read). The driver waits
 * interruptibly and stops the engine when a signal comes, so all signals are blocked
 * meanwhile. Data lands in a buffer of the channel, aligned to a page, and is copied from
 * there: the caller's buffer may have any address, and no transfer that the driver has given
 * up can write into it later.
 *
 * A channel is for one thread at a time. What a failure means is the caller's to say.
 */
#ifndef PS_XDMA_H
#define PS_XDMA_H

#include <stddef.h>
#include <stdint.h>

/* --- cffi begin --- */

#define PS_XDMA_PAGE_BYTES 4096

/* Most pages of one transfer. */
#define PS_XDMA_TRANSFER_PAGES 512

/* pread(2), or what a test puts in its place; errno says why it returned -1. */
typedef int64_t (*ps_xdma_call)(int descriptor, void *buffer, size_t bytes, int64_t offset);

typedef struct ps_xdma_channel ps_xdma_channel;

typedef struct {
    size_t done;  /* pages that came whole, from the first one on; what is skipped counts */
    size_t asked; /* pages of the transfer that stopped the read; 0 when nothing did */
    int error;    /* its errno, 0 at the end of a file, ESTALE when it left a page unwritten */
} ps_xdma_result;

/* A channel that reads an open descriptor, which stays the caller's. `call` NULL is pread(2).
 * NULL when there is no memory. */
ps_xdma_channel *ps_xdma_new(int descriptor, ps_xdma_call call);

void ps_xdma_free(ps_xdma_channel *channel);

/* Read the pages at AXI `addresses` into `pages`, up to the first that fails.
 *
 * Pages that follow each other are one transfer, of `transfer_pages` at most. An address of
 * UINT64_MAX is skipped, and its page in `pages` left alone. */
void ps_xdma_read(ps_xdma_channel *channel, const uint64_t *addresses, size_t count,
                  size_t transfer_pages, uint8_t *pages, ps_xdma_result *result);

/* Take the other buffer from now on. After a timeout the engine may still be writing: the
 * buffer rests until the next one. */
void ps_xdma_rest(ps_xdma_channel *channel);

/* --- cffi end --- */

#endif
