/* What the drivers (linear.c, conv2d.c, ...) and the instruction sets (avx512.c, avx2.c, ...) share.
 *
 * Bits. Bit 1 stands for -1. With K inputs, sum(w * x) = K - 2 * popcount(w ^ x).
 *
 * Prefix parity. Words of 32 bits, of weights and activations alike, are stored as prefixes: x1' = x1, x2' = x1 ^ x2,
 * x3' = x1 ^ x2 ^ x3 and so on. With d = w ^ x, w2' ^ x2' is, for each bit position, the parity of the differences seen
 * so far. A loop over pairs of words keeps it in z:
 *     t = w1' ^ x1'                      parity after the first word of a pair
 *     s = w2' ^ x2'                      parity after the second one
 *     carry = t ? ~s : z                 z + d1 + d2 = 2 * carry + s: a full adder
 * so only the carry is counted, once for two words, and it weighs 2; z itself is counted once at the end.
 * In linear layers prefixes run through all inputs. In convolutions, whose windows are put together from several runs of
 * words, they begin anew in each pair, (x1, x1 ^ x2), and the loop computes t = z ^ w1' ^ x1' and s = z ^ w2' ^ x2'.
 *
 * Panels. Weights lie as [output / 16][word][16]: word k of 16 consecutive outputs is one vector of 512 bits. Missing
 * outputs and inputs are bits 0. The layout is the same for every instruction set.
 */
#ifndef HF_BNN_KERNELS_H
#define HF_BNN_KERNELS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "hf_bnn.h"

enum {
    PANEL = 16,     /* outputs in a panel */
    PAIR_BITS = 64, /* inputs are padded to whole pairs of words */
    BLOCK_ROWS = 64, /* rows that one call of `multiply` takes: their bits stay in the first cache */
    CHUNK = 64       /* outputs that stay in the first cache for what follows: four panels, one pair of words */
};

/* Words that hold `inputs` bits. */
static inline int64_t words_of(int64_t inputs) { return (inputs + PAIR_BITS - 1) / PAIR_BITS * 2; }

static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* How many of `rows` rows go into a block so that every thread gets some, in whole tiles. */
static inline int64_t block_rows(int64_t rows, int64_t threads)
{
    int64_t share = divide_up(divide_up(rows, threads), 4) * 4;
    return share < 4 ? 4 : smaller(share, BLOCK_ROWS);
}

/* A value counts as -1 if it is < its threshold, so that NaN and -0.0 (against 0) count as +1. */
struct threshold {
    const float *values;
    int per_input; /* whether `values` holds one number per input or a single one */
};

/* What stays the same for all rows of a product. */
struct product {
    const uint32_t *weights; /* panels */
    int64_t inputs;          /* signs that an output sums */
    int64_t outputs;
    const int64_t *runs; /* a row's bits are `run_count` runs of `run_words` words, at these offsets from its start */
    int64_t run_count, run_words;
    const float *scale; /* [outputs] */
    int64_t out_step;   /* from a row of the output to the next one */
};

/* At most BLOCK_ROWS rows. out = (sum - missing) * scale + offset, each operation rounded, as torch does it. */
struct block {
    int64_t count;
    const uint32_t *rows[BLOCK_ROWS];
    const float *offsets[BLOCK_ROWS];   /* [outputs] each */
    const int32_t *missing[BLOCK_ROWS]; /* [outputs] each, or NULL: sums over what lies in a convolution's padding */
};

enum { MOST_HEAD_SIZE = 255, MOST_HEAD_WORDS = 8 };

/* What the scores of a head's queries depend on; see attention.c. */
struct scores {
    const uint32_t *keys; /* [tokens][words], not in pairs; there are 2, 4 or 8 words */
    int64_t all_tokens, tokens, size, words; /* all, and those up to the last one that is not masked for all queries */
    int softmax, masks;                      /* masks: some of `tokens` are masked */
    float threshold, tolerance; /* of probabilities, the latter relative */
    int32_t limit;              /* without softmax: so many differences make a score low */
    /* exp(score) by the number of differences d; nearly the same is coarse[d / 16] * fine[d % 16] */
    float exponentials[MOST_HEAD_SIZE + 1], coarse[16], fine[16];
};

/* Everything that depends on the processor. */
struct instruction_set {
    const char *name;
    int (*available)(void);
    /* Signs of `rows` rows of floats, `row_step` floats apart, to rows of words_of(inputs) words, `out_step` apart. */
    void (*pack_rows)(const float *x, int64_t row_step, int64_t rows, int64_t inputs, struct threshold threshold,
                      uint32_t *out, int64_t out_step);
    /* The same with prefixes through all words of a row. */
    void (*pack_linear)(const float *x, int64_t row_step, int64_t rows, int64_t inputs, struct threshold threshold,
                        uint32_t *out, int64_t out_step);
    /* As pack_rows, where the inputs of a row lie `plane` floats apart, and the rows one: images with channels first. */
    void (*pack_planes)(const float *x, int64_t plane, int64_t rows, int64_t inputs, struct threshold threshold,
                        uint32_t *out, int64_t out_step);
    /* The panels [first, last) of the product of a block; `out` is where output first * PANEL of its row 0 goes. */
    void (*multiply)(const struct product *p, const struct block *b, int64_t first, int64_t last, float *out);
    /* The same for prefixes through all words; there is one run, and nothing is missing. */
    void (*multiply_linear)(const struct product *p, const struct block *b, int64_t first, int64_t last, float *out);
    /* What follows a convolution, for `rows` rows of the outputs [first, first + count): CHUNK floats apart in `sums`,
     * `shortcut_step` in `shortcut` (or NULL), `out_step` in `out`, which may be either of them. */
    void (*finish)(const struct conv2d_epilogue *e, int64_t first, int64_t count, int64_t rows, const float *sums,
                   const float *shortcut, int64_t shortcut_step, float *out, int64_t out_step);
    /* Row y of the output for one image. */
    void (*max_pool)(const struct pool_shape *s, const float *image, int64_t y, const float *alpha, const float *beta,
                     int fused, float *out);
    /* Floats that `prepare_inputs` writes for a row of the weight-only product, and the product of `rows` rows. */
    int64_t (*prepared_size)(int64_t inputs);
    void (*prepare_inputs)(const float *x, int64_t inputs, float *out);
    void (*multiply_floats)(const uint32_t *weights, const float *prepared, int64_t rows, int64_t inputs,
                            int64_t outputs, int64_t first, int64_t last, const float *scale, const float *offset,
                            float *out);
    /* Bits of the tokens that `count` queries, [count][words], do not attend to, in pairs. `masked` or NULL has the
     * bits of those that they may not, not in pairs. `counts`, [tokens][PANEL], is for the function's own use. Sets
     * `unsure` to 1 for a query whose bits torch may see otherwise, else to 0. */
    void (*attend)(const struct scores *s, const uint32_t *queries, int64_t count, const uint32_t *masked,
                   int64_t masked_step, uint32_t *counts, uint32_t *out, int64_t out_step, uint8_t *unsure);
    /* See hf_bnn_elements. */
    void (*signs)(const float *x, int64_t count, float *out);
    void (*sign_bits)(const float *x, int64_t count, uint32_t *bits);
    void (*inside_bits)(const float *x, int64_t count, float bound, uint32_t *bits);
    void (*signs_of_bits)(const uint32_t *bits, int64_t count, float *out);
    void (*keep_where)(const uint32_t *bits, const float *x, int64_t count, float *out);
    void (*to_bytes)(const float *x, int64_t count, float steps, int8_t *out);
    void (*from_bytes)(const int8_t *bytes, int64_t count, float steps, float *out);
    void (*signs_of_bytes)(const int8_t *bytes, int64_t count, float *out);
    void (*keep_within)(const int8_t *bytes, const float *x, int64_t count, int64_t most, float *out);
};

/* The i-th instruction set that this library was built with, best first; NULL after the last one. */
const struct instruction_set *instruction_set(int64_t i);

/* On torch's threads, or on this one if `pool` is NULL. */
static inline void for_range(parallel_for pool, int64_t count, range_function f, void *context)
{
    if (pool && count > 1) {
        pool(0, count, 1, f, context);
    } else if (count > 0) {
        f(0, count, context);
    }
}

#endif
