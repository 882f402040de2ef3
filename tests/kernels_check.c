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
    failures += hf_bnn_linear(set, pool, 3, x, size, rows, size, &zero, 0, first, hidden, ones, zeros, h);
    for (int64_t i = 0; i < rows * hidden; i++) {
        expect(set, "linear", i, h[i], dot_of_signs(x + i / hidden * size, w + i % hidden * size, size), 0);
    }
    for (int64_t i = 0; i < rows * hidden; i++) { /* the hidden signs, for what follows */
        h[i] = h[i] >= -3 && h[i] < 2 ? -1 : 1;
    }
    failures += hf_bnn_ffn(set, pool, 3, x, size, rows, size, &zero, 0, first, hidden, ones, zeros, -3, 2, second, out,
                           ones, zeros, y);
    for (int64_t i = 0; i < rows * out; i++) {
        expect(set, "ffn", i, y[i], dot_of_signs(h + i / out * hidden, v + i % out * hidden, hidden), 0);
    }
    failures += hf_bnn_linear_weight_only(set, pool, 3, x, size, rows, size, first, hidden, ones, zeros, h);
    for (int64_t i = 0; i < rows * hidden; i++) {
        double sum = 0;
        for (int64_t k = 0; k < size; k++) {
            sum += sign(w[i % hidden * size + k]) * x[i / hidden * size + k];
        }
        expect(set, "weight only", i, h[i], sum, 1e-3);
    }
    free(x), free(w), free(v), free(ones), free(zeros), free(first), free(second), free(h), free(y);
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
    failures += hf_bnn_max_pool(set, pool, 3, &s, x, alpha, beta, (int)below(2), y);
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
            check_convolution(set, pool, round / 2 % 2);
            check_pooling(set, pool);
        }
    }
    printf("%d failures\n", failures);
    return failures != 0;
}
