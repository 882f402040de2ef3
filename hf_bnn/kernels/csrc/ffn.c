/* Two binary layers. Of the hidden values only signs are kept; the values never leave the nearest cache. */
#include <stdlib.h>

#include "kernels.h"

struct ffn {
    const struct ffn_plan *plan;
    const struct instruction_set *set;
    const float *x;
    int64_t row_step, rows;
    struct threshold threshold;
    struct product first, second;
    float *out;
    int64_t rows_per_block;
    int failed;
};

static void set_rows(struct block *block, int64_t count, const uint32_t *bits, int64_t words, const float *offset)
{
    memset(block, 0, sizeof *block);
    block->count = count;
    for (int64_t i = 0; i < count; i++) {
        block->rows[i] = bits + i * words;
        block->offsets[i] = offset;
    }
}

/* The hidden bits of a block: 1 where low <= h < high. `block` has the rows of the first product. */
static void find_hidden_bits(const struct ffn *f, const struct block *block, uint32_t *hidden)
{
    float values[BLOCK_ROWS * CHUNK];
    uint32_t below[BLOCK_ROWS * 2];
    const int64_t size = f->first.outputs, step = words_of(size);
    struct product product = f->first;
    product.out_step = CHUNK;
    for (int64_t column = 0; column < size; column += CHUNK) {
        const int64_t count = smaller(CHUNK, size - column), panel = column / PANEL;
        uint32_t *to = hidden + column / 32;
        f->set->multiply_linear(&product, block, panel, panel + divide_up(count, PANEL), values);
        f->set->pack_rows(values, CHUNK, block->count, count, (struct threshold){&f->plan->high, 0}, to, step);
        f->set->pack_rows(values, CHUNK, block->count, count, (struct threshold){&f->plan->low, 0}, below, 2);
        for (int64_t row = 0; row < block->count; row++) { /* a value < low is also < high */
            uint32_t *pair = to + row * step, before = column ? pair[-1] : 0;
            pair[0] ^= below[2 * row] ^ before;
            pair[1] ^= below[2 * row + 1] ^ before;
        }
    }
}

static void ffn_blocks(int64_t begin, int64_t end, void *context)
{
    struct ffn *f = context;
    const int64_t in_words = words_of(f->first.inputs), hidden_words = words_of(f->first.outputs);
    uint32_t *bits = malloc((size_t)(BLOCK_ROWS * (in_words + hidden_words)) * sizeof *bits + 1);
    if (!bits) {
        f->failed = 1;
        return;
    }
    uint32_t *hidden = bits + BLOCK_ROWS * in_words;
    for (int64_t i = begin; i < end; i++) {
        int64_t row = i * f->rows_per_block, count = smaller(f->rows_per_block, f->rows - row);
        struct block block;
        f->set->pack_linear(f->x + row * f->row_step, f->row_step, count, f->first.inputs, f->threshold, bits, in_words);
        set_rows(&block, count, bits, in_words, f->plan->first.offset);
        find_hidden_bits(f, &block, hidden);
        set_rows(&block, count, hidden, hidden_words, f->plan->second.offset);
        f->set->multiply_linear(&f->second, &block, 0, divide_up(f->second.outputs, PANEL), f->out + row * f->second.outputs);
    }
    free(bits);
}

static struct product product_of(const struct linear_plan *plan, const int64_t *run)
{
    return (struct product){plan->weights,          plan->inputs, plan->outputs, run, 1,
                            words_of(plan->inputs), plan->scale,  plan->outputs};
}

int hf_bnn_ffn(const struct ffn_plan *plan, const float *x, int64_t row_step, int64_t rows, int64_t threads, float *out)
{
    const int64_t run = 0;
    const struct linear_plan *first = &plan->first;
    const parallel_for pool = threads > 1 ? first->pool : NULL;
    struct ffn f = {
        .plan = plan,
        .set = instruction_set(first->set),
        .x = x,
        .row_step = row_step,
        .rows = rows,
        .threshold = {first->thresholds, first->per_input != 0},
        .first = product_of(first, &run),
        .second = product_of(&plan->second, &run),
        .out = out,
        .rows_per_block = block_rows(rows, threads),
    };
    for_range(pool, divide_up(rows, f.rows_per_block), ffn_blocks, &f);
    return f.failed ? OUT_OF_MEMORY : OK;
}
