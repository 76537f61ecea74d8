/* The emulated bus: one request and one reply in the mailbox, docs/spec/card-link.md, 7. */
#include "board.h"

void bus_init(link_bus *bus, uint8_t *mailbox, uint32_t sequence)
{
    bus->request = (volatile ps_link_bus_request *)(mailbox + PS_LINK_BUS_REQUEST_AT);
    bus->reply = (const volatile ps_link_bus_reply *)(mailbox + PS_LINK_BUS_REPLY_AT);
    bus->sequence = sequence;
}

void bus_begin(link_bus *bus, const ps_nvme_access *access)
{
    volatile ps_link_bus_request *request = bus->request;
    request->op = access->write ? PS_LINK_BUS_WRITE : PS_LINK_BUS_READ;
    request->width = (uint16_t)access->width;
    request->offset = access->offset;
    request->value = access->value;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    request->sequence = ++bus->sequence;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

ps_nvme_reply bus_answer(const link_bus *bus)
{
    const volatile ps_link_bus_reply *reply = bus->reply;
    if (reply->sequence != bus->sequence) {
        return (ps_nvme_reply){.state = PS_NVME_ACCESS_BUSY};
    }
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    return (ps_nvme_reply){.state = reply->up == 1 ? PS_NVME_ACCESS_DONE : PS_NVME_ACCESS_DOWN,
                           .value = reply->value,
                           .memory = reply->engine_memory,
                           .generation = reply->generation};
}
