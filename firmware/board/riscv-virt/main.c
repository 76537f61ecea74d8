/* The card's program: opens the board, then turns the core's loop for ever. */
#include "board.h"
#include "core/card.h"

/* A card that has just worked expects more: it sleeps only after a while, and then not long, so
 * that a round trip stays short. */
enum { AWAKE_US = 1000, SLEEP_US = 750 };

static ps_card card;
static ps_hal hal;

void ps_board_main(uint8_t *tree);

static void halt(const char *fault)
{
    uart_line("the card does not start:");
    uart_line(fault);
    for (;;) {
        timer_kick();
        __asm__ volatile("wfi");
    }
}

static void turn_for_ever(void)
{
    uint64_t worked_us = timer_us();
    for (;;) {
        timer_kick();
        if (ps_card_turn(&card)) {
            worked_us = timer_us();
        } else if (timer_us() - worked_us > AWAKE_US) {
            timer_sleep(SLEEP_US);
        }
        const char *news = board_news();
        if (news != NULL) {
            ps_card_log(&card, news);
        }
    }
}

void ps_board_main(uint8_t *tree)
{
    const char *fault = board_open(&hal, tree);
    if (fault != NULL) {
        halt(fault);
    }
    ps_card_init(&card, &hal);
    uint64_t address;
    const char *last_words = timer_last_words(&address);
    if (last_words != NULL) {
        ps_card_log_number(&card, last_words, address);
    }
    turn_for_ever();
}
