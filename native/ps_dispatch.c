/* Which form of a digest runs: the only CPU detection in the core. */
#include <stdatomic.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "ps_internal.h"

static bool portable_present(void)
{
    return true;
}

#if defined(__x86_64__)
/* CPUID leaf 7 EBX bit 29 (Intel SDM vol. 2A, CPUID). __builtin_cpu_supports() of gcc 12
 * does not know SHA. The registers are SSE's, which x86-64 always has enabled. */
static bool shani_present(void)
{
    unsigned eax, ebx, ecx, edx;
    return __builtin_cpu_supports("ssse3") && __builtin_cpu_supports("sse4.1") &&
           __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (ebx & (1u << 29));
}
#endif

typedef struct {
    ps_form form;
    bool (*present)(void);
    ps_work_fn *sha256;
} form_row;

/* Fastest first; the last one runs everywhere. */
static const form_row forms[] = {
#if defined(__x86_64__)
    {PS_FORM_SHANI, shani_present, ps_digest_sha256_shani},
#endif
    {PS_FORM_PORTABLE, portable_present, ps_digest_sha256_portable},
};

enum { FORMS = sizeof forms / sizeof forms[0] };

/* CPUID leaves to the hypervisor in a virtual machine, so it is asked once; 0: not yet. */
static _Atomic uint32_t available;
static _Atomic int forced = PS_FORM_AUTO;

uint32_t ps_forms_available(void)
{
    uint32_t mask = atomic_load_explicit(&available, memory_order_relaxed);
    if (mask == 0) {
        for (size_t i = 0; i < FORMS; i++) {
            mask |= forms[i].present() ? 1u << forms[i].form : 0;
        }
        atomic_store_explicit(&available, mask, memory_order_relaxed);
    }
    return mask;
}

int ps_form_set(int form)
{
    if (form < PS_FORM_AUTO || form > PS_FORM_SHANI) {
        return PS_ERR_ARGUMENT;
    }
    if (form != PS_FORM_AUTO && !(ps_forms_available() & (1u << form))) {
        return PS_ERR_FORM;
    }
    atomic_store_explicit(&forced, form, memory_order_relaxed);
    return PS_OK;
}

static const form_row *form_in_use(void)
{
    int form = atomic_load_explicit(&forced, memory_order_relaxed);
    uint32_t mask = form == PS_FORM_AUTO ? ps_forms_available() : 1u << form;
    size_t i = 0;
    while (i + 1 < FORMS && !(mask & (1u << forms[i].form))) {
        i++;
    }
    return &forms[i];
}

int ps_form_get(void)
{
    return (int)form_in_use()->form;
}

ps_work_fn *ps_dispatch_sha256(void)
{
    return form_in_use()->sha256;
}
