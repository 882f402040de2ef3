/* Products of 1-bit weights with float inputs by look-up: GROUP inputs have LANES signed sums, which fill a register,
 * and GROUP bits of the weights choose one of them for each of LANES outputs. The file that includes this has included
 * vectors.h and says
 *
 *   look_up(table, v)   entry v[i] % LANES of the table for each lane i
 */
enum {
    GROUP = LANES == 16 ? 4 : 3,
    GROUPS_PER_WORD = (32 + GROUP - 1) / GROUP,
    WIDE = LANES == 16 ? 8 : 4,  /* vectors of outputs in a tile of one row */
    NARROW = LANES == 16 ? 4 : 2 /* and of four rows */
};

static int64_t prepared_size(int64_t inputs) { return words_of(inputs) * GROUPS_PER_WORD * LANES; }

/* Entry e of a group's table is the sum of its inputs, input b negated where bit b of e is 1. */
INLINE floats table_of(const float *x)
{
    words terms[4] = {{0}};
    for (int b = 0; b < GROUP; b++) {
        uint32_t value;
        memcpy(&value, x + b, sizeof value);
        for (int e = 0; e < LANES; e++) {
            terms[b][e] = (uint32_t)(e >> b & 1) << 31;
        }
        terms[b] ^= all_words(value);
    }
    floats sum = (floats)terms[0] + (floats)terms[1];
    return GROUP == 4 ? sum + ((floats)terms[2] + (floats)terms[3]) : sum + (floats)terms[2];
}

/* Tables of `count` <= 32 inputs, behind which the row may end. */
INLINE void prepare_word(const float *x, int64_t count, float *out)
{
    float some[GROUPS_PER_WORD * GROUP] = {0};
    memcpy(some, x, (size_t)count * sizeof *some);
    for (int group = 0; group < GROUPS_PER_WORD; group++) {
        STORE(out + group * LANES, table_of(some + group * GROUP));
    }
}

TARGET static void prepare_inputs(const float *x, int64_t inputs, float *out)
{
    for (int64_t word = 0; word < words_of(inputs); word++, out += GROUPS_PER_WORD * LANES) {
        const int64_t left = inputs - word * 32;
        if (left >= 32) {
            prepare_word(x + word * 32, 32, out); /* a case of its own: the compiler knows its length */
        } else {
            prepare_word(x + word * 32, left > 0 ? left : 0, out);
        }
    }
}

/* Adds what 32 inputs contribute. R rows and V vectors: constants in every call. */
INLINE void add_word(const int R, const int V, words bits[WIDE], const float *tables, int64_t row_floats,
                     floats sums[4][WIDE])
{
    const int full = R > 1; /* registers: the compiler then computes shifts too early and spills, unless told not to */
    UNROLL for (int group = 0; group < GROUPS_PER_WORD; group++) {
        UNROLL for (int r = 0; r < R; r++) {
            floats table = LOAD(floats, tables + r * row_floats + group * LANES);
            UNROLL for (int v = 0; v < V; v++) {
                sums[r][v] += look_up(table, bits[v]);
                if (full) {
                    IN_REGISTER(sums[r][v]);
                }
            }
        }
        UNROLL for (int v = 0; v < V; v++) {
            bits[v] >>= GROUP;
            if (full) {
                IN_REGISTER(bits[v]);
            }
        }
    }
}

/* The outputs from `vector` on: V vectors, of R rows. */
INLINE void multiply_sums(const int R, const int V, const uint32_t *weights, const float *tables, int64_t inputs,
                          int64_t outputs, int64_t vector, const float *scale, const float *offset, float *out)
{
    enum { PER_PANEL = PANEL / LANES };
    const int64_t count = words_of(inputs), row_floats = prepared_size(inputs);
    floats sums[4][WIDE];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) sums[r][v] = (floats){0};
    for (int64_t word = 0; word < count; word++) {
        words bits[WIDE];
        UNROLL for (int v = 0; v < V; v++) { /* words are stored as prefixes */
            const int64_t panel = (vector + v) / PER_PANEL, lane = (vector + v) % PER_PANEL * LANES;
            const uint32_t *prefix = weights + (panel * count + word) * PANEL + lane;
            bits[v] = LOAD(words, prefix);
            if (word) {
                bits[v] ^= LOAD(words, prefix - PANEL);
            }
        }
        add_word(R, V, bits, tables + word * GROUPS_PER_WORD * LANES, row_floats, sums);
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) {
        const int64_t column = (vector + v) * LANES;
        float *to = out + r * outputs + column;
        if (column + LANES <= outputs) {
            STORE(to, sums[r][v] * LOAD(floats, scale + column) + LOAD(floats, offset + column));
        } else {
            for (int64_t i = 0; i < outputs - column; i++) {
                to[i] = sums[r][v][i] * scale[column + i] + offset[column + i];
            }
        }
    }
}

TARGET static void multiply_floats(const uint32_t *weights, const float *prepared, int64_t rows, int64_t inputs,
                                   int64_t outputs, int64_t first, int64_t last, const float *scale,
                                   const float *offset, float *out)
{
#define TILE(R, V) multiply_sums(R, V, weights, tables, inputs, outputs, v, scale, offset, to)
    const int64_t row_floats = prepared_size(inputs);
    const int64_t begin = first * (PANEL / LANES), end = smaller(last * (PANEL / LANES), divide_up(outputs, LANES));
    for (int64_t row = 0, height; row < rows; row += height) {
        const float *tables = prepared + row * row_floats;
        float *to = out + row * outputs;
        height = rows - row >= 4 ? 4 : 1;
        for (int64_t v = begin, width; v < end; v += width) {
            if (height == 4) {
                width = end - v >= NARROW ? NARROW : 1;
                if (width == NARROW) TILE(4, NARROW); else TILE(4, 1);
            } else {
                width = end - v >= WIDE ? WIDE : 1;
                if (width == WIDE) TILE(1, WIDE); else TILE(1, 1);
            }
        }
    }
#undef TILE
}
