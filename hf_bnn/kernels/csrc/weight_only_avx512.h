/* Products of 1-bit weights with float inputs by look-up: four inputs have 16 signed sums, which fill a register, and
 * four bits of the weights choose one of them for each of 16 outputs. The file that includes this has included
 * vectors.h with LANES 16.
 */
#include <immintrin.h>

enum { GROUP = 4, GROUPS_PER_WORD = 32 / GROUP, TABLE = 1 << GROUP };

static int64_t prepared_size(int64_t inputs) { return words_of(inputs) * GROUPS_PER_WORD * TABLE; }

/* Entry e of a group's table is the sum of its inputs, input b negated where bit b of e is 1. */
TARGET static void prepare_inputs(const float *x, int64_t inputs, float *out)
{
    floats sign[GROUP];
    for (int b = 0; b < GROUP; b++) {
        for (int e = 0; e < TABLE; e++) {
            sign[b][e] = e >> b & 1 ? -1.0f : 1.0f;
        }
    }
    for (int64_t group = 0; group < words_of(inputs) * GROUPS_PER_WORD; group++) {
        float some[GROUP] = {0};
        int64_t left = inputs - group * GROUP;
        if (left > 0) {
            memcpy(some, x + group * GROUP, (size_t)smaller(left, GROUP) * sizeof *some);
        }
        STORE(out + group * TABLE, (sign[0] * some[0] + sign[1] * some[1]) + (sign[2] * some[2] + sign[3] * some[3]));
    }
}

/* Adds what 32 inputs contribute. R rows and V panels: constants in every call. */
INLINE void add_word(const int R, const int V, words bits[8], const float *tables, int64_t row_floats,
                     floats sums[4][8])
{
    UNROLL for (int group = 0; group < GROUPS_PER_WORD; group++) {
        UNROLL for (int r = 0; r < R; r++) {
            __m512 table = _mm512_loadu_ps(tables + r * row_floats + group * TABLE);
            UNROLL for (int v = 0; v < V; v++) {
                sums[r][v] += (floats)_mm512_permutexvar_ps((__m512i)bits[v], table);
            }
        }
        UNROLL for (int v = 0; v < V; v++) bits[v] >>= GROUP; /* the look-up reads the lowest four bits only */
    }
}

INLINE void sum_tile(const int R, const int V, const uint32_t *weights, const float *tables, int64_t inputs,
                     floats sums[4][8])
{
    const int64_t count = words_of(inputs), row_floats = prepared_size(inputs);
    words before[8];
    UNROLL for (int v = 0; v < V; v++) {
        before[v] = (words){0};
        UNROLL for (int r = 0; r < R; r++) sums[r][v] = (floats){0};
    }
    for (int64_t word = 0; word < count; word += 2) {
        words first[8], second[8];
        UNROLL for (int v = 0; v < V; v++) {
            const uint32_t *pair = weights + (v * count + word) * PANEL;
            first[v] = LOAD(words, pair);
            second[v] = LOAD(words, pair + PANEL) ^ first[v];
            first[v] ^= before[v]; /* words are stored as prefixes */
            before[v] = LOAD(words, pair + PANEL);
        }
        add_word(R, V, first, tables + word * GROUPS_PER_WORD * TABLE, row_floats, sums);
        add_word(R, V, second, tables + (word + 1) * GROUPS_PER_WORD * TABLE, row_floats, sums);
    }
}

INLINE void multiply_sums(const int R, const int V, const uint32_t *weights, const float *tables, int64_t inputs,
                          int64_t outputs, int64_t panel, const float *scale, const float *offset, float *out)
{
    floats sums[4][8];
    sum_tile(R, V, weights + panel * words_of(inputs) * PANEL, tables, inputs, sums);
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) {
        int64_t column = (panel + v) * PANEL, left = outputs - column;
        const __mmask16 mask = left >= PANEL ? 0xffff : (__mmask16)((1u << left) - 1);
        __m512 y = _mm512_mul_ps((__m512)sums[r][v], _mm512_maskz_loadu_ps(mask, scale + column));
        y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, offset + column));
        _mm512_mask_storeu_ps(out + r * outputs + column, mask, y);
    }
}

TARGET static void multiply_floats(const uint32_t *weights, const float *prepared, int64_t rows, int64_t inputs,
                                   int64_t outputs, int64_t first, int64_t last, const float *scale,
                                   const float *offset, float *out)
{
#define TILE(R, V) multiply_sums(R, V, weights, tables, inputs, outputs, panel, scale, offset, to)
    const int64_t row_floats = prepared_size(inputs);
    for (int64_t row = 0; row < rows;) {
        const float *tables = prepared + row * row_floats;
        float *to = out + row * outputs;
        const int64_t height = rows - row >= 4 ? 4 : 1;
        for (int64_t panel = first; panel < last;) {
            int64_t left = last - panel, width = height == 4 ? (left >= 4 ? 4 : 1) : left >= 8 ? 8 : left >= 2 ? 2 : 1;
            if (height == 4) {
                if (width == 4) TILE(4, 4); else TILE(4, 1);
            } else {
                if (width == 8) TILE(1, 8); else if (width == 2) TILE(1, 2); else TILE(1, 1);
            }
            panel += width;
        }
        row += height;
    }
#undef TILE
}
