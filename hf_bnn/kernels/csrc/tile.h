/* The product of bits, written once for all instruction sets. The file that includes this has included vectors.h and
 * says
 *
 *   TILE_VECTORS        vectors of outputs in a tile of two rows, 2 or 4, so that its sums stay in registers
 *   carry(t, s, z)      t ? ~s : z
 *   carry_of_pair       carry(z ^ d1, z ^ d12, z) for (d1, d12, z), if CARRY_OF_PAIR
 *   count_bits(v)       how many bits are set: per word if COUNTS_WORDS, else per byte
 *   IN_REGISTER(v)      says that v is in a register here, if the compiler needs to be told
 */
enum {
    VECTORS_PER_PANEL = PANEL / LANES,
    TILE_ROWS = 2,
    MOST_VECTORS = 4,
    STEPS_OF_BYTES = 31 /* a byte overflows after 31 counts of up to 8 */
};

#ifndef CARRY_OF_PAIR
INLINE words carry_of_pair(words d1, words d12, words z) { return carry(z ^ d1, z ^ d12, z); }
#endif

#ifndef IN_REGISTER
#define IN_REGISTER(vector) (void)0
#endif

INLINE words add_counts(words sums, words counts)
{
    return COUNTS_WORDS ? sums + counts : (words)((bytes)sums + (bytes)counts);
}

/* Counts per word from what `add_counts` has summed. */
INLINE words per_word(words sums)
{
    if (COUNTS_WORDS) {
        return sums;
    }
    words pairs = (sums & 0x00ff00ff) + (sums >> 8 & 0x00ff00ff);
    return (pairs & 0xffff) + (pairs >> 16);
}

/* Differences between R rows and V vectors of outputs, whose weights are `apart` words apart. `linear`: prefixes run
 * through all words, and there is one run. R, V and `linear` are constants in every call. */
INLINE void count_differences(const int R, const int V, const int linear, const struct product *p,
                              const uint32_t *weights, int64_t apart, const uint32_t *const *rows,
                              words totals[TILE_ROWS][MOST_VECTORS])
{
    words z[TILE_ROWS][MOST_VECTORS], sums[TILE_ROWS][MOST_VECTORS];
    const uint32_t *w[MOST_VECTORS], *a[TILE_ROWS];
    UNROLL for (int v = 0; v < V; v++) {
        w[v] = weights + v / VECTORS_PER_PANEL * apart + v % VECTORS_PER_PANEL * LANES;
        UNROLL for (int r = 0; r < R; r++) {
            z[r][v] = sums[r][v] = totals[r][v] = (words){0};
        }
    }
    int64_t room = STEPS_OF_BYTES;
    for (int64_t run = 0; run < (linear ? 1 : p->run_count); run++) {
        UNROLL for (int r = 0; r < R; r++) {
            a[r] = rows[r] + (linear ? 0 : p->runs[run]);
        }
        for (int64_t left = p->run_words / 2; left > 0;) {
            int64_t steps = COUNTS_WORDS ? left : smaller(left, room);
            for (int64_t k = 0; k < steps; k++) {
                words w1[MOST_VECTORS], w2[MOST_VECTORS];
                UNROLL for (int v = 0; v < V; v++) {
                    w1[v] = LOAD(words, w[v]);
                    w2[v] = LOAD(words, w[v] + PANEL);
                    w[v] += 2 * PANEL;
                }
                UNROLL for (int r = 0; r < R; r++) {
                    words a1 = all_words(a[r][0]), a2 = all_words(a[r][1]);
                    a[r] += 2;
                    UNROLL for (int v = 0; v < V; v++) {
                        words first = w1[v] ^ a1, both = w2[v] ^ a2, before = z[r][v];
                        words carried = linear ? carry(first, both, before) : carry_of_pair(first, both, before);
                        z[r][v] = linear ? both : before ^ both;
                        IN_REGISTER(z[r][v]);
                        sums[r][v] = add_counts(sums[r][v], count_bits(carried));
                        IN_REGISTER(sums[r][v]);
                    }
                }
            }
            left -= steps;
            room -= steps;
            if (!COUNTS_WORDS && room == 0) {
                UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) {
                    totals[r][v] += per_word(sums[r][v]);
                    sums[r][v] = (words){0};
                }
                room = STEPS_OF_BYTES;
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) {
        totals[r][v] = 2 * (totals[r][v] + per_word(sums[r][v])) + per_word(count_bits(z[r][v]));
    }
}

/* In the order of torch's operations, without a fused multiply-add: results are equal, not only close. */
INLINE floats finished(integers sum, const float *scale, const float *offset, const int32_t *missing)
{
    if (missing) {
        sum -= LOAD(integers, missing);
    }
    return __builtin_convertvector(sum, floats) * LOAD(floats, scale) + LOAD(floats, offset);
}

/* `finished` for the `count` < LANES outputs behind which the arrays may end. */
TARGET static __attribute__((noinline)) void finish_some(const int32_t *sums, int64_t count, const float *scale,
                                                         const float *offset, const int32_t *missing, float *out)
{
    for (int64_t i = 0; i < count; i++) {
        out[i] = (float)(missing ? sums[i] - missing[i] : sums[i]) * scale[i] + offset[i];
    }
}

/* Stores V sums of a row, from output `first` on. `whole`: all of the outputs exist. */
INLINE void store_sums(const int V, const int whole, const struct product *p, int64_t first, const words *totals,
                       const float *offset, const int32_t *missing, float *out)
{
    UNROLL for (int v = 0; v < V; v++) {
        const int64_t column = first + v * LANES, count = p->outputs - column;
        const int32_t *absent = missing ? missing + column : NULL;
        integers sum = (int32_t)p->inputs - 2 * (integers)totals[v];
        if (whole || count >= LANES) {
            STORE(out + v * LANES, finished(sum, p->scale + column, offset + column, absent));
        } else if (count > 0) {
            int32_t sums[LANES];
            STORE(sums, sum);
            finish_some(sums, count, p->scale + column, offset + column, absent, out + v * LANES);
        }
    }
}

/* R rows from `row` on. Most are of the first kind: with its questions answered once its code is straight. */
INLINE void multiply_tile(const int R, const int V, const int linear, const struct product *p, const struct block *b,
                          int64_t row, int64_t vector, const uint32_t *weights, int64_t apart, float *out)
{
    words totals[TILE_ROWS][MOST_VECTORS];
    count_differences(R, V, linear, p, weights, apart, b->rows + row, totals);
    const int64_t first = vector * LANES;
    const int whole = first + V * LANES <= p->outputs;
    UNROLL for (int r = 0; r < R; r++) {
        const float *offset = b->offsets[row + r];
        const int32_t *missing = linear ? NULL : b->missing[row + r];
        if (whole && !missing) {
            store_sums(V, 1, p, first, totals[r], offset, NULL, out + r * p->out_step);
        } else {
            store_sums(V, 0, p, first, totals[r], offset, missing, out + r * p->out_step);
        }
    }
}

/* V vectors of outputs from `vector` on, of all rows; `out` is where the first of them goes in row 0. */
INLINE void multiply_vectors(const int V, const int linear, const struct product *product, const struct block *b,
                             int64_t vector, float *out)
{
    const struct product p = *product; /* a copy: for all the compiler knows, stores could change the original */
    const int64_t apart = p.run_count * p.run_words * PANEL, count = b->count;
    const uint32_t *weights =
        p.weights + vector / VECTORS_PER_PANEL * apart + vector % VECTORS_PER_PANEL * LANES;
    int64_t row = 0;
    for (; row + TILE_ROWS <= count; row += TILE_ROWS) {
        multiply_tile(TILE_ROWS, V, linear, &p, b, row, vector, weights, apart, out + row * p.out_step);
    }
    if (row < count) {
        multiply_tile(1, V, linear, &p, b, row, vector, weights, apart, out + row * p.out_step);
    }
}

/* A function for each width: the compiler keeps a tile's sums in registers. */
#define WIDTH(V, linear)                                                                                     \
    TARGET static __attribute__((noinline)) void multiply_##V##_##linear(                                    \
        const struct product *p, const struct block *b, int64_t vector, float *out)                          \
    {                                                                                                        \
        multiply_vectors(V, linear, p, b, vector, out);                                                      \
    }
WIDTH(1, 0)
WIDTH(2, 0)
WIDTH(4, 0)
WIDTH(1, 1)
WIDTH(2, 1)
WIDTH(4, 1)

INLINE void multiply_panels(const int linear, const struct product *p, const struct block *b, int64_t first,
                            int64_t last, float *out)
{
    const int64_t end = smaller(last * VECTORS_PER_PANEL, divide_up(p->outputs, LANES));
    const int64_t widest = b->count == 1 ? MOST_VECTORS : TILE_VECTORS;
    for (int64_t v = first * VECTORS_PER_PANEL, width; v < end; v += width) {
        const int64_t left = smaller(end - v, widest);
        float *to = out + v * LANES - first * PANEL;
        width = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        if (width == 4) {
            (linear ? multiply_4_1 : multiply_4_0)(p, b, v, to);
        } else if (width == 2) {
            (linear ? multiply_2_1 : multiply_2_0)(p, b, v, to);
        } else {
            (linear ? multiply_1_1 : multiply_1_0)(p, b, v, to);
        }
    }
}

TARGET static void multiply(const struct product *p, const struct block *b, int64_t first, int64_t last, float *out)
{
    multiply_panels(0, p, b, first, last, out);
}

TARGET static void multiply_linear(const struct product *p, const struct block *b, int64_t first, int64_t last,
                                   float *out)
{
    multiply_panels(1, p, b, first, last, out);
}
