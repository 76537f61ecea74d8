/* The card's log: to the board, and into the mailbox (docs/spec/card-link.md, 2). */
#include "core.h"

enum { LINE_SIZE = 96, LINES_MAX = 32, SECOND_US = 1000000 };

static size_t append(char line[LINE_SIZE], size_t length, const char *text)
{
    while (*text != '\0' && length < LINE_SIZE - 1) {
        line[length++] = *text++;
    }
    line[length] = '\0';
    return length;
}

static size_t append_number(char line[LINE_SIZE], size_t length, uint64_t number)
{
    char digits[19] = "0x";
    int at = 2, shift = 60;
    while (shift > 0 && number >> shift == 0) {
        shift -= 4;
    }
    for (; shift >= 0; shift -= 4) {
        digits[at++] = "0123456789abcdef"[number >> shift & 15];
    }
    digits[at] = '\0';
    return append(line, length, digits);
}

static void put(ps_card *card, uint8_t byte)
{
    card->hal->mailbox[PS_LINK_LOG_AT + card->page.log_end++ % PS_LINK_LOG_SIZE] = byte;
}

static void write_line(ps_card *card, const char *line)
{
    const ps_hal *hal = card->hal;
    hal->log(hal->context, line);
    while (*line != '\0') {
        put(card, (uint8_t)*line++);
    }
    put(card, '\n');
    ps_link_show(card);
}

/* A host could otherwise keep the card busy with its log. */
static bool allowed(ps_card *card)
{
    uint64_t now_us = card->hal->now_us(card->hal->context);
    if (now_us - card->log_since_us >= SECOND_US) {
        card->log_since_us = now_us;
        card->log_lines = 0;
    }
    if (card->log_lines >= LINES_MAX) {
        card->log_left_out++;
        return false;
    }
    card->log_lines++;
    return true;
}

static void write_allowed(ps_card *card, const char *line)
{
    if (!allowed(card)) {
        return;
    }
    if (card->log_left_out > 0) {
        char missing[LINE_SIZE];
        append_number(missing, append(missing, 0, "lines of log left out: "), card->log_left_out);
        card->log_left_out = 0;
        write_line(card, missing);
    }
    write_line(card, line);
}

void ps_card_log(ps_card *card, const char *text)
{
    char line[LINE_SIZE];
    append(line, 0, text);
    write_allowed(card, line);
}

void ps_card_log_number(ps_card *card, const char *text, uint64_t number)
{
    char line[LINE_SIZE];
    append_number(line, append(line, 0, text), number);
    write_allowed(card, line);
}
