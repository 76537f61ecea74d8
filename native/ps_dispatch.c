/* Which form of a digest runs: the only CPU detection in the core. */
#include <stdatomic.h>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include "ps_internal.h"

typedef struct {
    ps_digest digest;
    ps_form form;
    uint32_t needs; /* ps_cpu_feature */
    ps_work_fn *work;
} form_row;

/* Fastest first, within a digest. gf128aes has no portable form: without a carry-less multiply
 * it is too slow to be of use. */
static const form_row forms[] = {
#if defined(__x86_64__)
    {PS_DIGEST_SHA256, PS_FORM_SHANI, PS_CPU_SHA, ps_digest_sha256_shani},
#endif
    {PS_DIGEST_SHA256, PS_FORM_PORTABLE, 0, ps_digest_sha256_portable},
#if defined(__x86_64__)
    {PS_DIGEST_NH4AES, PS_FORM_AVX512, PS_CPU_AVX512, ps_digest_nh4aes_avx512},
    {PS_DIGEST_NH4AES, PS_FORM_AVX2, PS_CPU_AVX2, ps_digest_nh4aes_avx2},
    {PS_DIGEST_NH4AES, PS_FORM_SSE2, 0, ps_digest_nh4aes_sse2},
#elif defined(__aarch64__)
    {PS_DIGEST_NH4AES, PS_FORM_NEON, 0, ps_digest_nh4aes_neon},
#endif
    {PS_DIGEST_NH4AES, PS_FORM_PORTABLE, 0, ps_digest_nh4aes_portable},
#if defined(__x86_64__)
    {PS_DIGEST_GF128AES, PS_FORM_AVX512, PS_CPU_AVX512 | PS_CPU_VPCLMUL,
     ps_digest_gf128aes_avx512},
    {PS_DIGEST_GF128AES, PS_FORM_VPCLMUL, PS_CPU_AVX2 | PS_CPU_VPCLMUL,
     ps_digest_gf128aes_vpclmul},
    {PS_DIGEST_GF128AES, PS_FORM_PCLMUL, PS_CPU_PCLMUL, ps_digest_gf128aes_pclmul},
#endif
};

enum { FORMS = sizeof forms / sizeof forms[0], DETECTED = 1 << 30 };

/* CPUID leaves to the hypervisor in a virtual machine, so it is asked once; 0: not yet. */
static _Atomic uint32_t detected;
static _Atomic uint32_t allowed = PS_CPU_ALL;

#if defined(__x86_64__)
/* The bits that __builtin_cpu_supports() of gcc 12 does not know: CPUID leaf 7 (Intel SDM
 * vol. 2A, CPUID). The registers of SHA are SSE's, which x86-64 always has enabled; those
 * of VAES and VPCLMULQDQ are AVX2's. */
static uint32_t detect(void)
{
    unsigned eax, ebx = 0, ecx = 0, edx;
    bool avx2 = __builtin_cpu_supports("avx2");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    bool sse41 = __builtin_cpu_supports("ssse3") && __builtin_cpu_supports("sse4.1");
    __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
    return (avx2 ? PS_CPU_AVX2 : 0u) | (avx512 ? PS_CPU_AVX512 : 0u) |
           (__builtin_cpu_supports("aes") ? PS_CPU_AES : 0u) |
           (__builtin_cpu_supports("pclmul") ? PS_CPU_PCLMUL : 0u) |
           (avx2 && (ecx & bit_VAES) ? PS_CPU_VAES : 0u) |
           (avx2 && (ecx & bit_VPCLMULQDQ) ? PS_CPU_VPCLMUL : 0u) |
           (sse41 && (ebx & bit_SHA) ? PS_CPU_SHA : 0u);
}
#elif defined(__aarch64__)
static uint32_t detect(void)
{
    return getauxval(AT_HWCAP) & HWCAP_AES ? PS_CPU_AES : 0u;
}
#else
static uint32_t detect(void)
{
    return 0;
}
#endif

uint32_t ps_cpu_features(void)
{
    uint32_t features = atomic_load_explicit(&detected, memory_order_relaxed);
    if (features == 0) {
        features = detect() | DETECTED;
        atomic_store_explicit(&detected, features, memory_order_relaxed);
    }
    return features & atomic_load_explicit(&allowed, memory_order_relaxed);
}

void ps_cpu_restrict(uint32_t features)
{
    atomic_store_explicit(&allowed, features & PS_CPU_ALL, memory_order_relaxed);
}

/* The fastest row that fits, with PS_FORM_AUTO for any form; NULL when there is none. */
static const form_row *row_of(int digest, int form)
{
    uint32_t features = ps_cpu_features();
    for (size_t i = 0; i < FORMS; i++) {
        bool wanted = form == PS_FORM_AUTO || form == (int)forms[i].form;
        if ((int)forms[i].digest == digest && wanted && !(forms[i].needs & ~features)) {
            return &forms[i];
        }
    }
    return NULL;
}

size_t ps_digest_size(int digest)
{
    switch (digest) {
    case PS_DIGEST_SHA256:
        return PS_SHA256_SIZE;
    case PS_DIGEST_NH4AES:
    case PS_DIGEST_GF128AES:
        return PS_KEYED_SIZE;
    default:
        return 0;
    }
}

uint32_t ps_forms_available(int digest)
{
    uint32_t mask = 0;
    for (int form = PS_FORM_AUTO + 1; form <= PS_FORM_LAST; form++) {
        mask |= row_of(digest, form) != NULL ? 1u << form : 0;
    }
    return mask;
}

int ps_form_pick(int digest, int form)
{
    if (ps_digest_size(digest) == 0 || form < PS_FORM_AUTO || form > PS_FORM_LAST) {
        return PS_ERR_ARGUMENT;
    }
    const form_row *row = row_of(digest, form);
    return row != NULL ? (int)row->form : PS_ERR_FORM;
}

ps_work_fn *ps_dispatch_work(int digest, int form)
{
    return row_of(digest, form)->work;
}

/* The portable form is what runs without any of it, down to AES. */
ps_aes_fn *ps_dispatch_aes(int form)
{
    uint32_t features = form == PS_FORM_PORTABLE ? 0 : ps_cpu_features();
#if defined(__x86_64__)
    const uint32_t vaes = PS_CPU_AVX512 | PS_CPU_VAES | PS_CPU_AES;
    if ((features & vaes) == vaes) {
        return ps_aes_encrypt_vaes;
    }
    if (features & PS_CPU_AES) {
        return ps_aes_encrypt_aesni;
    }
#elif defined(__aarch64__)
    if (features & PS_CPU_AES) {
        return ps_aes_encrypt_armv8;
    }
#endif
    (void)features;
    return ps_aes_encrypt_portable;
}

ps_work_fn *ps_dispatch_read(bool interleaved)
{
#if defined(__x86_64__)
    if (ps_cpu_features() & PS_CPU_AVX2) {
        return interleaved ? ps_read_interleaved_avx2 : ps_read_stream_avx2;
    }
#endif
    (void)interleaved;
    return ps_read_pages_portable;
}

ps_watch_fn *ps_dispatch_watch(void)
{
#if defined(__x86_64__)
    if (ps_cpu_features() & PS_CPU_AVX2) {
        return ps_watch_equal_avx2;
    }
#endif
    return ps_watch_equal_portable;
}
