/* Float inputs times binary weights: (rows, inputs) and panels to (rows, outputs). */
#include <stdlib.h>

#include "kernels.h"

enum { ROWS_AT_ONCE = 4 };

struct weight_only {
    const struct instruction_set *set;
    const float *x, *scale, *offset;
    const uint32_t *weights;
    float *prepared, *out;
    int64_t row_step, rows, inputs, outputs, panels_per_part;
};

static void prepare_rows(int64_t begin, int64_t end, void *context)
{
    const struct weight_only *w = context;
    const int64_t size = w->set->prepared_size(w->inputs);
    for (int64_t row = begin; row < end; row++) {
        w->set->prepare_inputs(w->x + row * w->row_step, w->inputs, w->prepared + row * size);
    }
}

static void multiply_panels(int64_t begin, int64_t end, void *context)
{
    const struct weight_only *w = context;
    const int64_t panels = divide_up(w->outputs, PANEL);
    const int64_t first = begin * w->panels_per_part, last = smaller(panels, end * w->panels_per_part);
    w->set->multiply_floats(w->weights, w->prepared, w->rows, w->inputs, w->outputs, first, last, w->scale, w->offset,
                            w->out);
}

/* A few rows at a time: what is prepared of them stays in the cache. */
int hf_bnn_linear_weight_only(int64_t set, parallel_for pool, int64_t threads, const float *x,
                              int64_t row_step, int64_t rows, int64_t inputs, const uint32_t *weights,
                              int64_t outputs, const float *scale, const float *offset, float *out)
{
    struct weight_only w = {.set = instruction_set(set), .scale = scale, .offset = offset, .weights = weights,
                            .row_step = row_step, .inputs = inputs, .outputs = outputs};
    const int64_t panels = divide_up(outputs, PANEL);
    w.prepared = malloc((size_t)(ROWS_AT_ONCE * w.set->prepared_size(inputs)) * sizeof *w.prepared + 1);
    if (!w.prepared) {
        return OUT_OF_MEMORY;
    }
    w.panels_per_part = divide_up(panels, threads);
    for (int64_t row = 0; row < rows && panels; row += ROWS_AT_ONCE) {
        w.x = x + row * row_step;
        w.out = out + row * outputs;
        w.rows = smaller(ROWS_AT_ONCE, rows - row);
        prepare_rows(0, w.rows, &w);
        for_range(pool, divide_up(panels, w.panels_per_part), multiply_panels, &w);
    }
    free(w.prepared);
    return OK;
}
