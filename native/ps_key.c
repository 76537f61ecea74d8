/* Where a key lives: pages of its own that are locked, left out of core dumps, zero in a
 * forked child, read-only once filled, and wiped before they are given back. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>

#include "ps_internal.h"

/* Both live only here: the secret must never lie in memory that can be swapped or dumped. */
typedef struct {
    struct ps_key key;
    uint8_t secret[PS_SECRET_SIZE];
} key_memory;

static bool draw_secret(uint8_t *secret)
{
    ssize_t drawn;
    do {
        drawn = getrandom(secret, PS_SECRET_SIZE, 0);
    } while (drawn < 0 && errno == EINTR);
    return drawn == PS_SECRET_SIZE;
}

static bool protect(key_memory *memory)
{
    return mlock(memory, sizeof *memory) == 0 &&
           madvise(memory, sizeof *memory, MADV_DONTDUMP) == 0 &&
           madvise(memory, sizeof *memory, MADV_WIPEONFORK) == 0;
}

static void release(key_memory *memory)
{
    mprotect(memory, sizeof *memory, PROT_READ | PROT_WRITE);
    explicit_bzero(memory, sizeof *memory);
    munmap(memory, sizeof *memory);
}

ps_key *ps_key_new(int digest, const uint8_t *secret)
{
    if (ps_key_words_size(digest) == 0) {
        errno = EINVAL;
        return NULL;
    }
    key_memory *memory = mmap(NULL, sizeof *memory, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        return NULL;
    }
    bool ready = protect(memory);
    if (ready && secret != NULL) {
        memcpy(memory->secret, secret, PS_SECRET_SIZE);
    } else if (ready) {
        ready = draw_secret(memory->secret);
    }
    if (ready) {
        ps_key_expand(&memory->key, digest, memory->secret);
        explicit_bzero(memory->secret, sizeof memory->secret);
        ready = mprotect(memory, sizeof *memory, PROT_READ) == 0;
    }
    if (!ready) {
        int reason = errno;
        release(memory);
        errno = reason;
        return NULL;
    }
    return &memory->key;
}

void ps_key_free(ps_key *key)
{
    if (key != NULL) {
        release((key_memory *)(void *)key);
    }
}

const uint8_t *ps_key_nh_words(const ps_key *key)
{
    return key != NULL && key->digest == PS_DIGEST_NH4AES ? key->stream : NULL;
}
