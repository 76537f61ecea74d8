/* OpenSSL's SHA-256, one EVP digest a page, as a careful C program would do it: the method
 * fetched once, one context for all pages (EVP_DigestInit_ex(3), PERFORMANCE in
 * crypto(7ossl)). Declared here, so that no development package is needed.
 */
enum { DIGEST = 32 };

typedef struct evp_md_st EVP_MD;
typedef struct evp_md_ctx_st EVP_MD_CTX;
EVP_MD *EVP_MD_fetch(void *, const char *, const char *);
void EVP_MD_free(EVP_MD *);
EVP_MD_CTX *EVP_MD_CTX_new(void);
void EVP_MD_CTX_free(EVP_MD_CTX *);
int EVP_DigestInit_ex2(EVP_MD_CTX *, const EVP_MD *, const void *);
int EVP_DigestUpdate(EVP_MD_CTX *, const void *, size_t);
int EVP_DigestFinal_ex(EVP_MD_CTX *, unsigned char *, unsigned *);

/* A failure counts every page as different, and is seen by whoever checks the contender. */
static size_t work_sha256(const uint8_t *base, const uint64_t *offsets, size_t count,
                          uint8_t *expected)
{
    size_t different = 0;
    EVP_MD *method = EVP_MD_fetch(NULL, "SHA256", NULL);
    EVP_MD_CTX *context = EVP_MD_CTX_new();
    int good = method != NULL && context != NULL;
    for (size_t i = 0; good && i < count; i++) {
        uint8_t digest[DIGEST];
        good = EVP_DigestInit_ex2(context, i == 0 ? method : NULL, NULL) &&
               EVP_DigestUpdate(context, page_at(base, offsets, i), PAGE) &&
               EVP_DigestFinal_ex(context, digest, NULL);
        different += memcmp(digest, expected + i * DIGEST, DIGEST) != 0;
    }
    EVP_MD_CTX_free(context);
    EVP_MD_free(method);
    return good ? different : count;
}

/* Pages whose digest is not as expected. */
size_t peer_evp_sha256(const uint8_t *base, const uint64_t *offsets, size_t count,
                       unsigned threads, const uint8_t *expected)
{
    return spread(work_sha256, base, offsets, count, (uint8_t *)expected, DIGEST, threads);
}
