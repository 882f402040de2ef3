/* The product of bits, written once for all instruction sets. The file that includes this has included vectors.h and
 * says
 *
 *   TILE_ROWS           rows of a tile, at most 4, so that its sums stay in registers; it is two vectors wide
 *   carry(d1, d12, z)   the carry of z + d1 + d2 where d12 = d1 ^ d2
 *   count_bits(v)       how many bits are set: per word if COUNTS_WORDS, else per byte
 */
enum {
    VECTORS_PER_PANEL = PANEL / LANES,
    MOST_ROWS = 4,
    MOST_VECTORS = 4,
    STEPS_OF_BYTES = 31 /* a byte overflows after 31 counts of up to 8 */
};

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

/* Where vector v of the outputs begins in the panels. */
INLINE const uint32_t *vector_of(const struct product *p, int64_t v)
{
    int64_t panel_words = p->run_count * p->run_words * PANEL;
    return p->weights + v / VECTORS_PER_PANEL * panel_words + v % VECTORS_PER_PANEL * LANES;
}

/* Differences between R rows and V vectors of outputs; R and V are constants in every call. */
INLINE void count_differences(const int R, const int V, const struct product *p, const uint32_t *const *rows,
                              int64_t vector, words totals[MOST_ROWS][MOST_VECTORS])
{
    words z[MOST_ROWS][MOST_VECTORS], sums[MOST_ROWS][MOST_VECTORS];
    const uint32_t *w[MOST_VECTORS], *a[MOST_ROWS];
    UNROLL for (int v = 0; v < V; v++) {
        w[v] = vector_of(p, vector + v);
        UNROLL for (int r = 0; r < R; r++) {
            z[r][v] = sums[r][v] = totals[r][v] = (words){0};
        }
    }
    int64_t room = STEPS_OF_BYTES;
    for (int64_t run = 0; run < p->run_count; run++) {
        UNROLL for (int r = 0; r < R; r++) {
            a[r] = rows[r] + p->runs[run];
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
                        words first = w1[v] ^ a1, both = w2[v] ^ a2;
                        sums[r][v] = add_counts(sums[r][v], count_bits(carry(first, both, z[r][v])));
                        z[r][v] ^= both;
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

/* Stores sums of R rows and V vectors. `whole`: all of the vectors' outputs exist. `inner`: nothing is missing. */
INLINE void store_tile(const int R, const int V, const int whole, const int inner, const struct product *p,
                       const struct block *b, int64_t row, int64_t vector, words totals[MOST_ROWS][MOST_VECTORS],
                       float *out)
{
    UNROLL for (int r = 0; r < R; r++) {
        const float *offset = b->offsets[row + r];
        const int32_t *missing = inner ? NULL : b->missing[row + r];
        UNROLL for (int v = 0; v < V; v++) {
            integers sum = (int32_t)p->inputs - 2 * (integers)totals[r][v];
            int64_t first = (vector + v) * LANES, count = p->outputs - first;
            const int32_t *absent = missing ? missing + first : NULL;
            float *to = out + (row + r) * p->out_step + v * LANES;
            if (whole || count >= LANES) {
                STORE(to, finished(sum, p->scale + first, offset + first, absent));
            } else if (count > 0) {
                int32_t sums[LANES];
                STORE(sums, sum);
                finish_some(sums, count, p->scale + first, offset + first, absent, to);
            }
        }
    }
}

/* The outputs from `vector` on of R rows; `out` is where the first of them goes in row 0 of the block. */
INLINE void multiply_tile(const int R, const int V, const struct product *p, const struct block *b, int64_t row,
                          int64_t vector, float *out)
{
    words totals[MOST_ROWS][MOST_VECTORS];
    count_differences(R, V, p, b->rows + row, vector, totals);
    int inner = 1;
    UNROLL for (int r = 0; r < R; r++) inner &= !b->missing[row + r];
    /* Most tiles are of the first kind; with its questions answered once its code is straight. */
    if (inner && (vector + V) * LANES <= p->outputs) {
        store_tile(R, V, 1, 1, p, b, row, vector, totals, out);
    } else {
        store_tile(R, V, 0, 0, p, b, row, vector, totals, out);
    }
}

/* A function for each shape of a tile: the compiler keeps its sums in registers. */
#define TILE_FUNCTION(R, V)                                                                                   \
    TARGET static __attribute__((noinline)) void tile_##R##_##V(const struct product *p, const struct block *b, \
                                                                int64_t row, int64_t vector, float *out)      \
    {                                                                                                         \
        multiply_tile(R, V, p, b, row, vector, out);                                                          \
    }
#define TILE_FUNCTIONS(V) TILE_FUNCTION(1, V) TILE_FUNCTION(2, V) TILE_FUNCTION(3, V) TILE_FUNCTION(4, V)
TILE_FUNCTIONS(1)
TILE_FUNCTIONS(2)
TILE_FUNCTION(1, 4)

typedef void (*tile_function)(const struct product *, const struct block *, int64_t, int64_t, float *);

TARGET static void multiply(const struct product *p, const struct block *b, int64_t first, int64_t last, float *out)
{
    static const tile_function narrow[] = {tile_1_1, tile_2_1, tile_3_1, tile_4_1};
    static const tile_function wide[] = {tile_1_2, tile_2_2, tile_3_2, tile_4_2};
    int64_t end = smaller(last * VECTORS_PER_PANEL, divide_up(p->outputs, LANES));
    for (int64_t v = first * VECTORS_PER_PANEL; v < end;) {
        int64_t width = b->count == 1 && end - v >= 4 ? 4 : end - v >= 2 ? 2 : 1;
        for (int64_t row = 0; row < b->count;) {
            int64_t height = smaller(b->count - row, TILE_ROWS);
            tile_function tile = width == 4 ? tile_1_4 : width == 2 ? wide[height - 1] : narrow[height - 1];
            tile(p, b, row, v, out + v * LANES - first * PANEL);
            row += height;
        }
        v += width;
    }
}
