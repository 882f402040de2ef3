/* Products of 1-bit weights with float inputs for instruction sets without a look-up of floats: every input is
 * added with its sign flipped where the weight's bit is 1. The file that includes this has included vectors.h.
 */

static int64_t prepared_size(int64_t inputs) { return inputs; }

static void prepare_inputs(const float *x, int64_t inputs, float *out)
{
    memcpy(out, x, (size_t)inputs * sizeof *out);
}

INLINE void add_signed(float *sums, const uint32_t *signs, const float *x, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        uint32_t value;
        memcpy(&value, x + i, sizeof value);
        for (int lane = 0; lane < PANEL; lane++) { /* the compiler turns this into vectors */
            uint32_t flipped = value ^ (signs[lane] >> i << 31);
            float term;
            memcpy(&term, &flipped, sizeof term);
            sums[lane] += term;
        }
    }
}

TARGET static void multiply_floats(const uint32_t *weights, const float *prepared, int64_t rows, int64_t inputs,
                                   int64_t outputs, int64_t first, int64_t last, const float *scale,
                                   const float *offset, float *out)
{
    const int64_t panel_words = words_of(inputs) * PANEL;
    for (int64_t panel = first; panel < last; panel++) {
        for (int64_t row = 0; row < rows; row++) {
            float sums[PANEL] = {0};
            for (int64_t start = 0; start < inputs; start += 32) {
                const uint32_t *word = weights + panel * panel_words + start / 32 * PANEL;
                uint32_t signs[PANEL];
                for (int lane = 0; lane < PANEL; lane++) { /* words are stored as prefixes */
                    signs[lane] = start ? word[lane] ^ word[lane - PANEL] : word[lane];
                }
                add_signed(sums, signs, prepared + row * inputs + start, smaller(32, inputs - start));
            }
            int64_t column = panel * PANEL, count = smaller(PANEL, outputs - column);
            for (int64_t i = 0; i < count; i++) {
                out[row * outputs + column + i] = sums[i] * scale[column + i] + offset[column + i];
            }
        }
    }
}
