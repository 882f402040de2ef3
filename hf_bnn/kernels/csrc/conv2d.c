/* Binary convolution as an implicit product of matrices: the window of an output pixel is a row.
 *
 * Images become bits with their channels last and a border of bits 0, so that a window is a few runs of consecutive
 * words. Bits 0 stand for +1, but padding is exactly zero: border pixels subtract the sum of the weights that lie in
 * the padding, which they take from a table of sums over corner rectangles of the kernel.
 *
 * The windows are multiplied by `multiply` in tile.inc, which every instruction set (avx2.c, ...) compiles for itself.
 */
#include <stdlib.h>

#include "conv2d.h"

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

/* Rows [first, first + rows) of an image, without a border, to where they go inside of theirs. */
static void place_rows(const struct conv2d *c, int64_t image, int64_t first, int64_t rows, const uint32_t *bits)
{
    const struct conv2d_shape *s = c->shape;
    const size_t row_words = (size_t)(s->width * c->pixel_words);
    for (int64_t row = 0; row < rows; row++) {
        uint32_t *to = padded_row(c, image, s->padding[0] + first + row) + s->padding[1] * c->pixel_words;
        memcpy(to, bits + (size_t)row * row_words, row_words * sizeof *bits);
    }
}

static void place_images(int64_t begin, int64_t end, void *context)
{
    const struct conv2d *c = context;
    const struct conv2d_shape *s = c->shape;
    for (int64_t image = begin; image < end; image++) {
        clear_border(c, image);
        place_rows(c, image, 0, s->height, c->in_bits + image * s->height * s->width * c->pixel_words);
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
        place_rows(c, image, first, rows, bits);
    }
    free(bits);
}

/* What `multiply` needs to know of the pixels [first, first + count), counted through all images, in group g. */
static void find_pixels(const struct conv2d *c, int64_t first, int64_t g, struct block *block)
{
    const struct conv2d_shape *s = c->shape;
    const int64_t step = s->stride[1] * c->pixel_words, outputs = g * (s->outputs / s->groups);
    int64_t x = first % s->out_width, line = first / s->out_width;
    for (int64_t i = 0; i < block->count; x = 0, line++) {
        const int64_t y = line % s->out_height, last = smaller(s->out_width, x + block->count - i);
        const int64_t classes = c->row_class[y] * c->column_classes;
        const struct range rows = c->rows[c->row_class[y]];
        const int whole = rows.last - rows.first == s->kernel[0];
        const uint32_t *bits = padded_row(c, line / s->out_height, y * s->stride[0]) + g * c->group_words + x * step;
        for (; x < last; x++, i++, bits += step) {
            const struct range columns = c->columns[c->column_class[x]];
            const int64_t entry = (classes + c->column_class[x]) * s->outputs + outputs;
            block->rows[i] = bits;
            block->offsets[i] = c->offsets + entry;
            block->missing[i] = whole && columns.last - columns.first == s->kernel[1] ? NULL : c->missing + entry;
        }
    }
}

/* The outputs of a block, CHUNK of them at a time, and what follows the convolution while they are in the cache. */
static void multiply_and_finish(const struct conv2d *c, const struct block *block, int64_t first)
{
    float sums[BLOCK_ROWS * CHUNK];
    const int64_t outputs = c->shape->outputs, words = words_of(outputs);
    const int64_t group = c->layer->epilogue.shortcut_group;
    struct product product = c->product;
    product.out_step = CHUNK;
    for (int64_t begin = 0; begin < outputs; begin += CHUNK) {
        const int64_t count = smaller(CHUNK, outputs - begin), panel = begin / PANEL;
        float *to = c->out ? c->out + first * outputs + begin : sums;
        const int64_t to_step = c->out ? outputs : CHUNK;
        c->set->multiply(&product, block, panel, panel + divide_up(count, PANEL), sums);
        c->set->finish(&c->layer->epilogue, begin, count, block->count, sums,
                       c->shortcut ? c->shortcut + (first * outputs + begin) * group : NULL, outputs * group, to,
                       to_step);
        if (c->out_bits) {
            struct threshold t = c->next_threshold;
            t.values += t.per_input ? begin : 0;
            c->set->pack_rows(to, to_step, block->count, count, t, c->out_bits + first * words + begin / 32, words);
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
            struct block block;
            block.count = smaller(c->pixels_per_block, pixels - first);
            product.weights += g * panels * panel_words;
            product.scale += g * product.outputs;
            find_pixels(c, first, g, &block);
            if (c->finishes) {
                multiply_and_finish(c, &block, first);
            } else {
                c->set->multiply(&product, &block, 0, panels, c->out + first * s->outputs + g * product.outputs);
            }
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
        if (c->x) {
            for_range(pool, s->batch * c->parts_per_image, pack_parts, c);
        } else {
            place_images(0, s->batch, c);
        }
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

static int run(struct conv2d *c, int64_t set, parallel_for pool, int64_t threads, const int32_t *corners,
               const float *shift, const float *bias)
{
    const struct conv2d_shape *shape = c->shape;
    const int64_t taps = shape->kernel[0] * shape->kernel[1];
    const size_t lines = (size_t)(shape->out_height + shape->out_width);
    c->set = instruction_set(set);
    c->product.inputs = shape->channels / shape->groups * taps;
    c->product.outputs = shape->outputs / shape->groups;
    c->product.out_step = shape->outputs;
    c->group_words = words_of(shape->channels / shape->groups);
    c->pixel_words = c->group_words * shape->groups;
    c->padded_height = shape->height + 2 * shape->padding[0];
    c->padded_width = shape->width + 2 * shape->padding[1];
    int64_t *runs = malloc((size_t)taps * sizeof *runs);
    c->row_class = malloc(lines * sizeof *c->row_class);
    c->rows = malloc(lines * sizeof *c->rows);
    int result = OUT_OF_MEMORY;
    if (runs && c->row_class && c->rows) {
        c->column_class = c->row_class + shape->out_height;
        c->columns = c->rows + shape->out_height;
        c->row_classes = classify(shape, 0, c->row_class, c->rows);
        c->column_classes = classify(shape, 1, c->column_class, c->columns);
        find_runs(c, runs);
        result = convolve(c, pool, threads, corners, shift, bias);
    }
    free(c->rows);
    free(c->row_class);
    free(runs);
    return result;
}

int hf_bnn_conv2d(int64_t set, parallel_for pool, int64_t threads, const struct conv2d_shape *shape,
                  const float *x, const float *threshold, int per_input, const uint32_t *weights,
                  const int32_t *corners, const float *scale, const float *shift, const float *bias,
                  float *out)
{
    struct conv2d c = {
        .shape = shape,
        .x = x,
        .threshold = {threshold, per_input},
        .product = {.weights = weights, .scale = scale},
        .out = out,
    };
    return run(&c, set, pool, threads, corners, shift, bias);
}

int hf_bnn_conv2d_block(int64_t set, parallel_for pool, int64_t threads, const struct conv2d_layer *layer,
                        const float *x, const uint32_t *bits, const float *shortcut, float *out, uint32_t *out_bits,
                        const float *next_threshold, int next_per_output)
{
    struct conv2d c = {
        .shape = &layer->shape,
        .layer = layer,
        .x = x,
        .in_bits = bits,
        .threshold = {layer->threshold, (int)layer->per_input},
        .product = {.weights = layer->weights, .scale = layer->scale},
        .shortcut = shortcut,
        .out = out,
        .out_bits = out_bits,
        .next_threshold = {next_threshold, next_per_output},
        .finishes = out_bits || shortcut || layer->epilogue.alpha || layer->epilogue.rprelu_shift,
    };
    return run(&c, set, pool, threads, layer->corners, layer->shift, layer->bias);
}
