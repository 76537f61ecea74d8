/* The card's side of the mailbox (docs/spec/card-link.md); section numbers refer to it. */
#include "core.h"

enum { PATIENCE_US = 10000 /* 4.4 */, CHECKED_SIZE = offsetof(ps_link_submission, check) };

static_assert(offsetof(ps_link_completion, check) == CHECKED_SIZE, "one place for both checks");

static const uint8_t *host_field(const ps_card *card, size_t offset)
{
    return card->hal->mailbox + PS_LINK_HOST_AT + offset;
}

static size_t slot_of(uint32_t sequence)
{
    return (sequence - 1) % PS_LINK_SLOTS;
}

/* ---- 3: start and session ---- */

void ps_link_show(const ps_card *card)
{
    ps_mailbox_write(card->hal->mailbox + PS_LINK_CARD_AT, &card->page,
                     sizeof card->page / sizeof(uint64_t));
}

void ps_link_open(ps_card *card)
{
    uint8_t *mailbox = card->hal->mailbox;
    ps_link_show(card);
    ps_mailbox_fill(mailbox + PS_LINK_COMPLETIONS_AT, 0,
                    PS_LINK_SLOTS * sizeof(ps_link_completion));
    ps_mailbox_fill(mailbox + PS_LINK_LOG_AT, 0, PS_LINK_LOG_SIZE);
    /* A session that stands there already was meant for the start before this one (3.5). */
    card->page.refused = ps_mailbox_load64(host_field(card, offsetof(ps_link_host, session)));
}

void ps_link_announce(ps_card *card)
{
    card->page.version_min = PS_LINK_VERSION;
    card->page.version_max = PS_LINK_VERSION;
    card->page.state = PS_LINK_STATE_READY;
    card->page.engine = card->hal->limits.engine;
    card->page.firmware = PS_FIRMWARE_VERSION;
    ps_link_show(card);
    card->page.magic = PS_LINK_CARD_MAGIC;
    ps_link_show(card);
}

/* 3.4: nothing of the session before is left. */
static void forget(ps_card *card)
{
    card->job.abandoned = true;
    card->map.count = 0;
    card->numbers.odd = false;
    card->entry.odd = false;
    card->page.session = 0;
    card->page.completed = 0;
    card->page.state = PS_LINK_STATE_READY;
    ps_link_show(card); /* before the session that comes: the host looks at `completed` then */
}

static void refuse(ps_card *card, uint64_t session, const char *why, uint64_t what)
{
    card->page.refused = session;
    ps_card_log_number(card, why, what);
}

void ps_link_watch(ps_card *card)
{
    uint64_t session = ps_mailbox_load64(host_field(card, offsetof(ps_link_host, session)));
    bool none = session == 0 || session == card->page.refused;
    if (session == card->page.session || (card->page.session == 0 && none)) {
        return;
    }
    forget(card);
    if (session == 0) {
        ps_card_log(card, "session ended");
        return;
    }
    ps_link_host page;
    ps_mailbox_read(&page, host_field(card, 0), sizeof page / sizeof(uint64_t));
    if (page.session != session) {
        return; /* in the midst of being written: the next turn looks again */
    }
    if (page.magic != PS_LINK_HOST_MAGIC) {
        refuse(card, session, "session refused: magic ", page.magic);
    } else if (page.version != PS_LINK_VERSION) {
        refuse(card, session, "session refused: version ", page.version);
    } else {
        card->page.session = session;
        ps_card_log_number(card, "session ", session);
    }
}

/* ---- 4: commands ---- */

/* Whether something odd has been so for so long that it is not in the midst of being written. */
static bool run_out(const ps_card *card, ps_patience *patience)
{
    uint64_t now_us = card->hal->now_us(card->hal->context);
    if (!patience->odd) {
        *patience = (ps_patience){true, now_us};
    }
    return now_us - patience->since_us >= PATIENCE_US;
}

/* 4.1. `submitted` may be 0 already for a session that is about to be written. */
bool ps_link_pending(ps_card *card)
{
    if (card->page.session == 0 || card->page.state != PS_LINK_STATE_READY) {
        return false;
    }
    uint32_t submitted = ps_mailbox_load32(host_field(card, offsetof(ps_link_host, submitted)));
    if (submitted >= card->page.completed && submitted - card->page.completed <= PS_LINK_SLOTS) {
        card->numbers.odd = false;
        return submitted != card->page.completed;
    }
    if (run_out(card, &card->numbers)) {
        card->job.abandoned = true;
        card->page.state = PS_LINK_STATE_FAULT;
        ps_card_log_number(card, "fault: the host's last submission is ", submitted);
    }
    return false;
}

ps_taken ps_link_take(ps_card *card, ps_link_submission *submission)
{
    uint32_t sequence = card->page.completed + 1;
    const uint8_t *from = card->hal->mailbox + PS_LINK_SUBMISSIONS_AT +
                          slot_of(sequence) * sizeof *submission;
    ps_mailbox_read(submission, from, sizeof *submission / sizeof(uint64_t));
    if (submission->sequence == sequence && submission->session == card->page.session &&
        submission->check == ps_crc32c(submission, CHECKED_SIZE)) {
        card->entry.odd = false;
        return PS_TAKEN_WHOLE;
    }
    if (!run_out(card, &card->entry)) {
        return PS_TAKEN_NOT_YET;
    }
    card->entry.odd = false;
    card->page.torn++;
    ps_card_log_number(card, "torn: submission ", sequence);
    return PS_TAKEN_TORN;
}

void ps_link_complete(ps_card *card, ps_link_completion *completion)
{
    uint32_t sequence = card->page.completed + 1;
    completion->sequence = sequence;
    completion->session = card->page.session;
    completion->boot = card->page.boot;
    completion->check = ps_crc32c(completion, CHECKED_SIZE);
    ps_mailbox_write(card->hal->mailbox + PS_LINK_COMPLETIONS_AT +
                         slot_of(sequence) * sizeof *completion,
                     completion, sizeof *completion / sizeof(uint64_t));
    card->page.completed = sequence;
    card->page.resets = card->hal->engine_resets(card->hal->context);
    ps_link_show(card);
}

uint8_t *ps_link_data(const ps_card *card)
{
    size_t slot = slot_of(card->job.command.sequence);
    return card->hal->mailbox + PS_LINK_DATA_AT + slot * PS_LINK_SLOT_SIZE;
}
