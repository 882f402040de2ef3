/* A digest that detects changes of memory. It keeps sums and sums of sums, which depend on the order, in eight lanes,
 * and reads at the speed of memory. */
#include <string.h>

#include "hf_bnn.h"

enum { LANES = 8 };
typedef uint64_t words __attribute__((vector_size(8 * LANES)));

static uint64_t mixed(uint64_t digest, uint64_t word)
{
    digest = (digest ^ word) * 0x9E3779B97F4A7C15u;
    return digest ^ digest >> 29;
}

static uint64_t digest_of_span(uint64_t digest, const unsigned char *data, int64_t bytes)
{
    words sums = {0}, sums_of_sums = {0}, next;
    int64_t i = 0;
    for (; i + (int64_t)sizeof next <= bytes; i += sizeof next) {
        memcpy(&next, data + i, sizeof next);
        sums += next;
        sums_of_sums += sums;
    }
    for (int lane = 0; i && lane < LANES; lane++)
        digest = mixed(mixed(digest, sums[lane]), sums_of_sums[lane]);
    for (; i < bytes; i += 8) {
        uint64_t word = 0;
        memcpy(&word, data + i, bytes - i < 8 ? bytes - i : 8);
        digest = mixed(digest, word);
    }
    return mixed(digest, bytes);
}

uint64_t hf_bnn_digest(const struct memory_span *spans, int64_t count)
{
    uint64_t digest = 0;
    for (int64_t i = 0; i < count; i++)
        digest = digest_of_span(digest, spans[i].data, spans[i].bytes);
    return digest;
}
