/* Training steps on bits: elementwise functions in parts for the threads, weights to panels, products of two tensors. */
#include <stdlib.h>

#include "kernels.h"

enum { ELEMENTS = 1 << 16 }; /* that a part of an elementwise function has: whole words of bits */

struct elements {
    const struct instruction_set *set;
    int64_t function, count;
    const void *codes;
    const float *x;
    float number;
    void *out;
};

static void part_of_elements(const struct elements *e, int64_t first, int64_t count)
{
    const uint32_t *bits = (const uint32_t *)e->codes + first / 32;
    const int8_t *bytes = (const int8_t *)e->codes + first;
    const float *x = e->x + first;
    float *floats = (float *)e->out + first;
    switch (e->function) {
    case SIGNS:
        e->set->signs(x, count, floats);
        break;
    case SIGN_BITS:
        e->set->sign_bits(x, count, (uint32_t *)e->out + first / 32);
        break;
    case INSIDE_BITS:
        e->set->inside_bits(x, count, e->number, (uint32_t *)e->out + first / 32);
        break;
    case SIGNS_OF_BITS:
        e->set->signs_of_bits(bits, count, floats);
        break;
    case KEEP_WHERE:
        e->set->keep_where(bits, x, count, floats);
        break;
    case TO_BYTES:
        e->set->to_bytes(x, count, e->number, (int8_t *)e->out + first);
        break;
    case FROM_BYTES:
        e->set->from_bytes(bytes, count, e->number, floats);
        break;
    case SIGNS_OF_BYTES:
        e->set->signs_of_bytes(bytes, count, floats);
        break;
    case KEEP_WITHIN:
        e->set->keep_within(bytes, x, count, (int64_t)e->number, floats);
        break;
    }
}

static void parts_of_elements(int64_t begin, int64_t end, void *context)
{
    const struct elements *e = context;
    for (int64_t part = begin; part < end; part++) {
        const int64_t first = part * ELEMENTS;
        part_of_elements(e, first, smaller(ELEMENTS, e->count - first));
    }
}

void hf_bnn_elements(int64_t set, parallel_for pool, int64_t function, int64_t count, const void *codes,
                     const float *x, float number, void *out)
{
    struct elements e = {instruction_set(set), function, count, codes, x, number, out};
    for_range(pool, divide_up(count, ELEMENTS), parts_of_elements, &e);
}

struct panels {
    const struct instruction_set *set;
    const float *x;
    int64_t rows, inputs, taps;
    uint32_t *out;
    int failed;
};

/* A row of the weight to its words: [tap][word] of a convolution's (input, tap), else prefixes through all words.
 * `floats` has room for a row. */
static void pack_weight(const struct panels *p, int64_t row, float *floats, uint32_t *words)
{
    static const float zero = 0;
    const struct threshold threshold = {&zero, 0};
    if (!p->taps) {
        p->set->pack_linear(p->x + row * p->inputs, p->inputs, 1, p->inputs, threshold, words, words_of(p->inputs));
        return;
    }
    const float *x = p->x + row * p->inputs * p->taps;
    for (int64_t input = 0; input < p->inputs; input++) {
        for (int64_t tap = 0; tap < p->taps; tap++) {
            floats[tap * p->inputs + input] = *x++;
        }
    }
    p->set->pack_rows(floats, p->inputs, p->taps, p->inputs, threshold, words, words_of(p->inputs));
}

static void ranges_of_rows(int64_t begin, int64_t end, void *context)
{
    struct panels *p = context;
    const int64_t words = words_of(p->inputs) * (p->taps ? p->taps : 1);
    uint32_t *row = malloc((size_t)words * sizeof *row + (size_t)(p->inputs * p->taps) * sizeof(float) + 1);
    if (!row) {
        p->failed = 1;
        return;
    }
    for (int64_t panel = begin; panel < end; panel++) {
        uint32_t *out = p->out + panel * words * PANEL;
        for (int64_t i = 0; i < PANEL; i++) {
            const int64_t output = panel * PANEL + i;
            if (output < p->rows) {
                pack_weight(p, output, (float *)(row + words), row);
            } else {
                memset(row, 0, (size_t)words * sizeof *row);
            }
            for (int64_t word = 0; word < words; word++) {
                out[word * PANEL + i] = row[word];
            }
        }
    }
    free(row);
}

int hf_bnn_pack_weight(int64_t set, parallel_for pool, const float *x, int64_t rows, int64_t inputs, int64_t taps,
                       uint32_t *out)
{
    struct panels p = {instruction_set(set), x, rows, inputs, taps, out, 0};
    for_range(pool, divide_up(rows, PANEL), ranges_of_rows, &p);
    return p.failed ? OUT_OF_MEMORY : OK;
}

struct products {
    const struct instruction_set *set;
    const float *left, *right;
    int64_t rows, inputs, outputs;
    const float *ones, *nothing; /* scale and offset: [outputs] */
    float *out;
    int failed;
};

static void ranges_of_products(int64_t begin, int64_t end, void *context)
{
    static const float zero = 0;
    struct products *p = context;
    const int64_t words = words_of(p->inputs), panels = divide_up(p->outputs, PANEL), run = 0;
    const struct threshold threshold = {&zero, 0};
    uint32_t *bits = malloc((size_t)((panels * PANEL + BLOCK_ROWS) * words) * sizeof *bits + 1);
    if (!bits) {
        p->failed = 1;
        return;
    }
    uint32_t *weights = bits + BLOCK_ROWS * words;
    const struct product product = {weights, p->inputs, p->outputs, &run, 1, words, p->ones, p->outputs};
    for (int64_t i = begin; i < end; i++) {
        const float *left = p->left + i * p->rows * p->inputs;
        struct panels right = {p->set, p->right + i * p->outputs * p->inputs, p->outputs, p->inputs, 0, weights, 0};
        ranges_of_rows(0, panels, &right);
        p->failed |= right.failed;
        for (int64_t row = 0; row < p->rows; row += BLOCK_ROWS) {
            struct block block = {.count = smaller(BLOCK_ROWS, p->rows - row)};
            p->set->pack_linear(left + row * p->inputs, p->inputs, block.count, p->inputs, threshold, bits, words);
            for (int64_t j = 0; j < block.count; j++) {
                block.rows[j] = bits + j * words;
                block.offsets[j] = p->nothing;
            }
            p->set->multiply_linear(&product, &block, 0, panels, p->out + (i * p->rows + row) * p->outputs);
        }
    }
    free(bits);
}

int hf_bnn_sign_products(int64_t set, parallel_for pool, const float *left, const float *right, int64_t batch,
                         int64_t rows, int64_t inputs, int64_t outputs, float *out)
{
    float *constants = malloc((size_t)(2 * outputs) * sizeof *constants + 1);
    if (!constants) {
        return OUT_OF_MEMORY;
    }
    for (int64_t i = 0; i < outputs; i++) {
        constants[i] = 1.0f;
        constants[outputs + i] = -0.0f;
    }
    struct products p = {instruction_set(set), left, right, rows, inputs, outputs, constants, constants + outputs, out, 0};
    for_range(pool, batch, ranges_of_products, &p);
    free(constants);
    return p.failed ? OUT_OF_MEMORY : OK;
}
