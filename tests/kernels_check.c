/* Runs the kernels on every instruction set here, on arrays of exactly the sizes that they may touch, and compares them
 * with plain loops. For memory checkers: test_kernels_build.py compiles it with sanitizers; by hand, for valgrind,
 *     gcc -g -O2 -ffp-contract=off -Wno-psabi -Icsrc tests/kernels_check.c csrc/[all].c -lm && valgrind ./a.out
 * with csrc = hf_bnn/kernels/csrc.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "kernels.h"

static uint32_t state = 1;

static int64_t below(int64_t n)
{
    state = state * 1664525u + 1013904223u;
    return (int64_t)(state >> 8) % n;
}

static void *array(int64_t count, size_t size)
{
    void *memory = malloc((size_t)count * size);
    if (!memory && count) {
        exit(2);
    }
    return memory;
}

static float *numbers(int64_t count)
{
    float *x = array(count, sizeof *x);
    for (int64_t i = 0; i < count; i++) {
        x[i] = below(20) ? (float)(below(17) - 8) : below(2) ? -0.0f : NAN;
    }
    return x;
}

static float *equal_numbers(int64_t count, float value)
{
    float *x = array(count, sizeof *x);
    for (int64_t i = 0; i < count; i++) {
        x[i] = value;
    }
    return x;
}

static int sign(float x) { return x < 0 ? -1 : 1; }

/* Writes `outputs` rows of `inputs` signs, `row_step` apart with `step` between inputs, into panels from `word` on. */
static void write_panels(const float *w, int64_t outputs, int64_t inputs, int64_t row_step, int64_t step,
                         int64_t words, int64_t word, uint32_t *panels)
{
    for (int64_t n = 0; n < outputs; n++) {
        uint32_t *to = panels + (n / PANEL * words + word) * PANEL + n % PANEL;
        for (int64_t k = 0; k < inputs; k++) {
            uint32_t bit = (uint32_t)(sign(w[n * row_step + k * step]) < 0) << k % 32;
            int64_t pair = k / 64 * 2;
            to[(k / 32) * PANEL] ^= bit;
            if (k / 32 == pair) {
                to[(pair + 1) * PANEL] ^= bit;
            }
        }
    }
}

static uint32_t *panels_of(const float *w, int64_t outputs, int64_t inputs)
{
    int64_t count = divide_up(outputs, PANEL) * words_of(inputs) * PANEL;
    uint32_t *panels = array(count, sizeof *panels);
    memset(panels, 0, (size_t)count * sizeof *panels);
    write_panels(w, outputs, inputs, inputs, 1, words_of(inputs), 0, panels);
    for (int64_t i = 0; i < count; i++) { /* prefixes through all words, not only in pairs */
        int64_t word = i / PANEL % words_of(inputs);
        if (word > 1) {
            panels[i] ^= panels[i - (word % 2 + 1) * PANEL];
        }
    }
    return panels;
}

/* As torch's pool may do: several parts, not in order. */
static int32_t in_parts(int64_t begin, int64_t end, int64_t grain, range_function f, void *context)
{
    int64_t middle = (begin + end) / 2;
    (void)grain;
    if (middle < end) {
        f(middle, end, context);
    }
    if (begin < middle) {
        f(begin, middle, context);
    }
    return 0;
}

static int failures;

static void expect(int set, const char *what, int64_t i, double found, double expected, double tolerance)
{
    if (!(fabs(found - expected) <= tolerance) && !(isnan(found) && isnan(expected))) {
        failures++;
        printf("%s %s: entry %lld is %g, expected %g\n", hf_bnn_name(set), what, (long long)i, found, expected);
    }
}

static double dot_of_signs(const float *x, const float *w, int64_t size)
{
    double sum = 0;
    for (int64_t k = 0; k < size; k++) {
        sum += sign(x[k]) * sign(w[k]);
    }
    return sum;
}

static void check_matrices(int set, parallel_for pool, int64_t rows, int64_t size, int64_t hidden, int64_t out)
{
    float *x = numbers(rows * size), *w = numbers(hidden * size), *v = numbers(out * hidden);
    float *ones = equal_numbers(hidden + out, 1), *zeros = equal_numbers(hidden + out, -0.0f);
    uint32_t *first = panels_of(w, hidden, size), *second = panels_of(v, out, hidden);
    float *h = array(rows * hidden, sizeof *h), *y = array(rows * out, sizeof *y), zero = 0;
    const struct ffn_plan plan = {.first = {set, pool, size, hidden, first, ones, zeros, &zero, 1, 0},
                                  .second = {set, pool, hidden, out, second, ones, zeros, NULL, 0, 0},
                                  .low = -3,
                                  .high = 2};
    failures += hf_bnn_linear(&plan.first, x, size, rows, 3, h);
    for (int64_t i = 0; i < rows * hidden; i++) {
        expect(set, "linear", i, h[i], dot_of_signs(x + i / hidden * size, w + i % hidden * size, size), 0);
    }
    for (int64_t i = 0; i < rows * hidden; i++) { /* the hidden signs, for what follows */
        h[i] = h[i] >= -3 && h[i] < 2 ? -1 : 1;
    }
    failures += hf_bnn_ffn(&plan, x, size, rows, 3, y);
    for (int64_t i = 0; i < rows * out; i++) {
        expect(set, "ffn", i, y[i], dot_of_signs(h + i / out * hidden, v + i % out * hidden, hidden), 0);
    }
    failures += hf_bnn_linear_weight_only(&plan.first, x, size, rows, 3, h);
    for (int64_t i = 0; i < rows * hidden; i++) {
        double sum = 0;
        for (int64_t k = 0; k < size; k++) {
            sum += sign(w[i % hidden * size + k]) * x[i / hidden * size + k];
        }
        expect(set, "weight only", i, h[i], sum, 1e-3);
    }
    free(x), free(w), free(v), free(ones), free(zeros), free(first), free(second), free(h), free(y);
}

/* Three layers in one, each with its thresholds: one for all inputs, or one for each. */
static void check_parts(int set, parallel_for pool, int64_t rows, int64_t size, int64_t panels, int per_input)
{
    const int64_t parts = 3, part = panels * PANEL, outputs = parts * part, step = per_input ? size : 1;
    float *x = numbers(rows * size), *w = numbers(outputs * size), *thresholds = numbers(parts * step);
    float *ones = equal_numbers(outputs, 1), *zeros = equal_numbers(outputs, -0.0f);
    float *y = array(rows * outputs, sizeof *y);
    uint32_t *weights = panels_of(w, outputs, size);
    const struct linear_plan plan = {set, pool, size, outputs, weights, ones, zeros, thresholds, parts, per_input};
    failures += hf_bnn_linear(&plan, x, size, rows, 4, y);
    for (int64_t i = 0; i < rows * outputs; i++) {
        const float *row = x + i / outputs * size, *weight = w + i % outputs * size;
        double sum = 0;
        for (int64_t k = 0; k < size; k++) {
            sum += (row[k] < thresholds[i % outputs / part * step + k * per_input] ? -1 : 1) * sign(weight[k]);
        }
        expect(set, "parts", i, y[i], sum, 0);
    }
    free(x), free(w), free(thresholds), free(ones), free(zeros), free(y), free(weights);
}

static double conv_at(const struct conv2d_shape *s, const float *x, const float *w, int64_t image, int64_t n, int64_t y,
                      int64_t xx)
{
    const int64_t channels = s->channels / s->groups, g = n / (s->outputs / s->groups);
    double sum = 0;
    for (int64_t c = 0; c < channels; c++) {
        for (int64_t ky = 0; ky < s->kernel[0]; ky++) {
            for (int64_t kx = 0; kx < s->kernel[1]; kx++) {
                int64_t iy = y * s->stride[0] - s->padding[0] + ky * s->dilation[0];
                int64_t ix = xx * s->stride[1] - s->padding[1] + kx * s->dilation[1];
                if (iy >= 0 && iy < s->height && ix >= 0 && ix < s->width) {
                    sum += sign(x[image * s->image_step + (g * channels + c) * s->channel_step + iy * s->row_step +
                                  ix * s->pixel_step]) *
                           sign(w[((n * channels + c) * s->kernel[0] + ky) * s->kernel[1] + kx]);
                }
            }
        }
    }
    return sum;
}

/* Bits [row][word] of rows of signs. */
static uint32_t *bits_of(const float *x, int64_t rows, int64_t channels, int64_t row_step, int64_t channel_step)
{
    const int64_t words = words_of(channels);
    uint32_t *bits = array(rows * words, sizeof *bits);
    memset(bits, 0, (size_t)(rows * words) * sizeof *bits);
    for (int64_t i = 0; i < rows * channels; i++) {
        const int64_t row = i / channels, k = i % channels;
        const uint32_t bit = (uint32_t)(sign(x[row * row_step + k * channel_step]) < 0) << k % 32;
        bits[row * words + k / 32] ^= bit;
        if (k / 32 % 2 == 0) {
            bits[row * words + k / 32 + 1] ^= bit;
        }
    }
    return bits;
}

/* A convolution with everything that may follow it, on floats and on bits. All numbers are small integers or quarters
 * of them, or NaN: no operation rounds. */
static void check_block(int set, parallel_for pool, const struct conv2d_shape *s, const float *x, const float *w,
                        const uint32_t *panels, const int32_t *corners, const float *ones, const float *none)
{
    const int64_t pixels = s->batch * s->out_height * s->out_width, outputs = s->outputs, area = s->height * s->width;
    const int64_t group = (int64_t)1 << below(3), words = words_of(outputs), image = s->out_height * s->out_width;
    float *vectors[7], *y = array(pixels * outputs, sizeof *y), *shortcut = numbers(pixels * outputs * group), zero = 0;
    for (int i = 0; i < 7; i++) {
        vectors[i] = numbers(outputs);
    }
    const int affine = below(2), around = below(3), active = below(2), packed = below(2); /* around 2: normalized */
    struct conv2d_layer layer = {
        .shape = *s,
        .threshold = &zero,
        .weights = panels,
        .corners = corners,
        .scale = ones,
        .bias = none,
        .epilogue = {.alpha = affine ? vectors[0] : NULL,
                     .beta = affine ? vectors[1] : NULL,
                     .shortcut_alpha = around == 2 ? vectors[2] : NULL,
                     .shortcut_beta = around == 2 ? vectors[3] : NULL,
                     .rprelu_shift = active ? vectors[4] : NULL,
                     .rprelu_slope = active ? vectors[5] : NULL,
                     .rprelu_offset = active ? vectors[6] : NULL,
                     .shortcut_group = group,
                     .fused = below(2)},
    };
    const int64_t in_words = area * words_of(s->channels), row_step = s->channel_step == 1 ? s->channels : 1;
    uint32_t *in_bits = array(s->batch * in_words, sizeof *in_bits), *bits = array(pixels * words, sizeof *bits);
    for (int64_t i = 0; i < s->batch; i++) {
        uint32_t *of_image = bits_of(x + i * s->image_step, area, s->channels, row_step, s->channel_step);
        memcpy(in_bits + i * in_words, of_image, (size_t)in_words * sizeof *of_image);
        free(of_image);
    }
    failures += hf_bnn_conv2d_block(set, pool, 3, &layer, packed ? NULL : x, packed ? in_bits : NULL,
                                    around ? shortcut : NULL, y, bits, &zero, 0);
    for (int64_t i = 0; i < pixels * outputs; i++) {
        const int64_t n = i % outputs, pixel = i / outputs;
        double expected = conv_at(s, x, w, pixel / image, n, pixel % image / s->out_width, pixel % s->out_width);
        expected = affine ? expected * vectors[0][n] + vectors[1][n] : expected;
        if (around) {
            double sum = 0;
            for (int64_t k = 0; k < group; k++) {
                sum += shortcut[i * group + k];
            }
            sum /= (double)group;
            expected += around == 2 ? sum * vectors[2][n] + vectors[3][n] : sum;
        }
        if (active) {
            expected -= vectors[4][n];
            expected = (expected > 0 ? expected : expected * vectors[5][n]) + vectors[6][n];
        }
        expect(set, "block", i, y[i], expected, 0);
    }
    uint32_t *signs = bits_of(y, pixels, outputs, outputs, 1), *alone = array(pixels * words, sizeof *alone);
    failures += hf_bnn_conv2d_block(set, pool, 3, &layer, packed ? NULL : x, packed ? in_bits : NULL,
                                    around ? shortcut : NULL, NULL, alone, &zero, 0);
    for (int64_t i = 0; i < pixels * words; i++) {
        expect(set, "bits of a block", i, bits[i], signs[i], 0);
        expect(set, "bits alone", i, alone[i], signs[i], 0);
    }
    if (around && group == 1) {
        failures += hf_bnn_conv2d_block(set, pool, 3, &layer, x, NULL, shortcut, shortcut, NULL, NULL, 0);
        for (int64_t i = 0; i < pixels * outputs; i++) {
            expect(set, "block in place", i, shortcut[i], y[i], 0);
        }
    }
    for (int i = 0; i < 7; i++) {
        free(vectors[i]);
    }
    free(y), free(shortcut), free(in_bits), free(bits), free(signs), free(alone);
}

static void check_convolution(int set, parallel_for pool, int last)
{
    struct conv2d_shape s = {.batch = 1 + below(2), .height = 1 + below(9), .width = 1 + below(9)};
    s.groups = 1 + below(2);
    int64_t channels = 1 + below(70), outputs = 1 + below(20);
    s.channels = channels * s.groups;
    s.outputs = outputs * s.groups;
    for (int i = 0; i < 2; i++) {
        s.kernel[i] = 1 + below(3), s.stride[i] = 1 + below(2), s.padding[i] = below(3), s.dilation[i] = 1 + below(2);
    }
    s.out_height = s.height + 2 * s.padding[0] - s.dilation[0] * (s.kernel[0] - 1) - 1;
    s.out_width = s.width + 2 * s.padding[1] - s.dilation[1] * (s.kernel[1] - 1) - 1;
    if (s.out_height < 0 || s.out_width < 0) {
        return;
    }
    s.out_height = s.out_height / s.stride[0] + 1;
    s.out_width = s.out_width / s.stride[1] + 1;
    s.image_step = s.channels * s.height * s.width;
    s.channel_step = last ? 1 : s.height * s.width;
    s.row_step = last ? s.channels * s.width : s.width;
    s.pixel_step = last ? s.channels : 1;
    const int64_t taps = s.kernel[0] * s.kernel[1], words = words_of(channels), line = s.kernel[1] + 1;
    const int64_t group_words = divide_up(outputs, PANEL) * taps * words * PANEL, pixels = s.out_height * s.out_width;
    float *x = numbers(s.batch * s.image_step), *w = numbers(s.outputs * channels * taps), zero = 0;
    float *ones = equal_numbers(s.outputs, 1), *bias = equal_numbers(s.outputs, -0.0f);
    float *y = array(s.batch * pixels * s.outputs, sizeof *y);
    uint32_t *panels = array(s.groups * group_words, sizeof *panels);
    int32_t *corners = array((s.kernel[0] + 1) * line * s.outputs, sizeof *corners);
    memset(panels, 0, (size_t)(s.groups * group_words) * sizeof *panels);
    for (int64_t g = 0; g < s.groups; g++) {
        for (int64_t t = 0; t < taps; t++) {
            write_panels(w + g * outputs * channels * taps + t, outputs, channels, channels * taps, taps, taps * words,
                         t * words, panels + g * group_words);
        }
    }
    for (int64_t i = 0; i < (s.kernel[0] + 1) * line * s.outputs; i++) {
        int64_t n = i % s.outputs, last_y = i / s.outputs / line, last_x = i / s.outputs % line;
        corners[i] = 0;
        for (int64_t k = 0; k < channels * taps; k++) {
            int inside = k % taps / s.kernel[1] < last_y && k % s.kernel[1] < last_x;
            corners[i] += inside ? sign(w[n * channels * taps + k]) : 0;
        }
    }
    if (s.groups == 1) {
        check_block(set, pool, &s, x, w, panels, corners, ones, bias);
    }
    failures += hf_bnn_conv2d(set, pool, 3, &s, x, &zero, 0, panels, corners, ones, NULL, bias, y);
    for (int64_t i = 0; i < s.batch * pixels * s.outputs; i++) {
        int64_t n = i % s.outputs, pixel = i / s.outputs % pixels, image = i / s.outputs / pixels;
        expect(set, "conv2d", i, y[i], conv_at(&s, x, w, image, n, pixel / s.out_width, pixel % s.out_width), 0);
    }
    free(x), free(w), free(ones), free(bias), free(y), free(panels), free(corners);
}

/* Copies of `count` rows, `step` apart, in an array that ends where the last row does. */
static float *rows_apart(int64_t count, int64_t size, int64_t step)
{
    float *x = numbers((count - 1) * step + size);
    for (int64_t i = 0; i < (count - 1) * step + size; i++) {
        x[i] = below(30) ? (float)(below(9) - 4) : x[i];
    }
    return x;
}

/* The bit of a token: 1 where a query attends to it. `sum` is 0 without softmax. */
static int attends(double score, int masked, double sum, float threshold)
{
    return !masked && (sum > 0 ? exp(score) / sum >= threshold : score >= threshold);
}

static void check_attention(int set, parallel_for pool, int softmax)
{
    struct attention_shape s = {.batch = 1 + below(2), .heads = 1 + below(3), .queries = 1 + below(70)};
    s.keys = 1 + below(140), s.size = 1 + below(255);
    const int64_t step = s.heads * s.size + below(3), mask_kind = below(4), rows = s.heads * s.queries * s.batch;
    for (int i = 0; i < 3; i++) {
        s.query_steps[i] = (const int64_t[]){s.queries * step, s.size, step}[i];
        s.key_steps[i] = s.value_steps[i] = (const int64_t[]){s.keys * step, s.size, step}[i];
        s.mask_steps[i] = (const int64_t[]){s.heads * s.queries * s.keys, s.queries * s.keys, s.keys}[i];
    }
    if (mask_kind < 2) { /* one for all queries, one for all */
        s.mask_steps[0] = mask_kind ? 0 : s.keys;
        s.mask_steps[1] = s.mask_steps[2] = 0;
    }
    float *q = rows_apart(s.batch * s.queries, s.heads * s.size, step);
    float *k = rows_apart(s.batch * s.keys, s.heads * s.size, step);
    float *v = rows_apart(s.batch * s.keys, s.heads * s.size, step);
    float *mask = array(rows * s.keys, sizeof *mask), *out = array(rows * s.size, sizeof *out);
    uint8_t *unsure = array(rows, sizeof *unsure);
    for (int64_t i = 0; i < rows * s.keys; i++) {
        mask[i] = below(3) ? 0 : below(2) ? -3.4e38f : -INFINITY;
    }
    const float levels[] = {0.5f, 0, -0.5f, softmax ? 1.1f / (float)s.keys : 0.1f, 0.7f, 1, 1};
    const float scaling = 0.125f, *given = mask_kind < 3 ? mask : NULL;
    float *all_scores = array(rows * s.keys, sizeof *all_scores), *again = array(rows * s.size, sizeof *again);
    int64_t *indices = array(rows, sizeof *indices), sure = 0;
    for (int64_t i = 0; i < rows; i++) {
        indices[i] = i;
    }
    failures += hf_bnn_attention_scores(set, &s, q, k, given, levels, scaling, indices, rows, all_scores);
    int status = hf_bnn_attention(set, pool, &s, q, k, v, given, levels, scaling, softmax, out, unsure);
    failures += status != OK && status != UNSURE;
    for (int64_t row = 0; row < rows; row++) {
        const int64_t b = row / s.queries / s.heads, h = row / s.queries % s.heads, i = row % s.queries;
        const float *shut = mask + b * s.mask_steps[0] + h * s.mask_steps[1] + i * s.mask_steps[2];
        const int64_t head = b * s.keys * step + h * s.size;
        double scores[140], sum = 0;
        for (int64_t j = 0; j < s.keys; j++) {
            double dot = 0;
            for (int64_t n = 0; n < s.size; n++) {
                dot += (q[(b * s.queries + i) * step + h * s.size + n] < levels[0] ? -1 : 1) *
                       (k[head + j * step + n] < levels[1] ? -1 : 1);
            }
            scores[j] = dot * levels[4] * scaling;
            sum += given && shut[j] < 0 ? 0 : exp(scores[j]);
        }
        for (int64_t j = 0; j < s.keys; j++) {
            float *score = all_scores + row * s.keys + j;
            const int masked = given && shut[j] < 0;
            expect(set, "scores", row * s.keys + j, masked ? *score < -1e38f : *score, masked ? 1 : scores[j], 1e-5);
            *score = (float)attends(scores[j], masked, softmax ? sum : 0, levels[3]) * levels[3];
        }
        failures += hf_bnn_attention_context(set, &s, v, levels, all_scores + row * s.keys, indices + row, 1, again);
        sure += !unsure[row];
        for (int64_t n = 0; n < s.size && !unsure[row]; n++) {
            double expected = 0; /* levels 0 and 2 */
            for (int64_t j = 0; j < s.keys; j++) {
                int bit = attends(scores[j], given && shut[j] < 0, softmax ? sum : 0, levels[3]);
                expected += 2 * bit * (v[head + j * step + n] < levels[2] ? -1 : 1);
            }
            const int64_t at = ((b * s.queries + i) * s.heads + h) * s.size + n;
            expect(set, softmax ? "attention" : "boolean attention", row * s.size + n, out[at], expected, 0);
            expect(set, "context", row * s.size + n, again[at], expected, 0);
        }
    }
    failures += mask_kind == 3 && sure * 2 < rows; /* most rows are clear */
    free(q), free(k), free(v), free(mask), free(out), free(unsure), free(all_scores), free(again);
    free(indices);
}

static void check_pooling(int set, parallel_for pool)
{
    struct pool_shape s = {.batch = 1 + below(2), .height = 4 + below(6), .width = 4 + below(6), .channels = 1 + below(40)};
    for (int i = 0; i < 2; i++) {
        s.kernel[i] = 1 + below(4), s.stride[i] = 1 + below(3), s.padding[i] = below(s.kernel[i] / 2 + 1);
    }
    s.out_height = (s.height + 2 * s.padding[0] - s.kernel[0]) / s.stride[0] + 1;
    s.out_width = (s.width + 2 * s.padding[1] - s.kernel[1]) / s.stride[1] + 1;
    const int64_t pixels = s.out_height * s.out_width;
    float *x = numbers(s.batch * s.height * s.width * s.channels), *alpha = numbers(s.channels);
    float *beta = numbers(s.channels), *y = array(s.batch * pixels * s.channels, sizeof *y);
    failures += hf_bnn_max_pool(set, pool, &s, x, alpha, beta, (int)below(2), y);
    for (int64_t i = 0; i < s.batch * pixels * s.channels; i++) {
        const int64_t c = i % s.channels, pixel = i / s.channels % pixels, image = i / s.channels / pixels;
        float most = -INFINITY;
        for (int64_t k = 0; k < s.kernel[0] * s.kernel[1]; k++) {
            const int64_t row = pixel / s.out_width * s.stride[0] - s.padding[0] + k / s.kernel[1];
            const int64_t column = pixel % s.out_width * s.stride[1] - s.padding[1] + k % s.kernel[1];
            if (row >= 0 && row < s.height && column >= 0 && column < s.width) {
                float value = x[((image * s.height + row) * s.width + column) * s.channels + c];
                most = value > most || isnan(value) ? value : most;
            }
        }
        expect(set, "pooling", i, y[i], most * alpha[c] + beta[c], 0);
    }
    free(x), free(alpha), free(beta), free(y);
}

int main(void)
{
    static const int64_t sizes[] = {0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 130};
    const int64_t count = sizeof sizes / sizeof *sizes;
    for (int set = 0; hf_bnn_name(set); set++) {
        if (!hf_bnn_available(set)) {
            continue;
        }
        printf("checking %s\n", hf_bnn_name(set));
        for (int round = 0; round < 40; round++) {
            parallel_for pool = round % 2 ? in_parts : NULL;
            check_matrices(set, pool, sizes[below(count)], sizes[below(count)], sizes[below(count)],
                           sizes[below(count)]);
            check_parts(set, pool, sizes[below(count)], sizes[below(count)], below(4), round / 2 % 2);
            check_convolution(set, pool, round / 2 % 2);
            check_attention(set, pool, round / 2 % 2);
            check_pooling(set, pool);
        }
    }
    printf("%d failures\n", failures);
    return failures != 0;
}
