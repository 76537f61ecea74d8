/* The serial line: a 16550, of which QEMU needs no more than the data register. */
#include "board.h"

enum { DATA = 0, LINE_STATUS = 5, TRANSMIT_EMPTY = 0x20, POLLS_MAX = 100000 };

static volatile uint8_t *registers;

void uart_init(uint64_t base)
{
    registers = (volatile uint8_t *)base;
}

/* A byte that the line does not take in time is lost: a log must not stop the card. */
static void put(char byte)
{
    for (int polls = 0; polls < POLLS_MAX; polls++) {
        if (registers[LINE_STATUS] & TRANSMIT_EMPTY) {
            registers[DATA] = (uint8_t)byte;
            return;
        }
    }
}

static void put_text(const char *text)
{
    for (; registers != NULL && *text != '\0'; text++) {
        put(*text);
    }
}

void uart_line(const char *line)
{
    put_text(line);
    put_text("\n");
}
