/* Pixels at the border of an image, where a part of the kernel lies in the padding. */
#include "conv2d.h"

static int64_t clamped(int64_t value, int64_t low, int64_t high)
{
    return value < low ? low : value > high ? high : value;
}

/* Rounds up for negative numbers, too. */
static int64_t ceiling(int64_t a, int64_t b) { return a > 0 ? divide_up(a, b) : -(-a / b); }

int64_t classify(const struct conv2d_shape *s, int axis, int64_t *class_of, struct range *ranges)
{
    int64_t size = axis ? s->width : s->height, count = axis ? s->out_width : s->out_height, classes = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t start = i * s->stride[axis] - s->padding[axis], k = s->kernel[axis], d = s->dilation[axis];
        struct range r = {clamped(ceiling(-start, d), 0, k), clamped(ceiling(size - start, d), 0, k)};
        r.last = r.last < r.first ? r.first : r.last;
        int64_t c = 0;
        while (c < classes && (ranges[c].first != r.first || ranges[c].last != r.last)) {
            c++;
        }
        ranges[c] = r;
        class_of[i] = c;
        classes = c == classes ? classes + 1 : classes;
    }
    return classes;
}

void fill_border_tables(const struct conv2d *c, const int32_t *corners, const float *shift, const float *bias,
                        float *offsets, int32_t *missing)
{
    const int64_t n = c->shape->outputs, line = c->shape->kernel[1] + 1;
    const int32_t *all = corners + (line * c->shape->kernel[0] + c->shape->kernel[1]) * n;
    for (int64_t i = 0; i < c->row_classes * c->column_classes; i++) {
        struct range y = c->rows[i / c->column_classes], x = c->columns[i % c->column_classes];
        const int32_t *last = corners + (y.last * line + x.last) * n, *left = corners + (y.last * line + x.first) * n;
        const int32_t *above = corners + (y.first * line + x.last) * n;
        const int32_t *both = corners + (y.first * line + x.first) * n;
        for (int64_t k = 0; k < n; k++) {
            int32_t seen = last[k] - left[k] - above[k] + both[k];
            missing[i * n + k] = all[k] - seen;
            offsets[i * n + k] = shift ? (float)seen * shift[k] + bias[k] : bias[k];
        }
    }
}
