/* Floats to bits, written once for all instruction sets. The file that includes this has included vectors.h and says
 *
 *   signs_of_32(x, t, step)   bit i: x[i] < t[i * step], step 0 or 1
 *
 * and, if it defines SIGNS_OF_SOME, signs_of_some(x, t, step, count).
 */

/* The signs of `count` < 32 inputs behind which the arrays may end. */
#ifndef SIGNS_OF_SOME
INLINE uint32_t signs_of_some(const float *x, const float *t, const int step, int64_t count)
{
    float values[32] = {0}, thresholds[32] = {0};
    memcpy(values, x, (size_t)count * sizeof *values);
    memcpy(thresholds, t, (size_t)(step ? count : 1) * sizeof *thresholds);
    return signs_of_32(values, thresholds, step) & ((1u << count) - 1);
}
#endif

/* `linear`: whether prefixes run on from pair to pair. It and `step` are constants in every call. */
INLINE void pack_row(const float *x, int64_t inputs, const float *t, const int step, const int linear, uint32_t *out)
{
    uint32_t before = 0;
    int64_t i = 0;
    for (; i + PAIR_BITS <= inputs; i += PAIR_BITS, out += 2) {
        out[0] = before ^ signs_of_32(x + i, t + i * step, step);
        out[1] = out[0] ^ signs_of_32(x + i + 32, t + (i + 32) * step, step);
        before = linear ? out[1] : 0;
    }
    int64_t left = inputs - i;
    if (left >= 32) {
        out[0] = before ^ signs_of_32(x + i, t + i * step, step);
        out[1] = out[0] ^ signs_of_some(x + i + 32, t + (i + 32) * step, step, left - 32);
    } else if (left > 0) { /* the second word is no bits: ^ 0 */
        out[1] = out[0] = before ^ signs_of_some(x + i, t + i * step, step, left);
    }
}

INLINE void pack_all(const float *x, int64_t row_step, int64_t rows, int64_t inputs, struct threshold threshold,
                     const int linear, uint32_t *out, int64_t out_step)
{
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * row_step;
        if (threshold.per_input) {
            pack_row(from, inputs, threshold.values, 1, linear, out + row * out_step);
        } else {
            pack_row(from, inputs, threshold.values, 0, linear, out + row * out_step);
        }
    }
}

TARGET static void pack_rows(const float *x, int64_t row_step, int64_t rows, int64_t inputs,
                             struct threshold threshold, uint32_t *out, int64_t out_step)
{
    pack_all(x, row_step, rows, inputs, threshold, 0, out, out_step);
}

TARGET static void pack_linear(const float *x, int64_t row_step, int64_t rows, int64_t inputs,
                               struct threshold threshold, uint32_t *out, int64_t out_step)
{
    pack_all(x, row_step, rows, inputs, threshold, 1, out, out_step);
}

/* The first `count` <= LANES floats from `x` on; the rest is 0. */
INLINE floats load_some(const float *x, int64_t count)
{
    if (count >= LANES) {
        return LOAD(floats, x);
    }
    floats some = {0};
    memcpy(&some, x, (size_t)count * sizeof *x);
    return some;
}

/* Word `word` of LANES rows whose inputs lie `plane` floats apart: bit i is input 32 * word + i. */
INLINE words plane_bits(const float *x, int64_t plane, int64_t count, int64_t word, int64_t inputs,
                        struct threshold threshold)
{
    words bits = {0};
    const int64_t first = 32 * word, last = smaller(inputs, first + 32);
    for (int64_t i = first; i < last; i++) {
        floats values = load_some(x + i * plane, count);
        floats limit = all_floats(threshold.values[threshold.per_input ? i : 0]);
        bits |= (words)(values < limit) & (1u << (i - first));
    }
    return bits;
}

TARGET static void pack_planes(const float *x, int64_t plane, int64_t rows, int64_t inputs,
                               struct threshold threshold, uint32_t *out, int64_t out_step)
{
    for (int64_t row = 0; row < rows; row += LANES) {
        const int64_t count = smaller(LANES, rows - row);
        for (int64_t word = 0; word < words_of(inputs); word += 2) {
            words first, second;
            if (count == LANES) { /* a case of its own: its loads are whole vectors */
                first = plane_bits(x + row, plane, LANES, word, inputs, threshold);
                second = plane_bits(x + row, plane, LANES, word + 1, inputs, threshold);
            } else {
                first = plane_bits(x + row, plane, count, word, inputs, threshold);
                second = plane_bits(x + row, plane, count, word + 1, inputs, threshold);
            }
            second ^= first;
            for (int64_t i = 0; i < count; i++) {
                uint32_t *to = out + (row + i) * out_step + word;
                to[0] = first[i];
                to[1] = second[i];
            }
        }
    }
}
