/* Binary inputs times binary weights: (rows, inputs) and panels to (rows, outputs). */
#include <stdlib.h>

#include "kernels.h"

enum { FEW_ROWS = 16 }; /* for each thread: with fewer the threads share the outputs instead */

struct linear {
    const struct instruction_set *set;
    const float *x;
    int64_t row_step, rows;
    struct threshold threshold;
    struct product product;
    const float *offset;
    float *out;
    uint32_t *bits; /* of all rows, or NULL: then each block packs its own */
    int64_t rows_per_block, panels_per_part;
    int failed;
};

static void pack(const struct linear *l, int64_t first, int64_t count, uint32_t *bits)
{
    l->set->pack_rows(l->x + first * l->row_step, l->row_step, count, l->product.inputs, l->threshold, bits,
                      l->product.run_words);
}

static void multiply_rows(const struct linear *l, int64_t first, int64_t count, const uint32_t *bits,
                          int64_t first_panel, int64_t last_panel)
{
    struct block block = {.count = count};
    for (int64_t i = 0; i < count; i++) {
        block.rows[i] = bits + i * l->product.run_words;
        block.offsets[i] = l->offset;
    }
    float *out = l->out + first * l->product.outputs + first_panel * PANEL;
    l->set->multiply(&l->product, &block, first_panel, last_panel, out);
}

/* Parts of many rows: each packs its own block of them, which then lies in the nearest cache. */
static void blocks_of_rows(int64_t begin, int64_t end, void *context)
{
    struct linear *l = context;
    uint32_t *bits = malloc((size_t)(l->rows_per_block * l->product.run_words) * sizeof *bits + 1);
    if (!bits) {
        l->failed = 1;
        return;
    }
    for (int64_t i = begin; i < end; i++) {
        int64_t first = i * l->rows_per_block, count = smaller(l->rows_per_block, l->rows - first);
        pack(l, first, count, bits);
        multiply_rows(l, first, count, bits, 0, divide_up(l->product.outputs, PANEL));
    }
    free(bits);
}

/* Parts of the outputs, for few rows, whose bits are there already. */
static void ranges_of_panels(int64_t begin, int64_t end, void *context)
{
    struct linear *l = context;
    int64_t panels = divide_up(l->product.outputs, PANEL);
    for (int64_t i = begin; i < end; i++) {
        int64_t first = i * l->panels_per_part, last = smaller(panels, first + l->panels_per_part);
        for (int64_t row = 0; row < l->rows; row += BLOCK_ROWS) {
            int64_t count = smaller(BLOCK_ROWS, l->rows - row);
            multiply_rows(l, row, count, l->bits + row * l->product.run_words, first, last);
        }
    }
}

int hf_bnn_linear(int64_t set, parallel_for pool, int64_t threads, const float *x, int64_t row_step,
                  int64_t rows, int64_t inputs, const float *threshold, int per_input,
                  const uint32_t *weights, int64_t outputs, const float *scale, const float *offset,
                  float *out)
{
    const int64_t run = 0;
    struct linear l = {
        .set = instruction_set(set),
        .x = x,
        .row_step = row_step,
        .rows = rows,
        .threshold = {threshold, per_input},
        .product = {weights, inputs, outputs, &run, 1, words_of(inputs), scale, outputs},
        .offset = offset,
        .out = out,
    };
    if (!pool || rows >= FEW_ROWS * threads) {
        l.rows_per_block = block_rows(rows, threads);
        for_range(pool, divide_up(rows, l.rows_per_block), blocks_of_rows, &l);
        return l.failed ? OUT_OF_MEMORY : OK;
    }
    l.bits = malloc((size_t)(rows * l.product.run_words) * sizeof *l.bits + 1);
    if (!l.bits) {
        return OUT_OF_MEMORY;
    }
    pack(&l, 0, rows, l.bits);
    l.panels_per_part = divide_up(divide_up(outputs, PANEL), threads);
    for_range(pool, l.panels_per_part ? threads : 0, ranges_of_panels, &l);
    free(l.bits);
    return OK;
}
