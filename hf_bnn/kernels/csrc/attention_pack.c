/* Packs the operands of attention: queries and keys into bits, values into panels, masks into bits. */
#include <stdlib.h>

#include "attention.h"

static const float MASKED = -1000; /* a mask below this excludes a token: exp(score) becomes 0 */

static void separate_pairs(uint32_t *words, int64_t count)
{
    for (int64_t i = 0; i < count; i += 2) {
        words[i + 1] ^= words[i];
    }
}

void pack_head(const struct attention *a, const float *x, int64_t step, int64_t rows, const float *threshold,
               uint32_t *out)
{
    const int64_t words = a->scores.words;
    if (words > words_of(a->shape->size)) {
        memset(out, 0, (size_t)(rows * words) * sizeof *out);
    }
    a->set->pack_rows(x, step, rows, a->shape->size, (struct threshold){threshold, 0}, out, words);
    separate_pairs(out, rows * words);
}

void sum_values(const struct attention *a, const uint32_t *panels, const struct block *block, const float *scale,
                int64_t out_step, float *out)
{
    const int64_t run = 0;
    struct product product = {panels, a->shape->keys, a->shape->size, &run, 1, a->token_words, scale, out_step};
    a->set->multiply(&product, block, 0, divide_up(a->shape->size, PANEL), out);
}

void pack_values(const struct attention *a, int64_t head, uint32_t *spare, uint32_t *panels, float *shift)
{
    const struct attention_shape *s = a->shape;
    const int64_t words = a->token_words, size = s->size, b = head / s->heads, h = head % s->heads;
    uint32_t *columns = spare, *zeros = columns + size * words;
    float *scale = (float *)(void *)(zeros + words), *offset = scale + size;
    a->set->pack_planes(a->value + b * s->value_steps[0] + h * s->value_steps[1], s->value_steps[2], size, s->keys,
                        (struct threshold){&a->levels[2], 0}, columns, words);
    memset(panels, 0, (size_t)value_words(a) * sizeof *panels);
    for (int64_t n = 0; n < size; n++) {
        for (int64_t w = 0; w < words; w++) {
            panels[(n / PANEL * words + w) * PANEL + n % PANEL] = columns[n * words + w];
        }
        scale[n] = a->levels[6];
        offset[n] = -0.0f;
    }
    memset(zeros, 0, (size_t)words * sizeof *zeros);
    struct block block = {.count = 1, .rows = {zeros}, .offsets = {offset}};
    sum_values(a, panels, &block, scale, size, shift);
}

void pack_keys(const struct attention *a, int64_t head, uint32_t *keys)
{
    const struct attention_shape *s = a->shape;
    pack_head(a, a->key + head / s->heads * s->key_steps[0] + head % s->heads * s->key_steps[1], s->key_steps[2],
              s->keys, &a->levels[1], keys);
}

void pack_keys_and_values(int64_t begin, int64_t end, void *context)
{
    struct attention *a = context;
    uint32_t *spare = malloc((size_t)spare_words(a) * sizeof *spare);
    if (!spare) {
        a->failed = 1;
        return;
    }
    for (int64_t head = begin; head < end; head++) {
        pack_keys(a, head, a->keys + head * a->shape->keys * a->scores.words);
        pack_values(a, head, spare, a->values + head * value_words(a), a->shift + head * a->shape->size);
    }
    free(spare);
}

/* Whether each of a row's numbers is 0 or shuts its token out; the bits of the latter. */
static int pack_mask_row(const struct attention *a, const float *row, uint32_t *out, uint32_t *spare)
{
    const float zero = 0, positive = 1e-37f; /* so small a number adds nothing either */
    const int64_t words = a->token_words, count = a->shape->keys;
    a->set->pack_rows(row, 0, 1, count, (struct threshold){&MASKED, 0}, out, words);
    a->set->pack_rows(row, 0, 1, count, (struct threshold){&zero, 0}, spare, words);
    int good = !memcmp(out, spare, (size_t)words * sizeof *out);
    a->set->pack_rows(row, 0, 1, count, (struct threshold){&positive, 0}, spare, words);
    separate_pairs(spare, words);
    separate_pairs(out, words);
    for (int64_t i = 0; i < count; i += 32) {
        good &= spare[i / 32] == (count - i >= 32 ? UINT32_MAX : (1u << (count - i)) - 1);
    }
    return good;
}

static struct span span_of(const uint32_t *masked, int64_t tokens)
{
    struct span span = {(int32_t)tokens, 1};
    while (span.end > 0 && masked[(span.end - 1) / 32] >> (span.end - 1) % 32 & 1) {
        span.end--;
    }
    for (int32_t i = 0; i < span.end && span.whole; i += 32) {
        uint32_t among = span.end - i >= 32 ? UINT32_MAX : (1u << (span.end - i)) - 1;
        span.whole = !(masked[i / 32] & among);
    }
    return span;
}

void pack_mask(int64_t begin, int64_t end, void *context)
{
    struct attention *a = context;
    const struct attention_shape *s = a->shape;
    const int64_t words = a->token_words, heads = s->mask_steps[1] ? s->heads : 1;
    const int64_t rows = s->mask_steps[2] ? s->queries : 1;
    uint32_t *spare = malloc((size_t)words * sizeof *spare);
    if (!spare) {
        a->failed = 1;
        return;
    }
    for (int64_t i = begin; i < end && !a->other_mask; i++) {
        const float *row = a->mask + i / rows / heads * s->mask_steps[0] + i / rows % heads * s->mask_steps[1] +
                           i % rows * s->mask_steps[2];
        uint32_t *to = a->masked + i * words;
        /* A mask of padding is one row, repeated. */
        if (i > begin && i % rows && !memcmp(row, row - s->mask_steps[2], (size_t)s->keys * sizeof *row)) {
            memcpy(to, to - words, (size_t)words * sizeof *to);
            a->spans[i] = a->spans[i - 1];
        } else if (pack_mask_row(a, row, to, spare)) {
            a->spans[i] = span_of(to, s->keys);
        } else {
            a->other_mask = 1;
        }
    }
    free(spare);
}
