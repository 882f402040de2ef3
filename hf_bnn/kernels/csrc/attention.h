/* Which tokens a query attends to, written once for all instruction sets. LANES queries at a time meet one token after
 * the other, so that their sums need no order between lanes. The file that includes this has included tile.h and says
 *
 *   add_exponentials(sums, s, counts, masks, shut, bit)   sums + the exponentials of so many differences, in each
 *                                                         lane; with `masks`, not where shut & bit is set
 *   set_where(bits, counts, limits, bit)                  bits | bit where counts >= limits
 */

/* In lane i < count: from[i * step]. */
INLINE words gather_words(const uint32_t *from, int64_t step, int64_t count)
{
    uint32_t found[LANES] = {0};
    for (int64_t i = 0; i < count; i++) {
        found[i] = from[i * step];
    }
    return LOAD(words, found);
}

/* The differences of all queries to the token `key` go to `counts`; their exponentials are added to `sums`. */
INLINE floats meet_token(const int W, const int softmax, const int masks, const struct scores *s, const words *queries,
                         const uint32_t *key, words shut, uint32_t bit, uint32_t *counts, floats sums)
{
    words found = {0};
    UNROLL for (int w = 0; w < W; w++) found = add_counts(found, count_bits(queries[w] ^ all_words(key[w])));
    found = per_word(found);
    STORE(counts, found);
    return softmax ? add_exponentials(sums, s, found, masks, shut, bit) : sums;
}

/* Fills `counts`, [tokens][LANES]. Returns the sums of the softmaxes: of 32 tokens four short sums, so that a sum of
 * n numbers is off by no more than n / 32 + 10 roundings. */
INLINE floats meet_tokens(const int W, const int softmax, const int masks, const struct scores *s,
                          const uint32_t *from, int64_t count, const uint32_t *masked, int64_t masked_step,
                          uint32_t *counts)
{
    words queries[MOST_HEAD_WORDS];
    UNROLL for (int w = 0; w < W; w++) queries[w] = gather_words(from + w, W, count);
    const uint32_t *key = s->keys;
    floats total = {0};
    for (int64_t first = 0; first < s->tokens; first += 32) {
        const int64_t here = smaller(32, s->tokens - first);
        floats sums[4] = {{0}};
        words shut = masks ? gather_words(masked + first / 32, masked_step, count) : (words){0};
        int64_t j = 0;
        for (; j + 4 <= here; j += 4, shut >>= 4) {
            UNROLL for (int i = 0; i < 4; i++, key += W, counts += LANES) {
                sums[i] = meet_token(W, softmax, masks, s, queries, key, shut, 1u << i, counts, sums[i]);
            }
        }
        for (; j < here; j++, shut >>= 1, key += W, counts += LANES) {
            sums[0] = meet_token(W, softmax, masks, s, queries, key, shut, 1, counts, sums[0]);
        }
        total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
    return total;
}

/* Bit j: the query in this lane does not attend to token first + j. */
INLINE words low_bits(const struct scores *s, const uint32_t *counts, integers limits, const uint32_t *masked,
                      int64_t masked_step, int64_t count, int64_t first)
{
    const int64_t here = smaller(32, s->tokens - first);
    words bits = masked && first < s->all_tokens ? gather_words(masked + first / 32, masked_step, count) : (words){0};
    counts += first * LANES;
    if (here == 32) { /* a case of its own: each bit is a constant */
        UNROLL for (int j = 0; j < 16; j++) bits = set_where(bits, counts + j * LANES, limits, 1u << j);
        UNROLL for (int j = 16; j < 32; j++) bits = set_where(bits, counts + j * LANES, limits, 1u << j);
    } else {
        for (int64_t j = 0; j < here; j++) bits = set_where(bits, counts + j * LANES, limits, 1u << j);
    }
    return bits;
}

/* How many differences, at least, make a probability low. Of none up to s->size differences, each has a probability;
 * where one of them is too close to the threshold, `unsure` is set. */
INLINE integers find_limits(const struct scores *s, floats sums, int64_t count, uint8_t *unsure)
{
    const floats high = sums * (s->threshold * (1 + s->tolerance)), low = sums * (s->threshold * (1 - s->tolerance));
    integers certain = {0}, possible = {0};
    for (int64_t c = 0; c <= s->size; c++) {
        const floats e = all_floats(s->exponentials[c]);
        certain -= (integers)(e >= high);
        possible -= (integers)(e >= low);
    }
    integers doubtful = (certain != possible) | (sums == (floats){0}); /* a sum of 0: all tokens are masked */
    for (int64_t i = 0; i < count; i++) {
        unsure[i] = doubtful[i] != 0;
    }
    return certain;
}

/* At most LANES queries. W is a constant in every call. */
INLINE void attend_some(const int W, const struct scores *s, const uint32_t *queries, int64_t count,
                        const uint32_t *masked, int64_t masked_step, uint32_t *counts, uint32_t *out, int64_t out_step,
                        uint8_t *unsure)
{
    integers limits = s->limit + (integers){0};
    if (!s->softmax) {
        meet_tokens(W, 0, 0, s, queries, count, NULL, 0, counts);
        memset(unsure, 0, (size_t)count);
    } else {
        floats sums = s->masks ? meet_tokens(W, 1, 1, s, queries, count, masked, masked_step, counts)
                               : meet_tokens(W, 1, 0, s, queries, count, NULL, 0, counts);
        limits = find_limits(s, sums, count, unsure);
    }
    for (int64_t first = 0; first < s->all_tokens; first += PAIR_BITS) {
        uint32_t pair[2][LANES];
        words bits = low_bits(s, counts, limits, masked, masked_step, count, first);
        STORE(pair[0], bits);
        bits ^= low_bits(s, counts, limits, masked, masked_step, count, first + 32);
        STORE(pair[1], bits);
        for (int64_t i = 0; i < count; i++) {
            out[i * out_step + first / 32] = pair[0][i];
            out[i * out_step + first / 32 + 1] = pair[1][i];
        }
    }
}

#define ATTEND(W)                                                                                                   \
    TARGET static __attribute__((noinline)) void attend_##W(                                                        \
        const struct scores *s, const uint32_t *queries, int64_t count, const uint32_t *masked, int64_t masked_step, \
        uint32_t *counts, uint32_t *out, int64_t out_step, uint8_t *unsure)                                         \
    {                                                                                                               \
        attend_some(W, s, queries, count, masked, masked_step, counts, out, out_step, unsure);                      \
    }
ATTEND(2)
ATTEND(4)
ATTEND(8)

TARGET static void attend(const struct scores *s, const uint32_t *queries, int64_t count, const uint32_t *masked,
                          int64_t masked_step, uint32_t *counts, uint32_t *out, int64_t out_step, uint8_t *unsure)
{
    for (int64_t i = 0; i < count; i += LANES) {
        (s->words == 2 ? attend_2 : s->words == 4 ? attend_4 : attend_8)(
            s, queries + i * s->words, smaller(LANES, count - i), masked ? masked + i * masked_step : NULL, masked_step,
            counts, out + i * out_step, out_step, unsure + i);
    }
}
