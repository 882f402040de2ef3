/* The end of a network's stem: maximum pooling, then batch normalization. */
#include "kernels.h"

struct pooling {
    const struct instruction_set *set;
    const struct pool_shape *shape;
    const float *x, *alpha, *beta;
    int fused;
    float *out;
};

static void pool_rows(int64_t begin, int64_t end, void *context)
{
    const struct pooling *p = context;
    const struct pool_shape *s = p->shape;
    for (int64_t i = begin; i < end; i++) {
        const float *image = p->x + i / s->out_height * s->height * s->width * s->channels;
        float *out = p->out + i * s->out_width * s->channels;
        p->set->max_pool(s, image, i % s->out_height, p->alpha, p->beta, p->fused, out);
    }
}

int hf_bnn_max_pool(int64_t set, parallel_for pool, const struct pool_shape *shape, const float *x,
                    const float *alpha, const float *beta, int fused, float *out)
{
    struct pooling p = {instruction_set(set), shape, x, alpha, beta, fused, out};
    for_range(pool, shape->batch * shape->out_height, pool_rows, &p);
    return OK;
}
