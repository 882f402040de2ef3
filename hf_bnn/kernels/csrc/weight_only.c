/* Float inputs times binary weights: (rows, inputs) and panels to (rows, outputs). */
#include <stdlib.h>

#include "kernels.h"

enum { ROWS_AT_ONCE = 4 };

struct weight_only {
    const struct linear_plan *plan;
    const struct instruction_set *set;
    const float *x;
    float *prepared, *out;
    int64_t row_step, rows, panels_per_part;
};

static void prepare_rows(const struct weight_only *w)
{
    const int64_t size = w->set->prepared_size(w->plan->inputs);
    for (int64_t row = 0; row < w->rows; row++) {
        w->set->prepare_inputs(w->x + row * w->row_step, w->plan->inputs, w->prepared + row * size);
    }
}

static void multiply_panels(int64_t begin, int64_t end, void *context)
{
    const struct weight_only *w = context;
    const struct linear_plan *p = w->plan;
    const int64_t panels = divide_up(p->outputs, PANEL);
    const int64_t first = begin * w->panels_per_part, last = smaller(panels, end * w->panels_per_part);
    w->set->multiply_floats(p->weights, w->prepared, w->rows, p->inputs, p->outputs, first, last, p->scale, p->offset,
                            w->out);
}

/* Takes a few rows at a time, so that their prepared inputs stay in the cache. */
int hf_bnn_linear_weight_only(const struct linear_plan *plan, const float *x, int64_t row_step, int64_t rows,
                              int64_t threads, float *out)
{
    const parallel_for pool = threads > 1 ? plan->pool : NULL;
    const int64_t panels = divide_up(plan->outputs, PANEL), at_once = smaller(rows, ROWS_AT_ONCE);
    struct weight_only w = {.plan = plan, .set = instruction_set(plan->set), .row_step = row_step};
    w.prepared = malloc((size_t)(at_once * w.set->prepared_size(plan->inputs)) * sizeof *w.prepared + 1);
    if (!w.prepared) {
        return OUT_OF_MEMORY;
    }
    w.panels_per_part = divide_up(panels, threads);
    for (int64_t row = 0; row < rows && panels; row += at_once) {
        w.x = x + row * row_step;
        w.out = out + row * plan->outputs;
        w.rows = smaller(at_once, rows - row);
        prepare_rows(&w);
        for_range(pool, divide_up(panels, w.panels_per_part), multiply_panels, &w);
    }
    free(w.prepared);
    return OK;
}
