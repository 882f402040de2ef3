/* Binary convolution as an implicit product of matrices: the window of an output pixel is a row.
 *
 * Images become bits with their channels last and a border of bits 0, so that a window is a few runs of consecutive
 * words. Bits 0 stand for +1, but padding is exactly zero: border pixels subtract the sum of the weights that lie in
 * the padding, which they take from a table of sums over corner rectangles of the kernel.
 */
#include <stdlib.h>

#include "kernels.h"

/* The range [first, last) of a kernel's rows (or columns) that hit the image, and which outputs share it. */
struct range {
    int64_t first, last;
};

struct conv2d {
    const struct instruction_set *set;
    const struct conv2d_shape *shape;
    const float *x;
    struct threshold threshold;
    struct product product; /* of the first group */
    const float *offsets;   /* [row class][column class][outputs] */
    const int32_t *missing; /* the same */
    int64_t *row_class, *column_class;
    struct range *rows, *columns;
    int64_t row_classes, column_classes;
    float *out;
    uint32_t *bits; /* [batch][padded height][padded width][groups][words] */
    int64_t group_words, pixel_words, padded_height, padded_width;
    int64_t rows_per_part, parts_per_image, pixels_per_block;
    int failed;
};

static int64_t clamped(int64_t value, int64_t low, int64_t high)
{
    return value < low ? low : value > high ? high : value;
}

/* Rounds up for negative numbers, too. */
static int64_t ceiling(int64_t a, int64_t b) { return a > 0 ? divide_up(a, b) : -(-a / b); }

/* Sorts the outputs along one axis into classes that see the same range of the kernel; returns how many there are. */
static int64_t classify(const struct conv2d_shape *s, int axis, int64_t *class_of, struct range *ranges)
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

/* `corners`: [kh + 1][kw + 1][outputs], sums of the weights above and left of a corner. */
static void fill_border_tables(const struct conv2d *c, const int32_t *corners, const float *shift, const float *bias,
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

static uint32_t *padded_row(const struct conv2d *c, int64_t image, int64_t row)
{
    return c->bits + (image * c->padded_height + row) * c->padded_width * c->pixel_words;
}

/* The bits of `rows` rows of an image, [pixel][group][word], without a border. */
static void pack_rows_of_image(const struct conv2d *c, const float *x, int64_t rows, uint32_t *out)
{
    const struct conv2d_shape *s = c->shape;
    const int64_t channels = s->channels / s->groups;
    for (int64_t g = 0; g < s->groups; g++) {
        struct threshold t = c->threshold;
        t.values += t.per_input ? g * channels : 0;
        const float *from = x + g * channels * s->channel_step;
        uint32_t *to = out + g * c->group_words;
        if (s->pixel_step == 1 && s->row_step == s->width) {
            c->set->pack_planes(from, s->channel_step, rows * s->width, channels, t, to, c->pixel_words);
            continue;
        }
        for (int64_t row = 0; row < rows; row++, from += s->row_step, to += s->width * c->pixel_words) {
            if (s->channel_step == 1) {
                c->set->pack_rows(from, s->pixel_step, s->width, channels, t, to, c->pixel_words);
            } else {
                c->set->pack_planes(from, s->channel_step, s->width, channels, t, to, c->pixel_words);
            }
        }
    }
}

static void clear_border(const struct conv2d *c, int64_t image)
{
    const size_t row_bytes = (size_t)(c->padded_width * c->pixel_words) * sizeof *c->bits;
    const int64_t top = c->shape->padding[0], bottom = top + c->shape->height;
    for (int64_t row = 0; row < c->padded_height; row++) {
        uint32_t *bits = padded_row(c, image, row);
        if (row < top || row >= bottom) {
            memset(bits, 0, row_bytes);
        } else {
            const size_t margin = (size_t)(c->shape->padding[1] * c->pixel_words);
            memset(bits, 0, margin * sizeof *bits);
            memset(bits + margin + c->shape->width * c->pixel_words, 0, margin * sizeof *bits);
        }
    }
}

static void pack_parts(int64_t begin, int64_t end, void *context)
{
    struct conv2d *c = context;
    const struct conv2d_shape *s = c->shape;
    const size_t row_words = (size_t)(s->width * c->pixel_words);
    uint32_t *bits = malloc((size_t)c->rows_per_part * row_words * sizeof *bits + 1);
    if (!bits) {
        c->failed = 1;
        return;
    }
    for (int64_t i = begin; i < end; i++) {
        int64_t image = i / c->parts_per_image, first = i % c->parts_per_image * c->rows_per_part;
        int64_t rows = smaller(c->rows_per_part, s->height - first);
        if (first == 0) {
            clear_border(c, image);
        }
        pack_rows_of_image(c, c->x + image * s->image_step + first * s->row_step, rows, bits);
        for (int64_t row = 0; row < rows; row++) {
            uint32_t *to = padded_row(c, image, s->padding[0] + first + row) + s->padding[1] * c->pixel_words;
            memcpy(to, bits + (size_t)row * row_words, row_words * sizeof *bits);
        }
    }
    free(bits);
}

/* What `multiply` needs to know of the pixels [first, first + count), counted through all images, in group g. */
static void find_pixels(const struct conv2d *c, int64_t first, int64_t g, struct block *block)
{
    const struct conv2d_shape *s = c->shape;
    const int64_t outputs = s->outputs / s->groups;
    int64_t x = first % s->out_width, y = first / s->out_width % s->out_height;
    int64_t image = first / s->out_width / s->out_height;
    for (int64_t i = 0; i < block->count; i++) {
        struct range rows = c->rows[c->row_class[y]], columns = c->columns[c->column_class[x]];
        int whole = rows.last - rows.first == s->kernel[0] && columns.last - columns.first == s->kernel[1];
        int64_t entry = (c->row_class[y] * c->column_classes + c->column_class[x]) * s->outputs + g * outputs;
        block->rows[i] = padded_row(c, image, y * s->stride[0]);
        block->rows[i] += x * s->stride[1] * c->pixel_words + g * c->group_words;
        block->offsets[i] = c->offsets + entry;
        block->missing[i] = whole ? NULL : c->missing + entry;
        if (++x == s->out_width) {
            x = 0;
            if (++y == s->out_height) {
                y = 0;
                image++;
            }
        }
    }
}

static void multiply_blocks(int64_t begin, int64_t end, void *context)
{
    const struct conv2d *c = context;
    const struct conv2d_shape *s = c->shape;
    const int64_t panels = divide_up(s->outputs / s->groups, PANEL);
    const int64_t panel_words = c->product.run_count * c->product.run_words * PANEL;
    for (int64_t i = begin; i < end; i++) {
        int64_t first = i * c->pixels_per_block, pixels = s->batch * s->out_height * s->out_width;
        for (int64_t g = 0; g < s->groups; g++) {
            struct product product = c->product;
            struct block block = {.count = smaller(c->pixels_per_block, pixels - first)};
            product.weights += g * panels * panel_words;
            product.scale += g * product.outputs;
            find_pixels(c, first, g, &block);
            c->set->multiply(&product, &block, 0, panels, c->out + first * s->outputs + g * product.outputs);
        }
    }
}

/* The runs of words of a window. Neighbouring taps are neighbours in memory if nothing lies between them. */
static void find_runs(struct conv2d *c, int64_t *runs)
{
    const struct conv2d_shape *s = c->shape;
    const int joined = s->groups == 1 && s->dilation[1] == 1;
    const int64_t per_line = joined ? 1 : s->kernel[1];
    c->product.run_count = s->kernel[0] * per_line;
    c->product.run_words = joined ? s->kernel[1] * c->group_words : c->group_words;
    for (int64_t i = 0; i < c->product.run_count; i++) {
        int64_t y = i / per_line * s->dilation[0], x = i % per_line * s->dilation[1];
        runs[i] = (y * c->padded_width + x) * c->pixel_words;
    }
    c->product.runs = runs;
}

static int convolve(struct conv2d *c, parallel_for pool, int64_t threads, const int32_t *corners, const float *shift,
                    const float *bias)
{
    const struct conv2d_shape *s = c->shape;
    const int64_t classes = c->row_classes * c->column_classes, pixels = s->batch * s->out_height * s->out_width;
    float *offsets = malloc((size_t)(classes * s->outputs) * sizeof *offsets + 1);
    int32_t *missing = malloc((size_t)(classes * s->outputs) * sizeof *missing + 1);
    c->bits = malloc((size_t)(s->batch * c->padded_height * c->padded_width * c->pixel_words) * sizeof *c->bits + 1);
    c->failed = !offsets || !missing || !c->bits;
    if (!c->failed) {
        fill_border_tables(c, corners, shift, bias, offsets, missing);
        c->offsets = offsets;
        c->missing = missing;
        c->rows_per_part = smaller(s->height, divide_up(BLOCK_ROWS, s->width));
        c->parts_per_image = divide_up(s->height, c->rows_per_part);
        for_range(pool, s->batch * c->parts_per_image, pack_parts, c);
    }
    if (!c->failed) {
        c->pixels_per_block = block_rows(pixels, threads);
        for_range(pool, divide_up(pixels, c->pixels_per_block), multiply_blocks, c);
    }
    free(c->bits);
    free(missing);
    free(offsets);
    return c->failed ? OUT_OF_MEMORY : OK;
}

int hf_bnn_conv2d(int64_t set, parallel_for pool, int64_t threads, const struct conv2d_shape *shape,
                  const float *x, const float *threshold, int per_input, const uint32_t *weights,
                  const int32_t *corners, const float *scale, const float *shift, const float *bias,
                  float *out)
{
    const int64_t group_words = words_of(shape->channels / shape->groups), taps = shape->kernel[0] * shape->kernel[1];
    const size_t lines = (size_t)(shape->out_height + shape->out_width);
    struct conv2d c = {
        .set = instruction_set(set),
        .shape = shape,
        .x = x,
        .threshold = {threshold, per_input},
        .product = {.weights = weights,
                    .inputs = shape->channels / shape->groups * taps,
                    .outputs = shape->outputs / shape->groups,
                    .scale = scale,
                    .out_step = shape->outputs},
        .out = out,
        .group_words = group_words,
        .pixel_words = group_words * shape->groups,
        .padded_height = shape->height + 2 * shape->padding[0],
        .padded_width = shape->width + 2 * shape->padding[1],
    };
    int64_t *runs = malloc((size_t)taps * sizeof *runs);
    c.row_class = malloc(lines * sizeof *c.row_class);
    c.rows = malloc(lines * sizeof *c.rows);
    int result = OUT_OF_MEMORY;
    if (runs && c.row_class && c.rows) {
        c.column_class = c.row_class + shape->out_height;
        c.columns = c.rows + shape->out_height;
        c.row_classes = classify(shape, 0, c.row_class, c.rows);
        c.column_classes = classify(shape, 1, c.column_class, c.columns);
        find_runs(&c, runs);
        result = convolve(&c, pool, threads, corners, shift, bias);
    }
    free(c.rows);
    free(c.row_class);
    free(runs);
    return result;
}
