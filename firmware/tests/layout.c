/* What firmware/ps_link.h says, a line each: "STRUCT.field offset size", "CONSTANT value". */
#include <inttypes.h>
#include <stdio.h>

#include "ps_link.h"

#define FIELD(structure, field)                                                                   \
    printf("%s.%s %zu %zu\n", #structure, #field, offsetof(structure, field),                     \
           sizeof(((structure *)0)->field))
#define CONSTANT(name) printf("%s %" PRIu64 "\n", #name, (uint64_t)(name))

static void print_pages(void)
{
    FIELD(ps_link_host, magic);
    FIELD(ps_link_host, version);
    FIELD(ps_link_host, heartbeat);
    FIELD(ps_link_host, session);
    FIELD(ps_link_host, submitted);
    FIELD(ps_link_host, reserved);
    FIELD(ps_link_card, magic);
    FIELD(ps_link_card, version_min);
    FIELD(ps_link_card, version_max);
    FIELD(ps_link_card, boot);
    FIELD(ps_link_card, session);
    FIELD(ps_link_card, refused);
    FIELD(ps_link_card, completed);
    FIELD(ps_link_card, heartbeat);
    FIELD(ps_link_card, state);
    FIELD(ps_link_card, engine);
    FIELD(ps_link_card, log_end);
    FIELD(ps_link_card, firmware);
    FIELD(ps_link_card, pages);
    FIELD(ps_link_card, unread);
    FIELD(ps_link_card, torn);
    FIELD(ps_link_card, resets);
    FIELD(ps_link_card, reserved);
}

static void print_entries(void)
{
    FIELD(ps_link_submission, sequence);
    FIELD(ps_link_submission, op);
    FIELD(ps_link_submission, flags);
    FIELD(ps_link_submission, count);
    FIELD(ps_link_submission, kinds);
    FIELD(ps_link_submission, session);
    FIELD(ps_link_submission, first);
    FIELD(ps_link_submission, reserved);
    FIELD(ps_link_submission, check);
    FIELD(ps_link_completion, sequence);
    FIELD(ps_link_completion, op);
    FIELD(ps_link_completion, result);
    FIELD(ps_link_completion, count);
    FIELD(ps_link_completion, ok);
    FIELD(ps_link_completion, session);
    FIELD(ps_link_completion, boot);
    FIELD(ps_link_completion, elapsed_us);
    FIELD(ps_link_completion, gathers);
    FIELD(ps_link_completion, reserved);
    FIELD(ps_link_completion, check);
    FIELD(ps_link_region, gpa);
    FIELD(ps_link_region, length);
    FIELD(ps_link_region, offset);
}

static void print_bus(void)
{
    FIELD(ps_link_bus_request, sequence);
    FIELD(ps_link_bus_request, op);
    FIELD(ps_link_bus_request, width);
    FIELD(ps_link_bus_request, offset);
    FIELD(ps_link_bus_request, value);
    FIELD(ps_link_bus_reply, sequence);
    FIELD(ps_link_bus_reply, up);
    FIELD(ps_link_bus_reply, value);
    FIELD(ps_link_bus_reply, engine_memory);
    FIELD(ps_link_bus_reply, generation);
    FIELD(ps_link_bus_reply, reserved);
}

static void print_constants(void)
{
    CONSTANT(PS_LINK_VERSION);
    CONSTANT(PS_LINK_SLOTS);
    CONSTANT(PS_LINK_PAGES_MAX);
    CONSTANT(PS_LINK_READ_MAX);
    CONSTANT(PS_LINK_REGIONS_MAX);
    CONSTANT(PS_LINK_LOCAL_MAX);
    CONSTANT(PS_LINK_RESULT_SIZE);
    CONSTANT(PS_LINK_LOG_SIZE);
    CONSTANT(PS_LINK_CARD_MAGIC);
    CONSTANT(PS_LINK_HOST_MAGIC);
    CONSTANT(PS_LINK_HOST_AT);
    CONSTANT(PS_LINK_CARD_AT);
    CONSTANT(PS_LINK_SUBMISSIONS_AT);
    CONSTANT(PS_LINK_COMPLETIONS_AT);
    CONSTANT(PS_LINK_BUS_REQUEST_AT);
    CONSTANT(PS_LINK_BUS_REPLY_AT);
    CONSTANT(PS_LINK_LOG_AT);
    CONSTANT(PS_LINK_DATA_AT);
    CONSTANT(PS_LINK_SLOT_SIZE);
    CONSTANT(PS_LINK_FRAMES_IN_SLOT);
    CONSTANT(PS_LINK_STATUSES_IN_SLOT);
    CONSTANT(PS_LINK_RESULTS_IN_SLOT);
    CONSTANT(PS_LINK_MAILBOX_SIZE);
    CONSTANT(PS_LINK_OP_NOP);
    CONSTANT(PS_LINK_OP_MAP);
    CONSTANT(PS_LINK_OP_DIGEST);
    CONSTANT(PS_LINK_OP_READ);
    CONSTANT(PS_LINK_OP_LOCAL);
    CONSTANT(PS_LINK_RANGE);
    CONSTANT(PS_LINK_SHA256);
    CONSTANT(PS_LINK_NH4AES);
    CONSTANT(PS_LINK_OK);
    CONSTANT(PS_LINK_TORN);
    CONSTANT(PS_LINK_BAD_OP);
    CONSTANT(PS_LINK_BAD_COUNT);
    CONSTANT(PS_LINK_BAD_ARGUMENT);
    CONSTANT(PS_LINK_FAILED);
    CONSTANT(PS_LINK_ENGINE_NONE);
    CONSTANT(PS_LINK_ENGINE_DMA);
    CONSTANT(PS_LINK_ENGINE_WINDOW);
    CONSTANT(PS_LINK_STATE_STARTING);
    CONSTANT(PS_LINK_STATE_READY);
    CONSTANT(PS_LINK_STATE_FAULT);
    CONSTANT(PS_LINK_BUS_READ);
    CONSTANT(PS_LINK_BUS_WRITE);
}

int main(void)
{
    print_pages();
    print_entries();
    print_bus();
    print_constants();
    return 0;
}
