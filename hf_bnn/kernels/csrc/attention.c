/* Attention of bits: signs of queries times signs of keys, softmax or none, bits of the result times signs of values.
 *
 * A score takes one of size + 1 values, by the number of bits in which query and key differ, and so does a probability
 * once the sum of its row is known: its bit, probability >= threshold, is a comparison of that number with a limit.
 *
 * torch's softmax rounds differently, and the sum here is more accurate. If a probability that a row can have is so
 * close to the threshold that torch's may be on the other side, the row is marked as unsure. `tolerance` bounds the
 * difference between the two, in relative roundings of 2^-24. With n tokens, the scores' bound b = size *
 * |score of one difference| / 2, and u20 for an exponential that is off by 20 units in the last place:
 *     torch: sum of n numbers in at least 4 lanes       n / 4 + 16
 *            exponentials of one number and of the sum   80 (u20; torch 2.13 has u10)
 *            score - largest score, of both              |log threshold| + 16
 *            1 / sum, and the product with it            2
 *     here:  sum (attention.inc)                         n / 32 + 10
 *            table, `coarse`, `fine`, both limits        6, and 2 b: the latter two's scores are not rounded
 */
#include <math.h>
#include <stdlib.h>

#include "attention.h"

enum { LARGEST_SCORE = 64, SMALLEST_EXPONENT = -20 }; /* so that no exponential, sum or product with it overflows */

/* The span of several rows together. It is whole if all rows have the same whole span. */
static struct span common_span(const struct span *spans, int64_t count)
{
    struct span span = spans[0];
    for (int64_t i = 1; i < count; i++) {
        span.whole &= spans[i].whole && spans[i].end == span.end;
        span.end = spans[i].end > span.end ? spans[i].end : span.end;
    }
    return span;
}

static void attend_blocks(int64_t begin, int64_t end, void *context)
{
    struct attention *a = context;
    const struct attention_shape *s = a->shape;
    const int64_t blocks = divide_up(s->queries, BLOCK_ROWS), words = a->token_words, line = s->heads * s->size;
    const int64_t query_words = BLOCK_ROWS * a->scores.words, bit_words = BLOCK_ROWS * words;
    uint32_t *queries = malloc((size_t)(query_words + bit_words + s->keys * PANEL) * sizeof *queries);
    if (!queries) {
        a->failed = 1;
        return;
    }
    uint32_t *bits = queries + query_words, *counts = bits + bit_words;
    struct scores scores = a->scores;
    for (int64_t i = begin; i < end; i++) {
        const int64_t head = i / blocks, b = head / s->heads, h = head % s->heads;
        const int64_t first = i % blocks * BLOCK_ROWS, count = smaller(BLOCK_ROWS, s->queries - first);
        const int64_t mask_row = b * a->mask_steps[0] + h * a->mask_steps[1] + first * a->mask_steps[2];
        if (a->masked) {
            struct span span = common_span(a->spans + mask_row, a->mask_steps[2] ? count : 1);
            scores.tokens = span.end;
            scores.masks = !span.whole;
        }
        scores.keys = a->keys + head * s->keys * scores.words;
        pack_head(a, a->query + b * s->query_steps[0] + h * s->query_steps[1] + first * s->query_steps[2],
                  s->query_steps[2], count, &a->levels[0], queries);
        a->set->attend(&scores, queries, count, a->masked ? a->masked + mask_row * words : NULL,
                       a->mask_steps[2] * words, counts, bits, words, a->unsure + head * s->queries + first);
        struct block block = {.count = count};
        for (int64_t row = 0; row < count; row++) {
            block.rows[row] = bits + row * words;
            block.offsets[row] = a->shift + head * s->size;
        }
        sum_values(a, a->values + head * value_words(a), &block, a->scale, line,
                   a->out + (b * s->queries + first) * line + h * s->size);
    }
    free(queries);
}

/* Fills `s` from the levels; 0 if their numbers are not what the comparison of counts takes. */
static int set_scores(struct scores *s, const float *levels, float scaling, int softmax)
{
    const float unit = levels[4], threshold = levels[3];
    const double slope = (double)unit * scaling, largest = slope * (double)s->size;
    if (!(slope >= 0 && largest <= (softmax ? LARGEST_SCORE : 1e30))) { /* NaN is neither */
        return 0;
    }
    s->softmax = softmax;
    s->limit = 0;
    for (int64_t c = 0; c <= s->size; c++) {
        const float product = (float)(s->size - 2 * c) * unit, score = product * scaling; /* rounded as torch does */
        s->limit += !(score < threshold);
        s->exponentials[c] = softmax ? (float)exp(score) : 0;
    }
    if (!softmax) {
        return 1;
    }
    if (!(threshold > ldexp(1, SMALLEST_EXPONENT) && threshold < 1 / ldexp(1, SMALLEST_EXPONENT))) {
        return 0;
    }
    for (int64_t i = 0; i < 16; i++) {
        s->coarse[i] = 16 * i <= s->size ? (float)exp(slope * (double)(s->size - 32 * i)) : 0;
        s->fine[i] = (float)exp(-2 * slope * (double)i);
    }
    const double roundings = (double)s->tokens * (1.0 / 4 + 1.0 / 32) + 2 * largest + fabs(log(threshold)) + 130;
    s->threshold = threshold;
    s->tolerance = (float)ldexp(roundings, -24);
    return 1;
}

int hf_bnn_attention(int64_t set, parallel_for pool, const struct attention_shape *shape, const float *query,
                     const float *key, const float *value, const float *mask, const float *levels, float scaling,
                     int softmax, float *out, uint8_t *unsure)
{
    const struct attention_shape *s = shape;
    const int64_t heads = s->batch * s->heads;
    struct attention a = {
        .set = instruction_set(set),
        .shape = s,
        .query = query,
        .key = key,
        .value = value,
        .mask = mask,
        .levels = levels,
        .token_words = words_of(s->keys),
        .scores = {.all_tokens = s->keys, .tokens = s->keys, .size = s->size, .words = head_words(s->size)},
        .out = out,
        .unsure = unsure,
    };
    if (s->size > MOST_HEAD_SIZE || s->keys > 1 << 24 || !set_scores(&a.scores, levels, scaling, softmax)) {
        return NOT_TAKEN;
    }
    int64_t mask_rows = mask ? 1 : 0;
    for (int i = 2; i >= 0; i--) {
        a.mask_steps[i] = mask && s->mask_steps[i] ? mask_rows : 0;
        mask_rows *= mask && s->mask_steps[i] ? (const int64_t[]){s->batch, s->heads, s->queries}[i] : 1;
    }
    const int64_t key_words = heads * s->keys * a.scores.words, all_values = heads * value_words(&a);
    const int64_t words = key_words + all_values + mask_rows * a.token_words;
    uint32_t *memory = malloc((size_t)words * sizeof *memory + (size_t)mask_rows * sizeof *a.spans +
                              (size_t)((heads + 1) * s->size) * sizeof *a.scale);
    if (!memory) {
        return OUT_OF_MEMORY;
    }
    a.keys = memory;
    a.values = a.keys + key_words;
    a.masked = mask ? a.values + all_values : NULL;
    a.spans = (struct span *)(void *)(memory + words);
    a.scale = (float *)(void *)(a.spans + mask_rows);
    a.shift = a.scale + s->size;
    for (int64_t i = 0; i < s->size; i++) {
        a.scale[i] = levels[5];
    }
    for_range(pool, mask_rows, pack_mask, &a);
    if (!a.other_mask && !a.failed) {
        for_range(pool, heads, pack_keys_and_values, &a);
    }
    if (!a.other_mask && !a.failed) {
        for_range(pool, heads * divide_up(s->queries, BLOCK_ROWS), attend_blocks, &a);
    }
    free(memory);
    if (a.failed || a.other_mask) {
        return a.failed ? OUT_OF_MEMORY : NOT_TAKEN;
    }
    return memchr(unsure, 1, (size_t)(heads * s->queries)) ? UNSURE : OK;
}

int hf_bnn_attention_scores(int64_t set, const struct attention_shape *shape, const float *query, const float *key,
                            const float *mask, const float *levels, float scaling, const int64_t *rows, int64_t count,
                            float *out)
{
    const struct attention_shape *s = shape;
    struct attention a = {.set = instruction_set(set), .shape = s, .key = key, .levels = levels};
    const int64_t words = a.scores.words = head_words(s->size);
    uint32_t *bits = malloc((size_t)((s->keys + 1) * words) * sizeof *bits), *keys = bits + words;
    if (!bits) {
        return OUT_OF_MEMORY;
    }
    int64_t packed = -1;
    for (int64_t row = 0; row < count; row++) {
        const int64_t head = rows[row] / s->queries, i = rows[row] % s->queries;
        const int64_t b = head / s->heads, h = head % s->heads;
        const float *from = query + b * s->query_steps[0] + h * s->query_steps[1] + i * s->query_steps[2];
        const int64_t masked = b * s->mask_steps[0] + h * s->mask_steps[1] + i * s->mask_steps[2];
        if (head != packed) {
            pack_keys(&a, head, keys);
            packed = head;
        }
        pack_head(&a, from, s->query_steps[2], 1, &levels[0], bits);
        for (int64_t j = 0; j < s->keys; j++) {
            int64_t differences = 0;
            for (int64_t w = 0; w < words; w++) {
                differences += __builtin_popcount(bits[w] ^ keys[j * words + w]);
            }
            const float score = (float)(s->size - 2 * differences) * levels[4] * scaling;
            out[row * s->keys + j] = mask ? score + mask[masked + j] : score;
        }
    }
    free(bits);
    return OK;
}

int hf_bnn_attention_context(int64_t set, const struct attention_shape *shape, const float *value, const float *levels,
                             const float *weights, const int64_t *rows, int64_t count, float *out)
{
    const struct attention_shape *s = shape;
    struct attention a = {.set = instruction_set(set), .shape = s, .value = value, .levels = levels};
    const int64_t words = a.token_words = words_of(s->keys), size = s->size;
    uint32_t *bits = malloc((size_t)(words + value_words(&a) + spare_words(&a) + 2 * size) * sizeof *bits);
    if (!bits) {
        return OUT_OF_MEMORY;
    }
    uint32_t *panels = bits + words, *spare = panels + value_words(&a);
    float *scale = (float *)(void *)(spare + spare_words(&a)), *shift = scale + size;
    for (int64_t n = 0; n < size; n++) {
        scale[n] = levels[5];
    }
    int64_t packed = -1;
    for (int64_t row = 0; row < count; row++) {
        const int64_t head = rows[row] / s->queries, i = rows[row] % s->queries;
        if (head != packed) {
            pack_values(&a, head, spare, panels, shift);
            packed = head;
        }
        a.set->pack_rows(weights + row * s->keys, 0, 1, s->keys, (struct threshold){&levels[3], 0}, bits, words);
        struct block block = {.count = 1, .rows = {bits}, .offsets = {shift}};
        float *to = out + ((head / s->heads * s->queries + i) * s->heads + head % s->heads) * size;
        sum_values(&a, panels, &block, scale, size, to);
    }
    free(bits);
    return OK;
}
