/* Binary inputs times binary weights: (rows, inputs) and panels to (rows, outputs). */
#include <stdlib.h>

#include "kernels.h"

enum { FEW_ROWS = 16 }; /* for each thread: with fewer the threads share the outputs instead */

struct linear {
    const struct linear_plan *plan;
    const struct instruction_set *set;
    const float *x;
    int64_t row_step, rows;
    struct product product;
    float *out;
    uint32_t *bits; /* [part][row][word] of all rows, or NULL: then each block packs its own */
    int64_t panels, part_panels, rows_per_block, panels_per_thread;
    int failed;
};

/* The bits of rows as a part of the outputs sees them. */
static void pack(const struct linear *l, int64_t part, int64_t first, int64_t count, uint32_t *bits)
{
    const int64_t step = l->plan->per_input ? l->plan->inputs : 1;
    const struct threshold threshold = {l->plan->thresholds + part * step, l->plan->per_input != 0};
    l->set->pack_linear(l->x + first * l->row_step, l->row_step, count, l->plan->inputs, threshold, bits,
                        l->product.run_words);
}

static void multiply_rows(const struct linear *l, int64_t first, int64_t count, const uint32_t *bits,
                          int64_t first_panel, int64_t last_panel)
{
    struct block block;
    block.count = count;
    for (int64_t i = 0; i < count; i++) {
        block.rows[i] = bits + i * l->product.run_words;
        block.offsets[i] = l->plan->offset;
        block.missing[i] = NULL;
    }
    l->set->multiply_linear(&l->product, &block, first_panel, last_panel,
                            l->out + first * l->plan->outputs + first_panel * PANEL);
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
        for (int64_t part = 0; part < l->plan->parts; part++) {
            pack(l, part, first, count, bits);
            multiply_rows(l, first, count, bits, part * l->part_panels, (part + 1) * l->part_panels);
        }
    }
    free(bits);
}

/* Ranges of the outputs, for few rows, whose bits are there already. */
static void ranges_of_panels(int64_t begin, int64_t end, void *context)
{
    struct linear *l = context;
    const int64_t words = l->product.run_words, stop = smaller(l->panels, end * l->panels_per_thread);
    for (int64_t first = begin * l->panels_per_thread, last; first < stop; first = last) {
        const int64_t part = first / l->part_panels;
        last = smaller(stop, (part + 1) * l->part_panels);
        for (int64_t row = 0; row < l->rows; row += BLOCK_ROWS) {
            int64_t count = smaller(BLOCK_ROWS, l->rows - row);
            multiply_rows(l, row, count, l->bits + (part * l->rows + row) * words, first, last);
        }
    }
}

int hf_bnn_linear(const struct linear_plan *plan, const float *x, int64_t row_step, int64_t rows, int64_t threads,
                  float *out)
{
    const parallel_for pool = threads > 1 ? plan->pool : NULL;
    const int64_t run = 0, words = words_of(plan->inputs), panels = divide_up(plan->outputs, PANEL);
    struct linear l = {
        .plan = plan,
        .set = instruction_set(plan->set),
        .x = x,
        .row_step = row_step,
        .rows = rows,
        .product = {plan->weights, plan->inputs, plan->outputs, &run, 1, words, plan->scale, plan->outputs},
        .out = out,
        .panels = panels,
        .part_panels = divide_up(panels, plan->parts),
    };
    if (!pool || rows >= FEW_ROWS * threads) {
        l.rows_per_block = block_rows(rows, threads);
        for_range(pool, divide_up(rows, l.rows_per_block), blocks_of_rows, &l);
        return l.failed ? OUT_OF_MEMORY : OK;
    }
    l.bits = malloc((size_t)(plan->parts * rows * words) * sizeof *l.bits + 1);
    if (!l.bits) {
        return OUT_OF_MEMORY;
    }
    for (int64_t part = 0; part < plan->parts; part++) {
        pack(&l, part, 0, rows, l.bits + part * rows * words);
    }
    l.panels_per_thread = divide_up(panels, threads);
    for_range(pool, panels ? threads : 0, ranges_of_panels, &l);
    free(l.bits);
    return OK;
}
