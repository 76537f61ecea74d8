/* Random bytes: a SHAKE256 ratchet from the seed that the machine's maker left in the device tree
 * (QEMU draws it of the host's generator, anew at every reset). Each draw forgets the state it came
 * from, so a state that leaks later tells nothing of keys drawn before. */
#include "board.h"
#include "ps_internal.h"

static uint8_t state[BOARD_SEED_SIZE];

static void wipe(uint8_t *bytes, size_t size)
{
    for (volatile uint8_t *byte = bytes; byte < bytes + size; byte++) {
        *byte = 0;
    }
}

/* state = SHAKE256(label || input): so two uses of the same bytes have nothing in common. */
static void absorb(char label, const uint8_t input[BOARD_SEED_SIZE], uint8_t *output, size_t size)
{
    uint8_t message[] = "pyscan card entropy ?0123456789abcdef0123456789abcdef";
    enum { LABEL_AT = sizeof "pyscan card entropy " - 1 };
    message[LABEL_AT] = (uint8_t)label;
    for (size_t i = 0; i < BOARD_SEED_SIZE; i++) {
        message[LABEL_AT + 1 + i] = input[i];
    }
    ps_shake256(message, LABEL_AT + 1 + BOARD_SEED_SIZE, output, size);
    wipe(message, sizeof message);
}

void entropy_init(uint8_t *seed)
{
    absorb('0', seed, state, sizeof state);
    wipe(seed, BOARD_SEED_SIZE);
}

void entropy_draw(uint8_t seed[BOARD_SEED_SIZE])
{
    uint8_t output[2 * BOARD_SEED_SIZE];
    absorb('1', state, output, sizeof output);
    for (size_t i = 0; i < BOARD_SEED_SIZE; i++) {
        seed[i] = output[i];
        state[i] = output[BOARD_SEED_SIZE + i];
    }
    wipe(output, sizeof output);
}
