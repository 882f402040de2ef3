/* The functions that Python calls (`declare` in hf_bnn/kernels states the same signatures).
 *
 * `set` is the number of an instruction set. `pool` is torch's function or NULL, for one thread. Products return OK or
 * OUT_OF_MEMORY. `offset` and `bias` have a number for each output, -0.0 where nothing is to be added: x + -0.0 is x
 * for every x. `threshold` points to one number, or to one per input if `per_input`.
 */
#ifndef HF_BNN_H
#define HF_BNN_H

#include <stdint.h>

#define EXPORTED __attribute__((visibility("default")))

/* The last two are returned by attention only. */
enum { OK = 0, OUT_OF_MEMORY = 1, UNSURE = 2, NOT_TAKEN = 3 };

/* Of torch's C interface: calls f(begin, end, context) for parts of [begin, end) on torch's threads. */
typedef void (*range_function)(int64_t begin, int64_t end, void *context);
typedef int32_t (*parallel_for)(int64_t begin, int64_t end, int64_t grain, range_function f, void *context);

/* What no call of a linear layer changes, in the order of the fields of LinearPlan in hf_bnn/kernels/library.py. */
struct linear_plan {
    int64_t set;
    parallel_for pool;
    int64_t inputs, outputs;
    const uint32_t *weights;
    const float *scale, *offset;
    const float *thresholds; /* [parts], or [parts][inputs] if per_input */
    int64_t parts;           /* of the outputs, equal ones: each sees the inputs through its own thresholds */
    int64_t per_input;
};

/* A hidden value h counts as -1 where low <= h < high; the thresholds of `second` are not used. */
struct ffn_plan {
    struct linear_plan first, second;
    float low, high;
};

/* In the order of the fields of Conv2dShape in hf_bnn/kernels/conv2d.py. */
struct conv2d_shape {
    int64_t batch, channels, height, width;                 /* of the input */
    int64_t image_step, channel_step, row_step, pixel_step; /* of the input, in floats; channel or pixel step is 1 */
    int64_t outputs, kernel[2], stride[2], padding[2], dilation[2], groups;
    int64_t out_height, out_width;
};

/* In the order of the fields of AttentionShape in hf_bnn/kernels/attention.py. Steps are in floats, from a batch, head
 * and token to the next; 0 where a mask is the same for all. */
struct attention_shape {
    int64_t batch, heads, queries, keys, size;
    int64_t query_steps[3], key_steps[3], value_steps[3], mask_steps[3];
};

/* Some memory, in the order of the fields of MemorySpan in hf_bnn/kernels/sources.py. */
struct memory_span {
    const void *data;
    int64_t bytes;
};

/* In the order of the fields of PoolShape in hf_bnn/kernels/pooling.py. Every window has a pixel of the image. */
struct pool_shape {
    int64_t batch, height, width, channels; /* of the input, NHWC without gaps */
    int64_t kernel[2], stride[2], padding[2], out_height, out_width;
};

/* What follows a sum and its scale, in this order, each operation rounded; NULL where it is left out. Arrays have a
 * number for each output. */
struct conv2d_epilogue {
    const float *alpha, *beta;                   /* batch normalization: y = y * alpha + beta */
    const float *shortcut_alpha, *shortcut_beta; /* the same for the shortcut, which is then added */
    const float *rprelu_shift, *rprelu_slope, *rprelu_offset; /* y - shift; below 0 times slope; + offset */
    int64_t shortcut_group; /* the shortcut has so many channels for each output, and their mean is added: 1, 2 or 4 */
    int64_t fused; /* whether multiplication and addition of a normalization are rounded once, as FMA does it */
};

/* In the order of the fields of Conv2dLayer in hf_bnn/kernels/planned_block.py: what calls have in common. */
struct conv2d_layer {
    struct conv2d_shape shape; /* groups is 1 */
    const float *threshold;
    int64_t per_input;
    const uint32_t *weights;
    const int32_t *corners;
    const float *scale, *shift, *bias;
    struct conv2d_epilogue epilogue;
};

/* Raised with every change of a function or structure here: Python refuses a library built from older sources. */
EXPORTED int64_t hf_bnn_interface(void);

/* The name of the i-th instruction set, best first; NULL after the last one. */
EXPORTED const char *hf_bnn_name(int64_t i);

/* Whether this processor has the i-th instruction set. */
EXPORTED int hf_bnn_available(int64_t i);

/* (rows, inputs), rows `row_step` floats apart, to (rows, outputs), on `threads` threads: one if there is no pool. */
EXPORTED int hf_bnn_linear(const struct linear_plan *plan, const float *x, int64_t row_step, int64_t rows,
                           int64_t threads, float *out);

/* The same for inputs that stay floats. */
EXPORTED int hf_bnn_linear_weight_only(const struct linear_plan *plan, const float *x, int64_t row_step, int64_t rows,
                                       int64_t threads, float *out);

/* Two linear layers with an interval of hidden values between them. */
EXPORTED int hf_bnn_ffn(const struct ffn_plan *plan, const float *x, int64_t row_step, int64_t rows, int64_t threads,
                        float *out);

/* NCHW or NHWC floats and panels [group][panel][kernel row][kernel column][word][16] to NHWC floats. `corners` is
 * [kh + 1][kw + 1][outputs]: the sum of the kernel's signs above and left of a corner. `shift`, or NULL: its product
 * with the sum of the signs that a pixel sees is added to the bias. All sizes are at least 1. */
EXPORTED int hf_bnn_conv2d(int64_t set, parallel_for pool, int64_t threads, const struct conv2d_shape *shape,
                           const float *x, const float *threshold, int per_input, const uint32_t *weights,
                           const int32_t *corners, const float *scale, const float *shift, const float *bias,
                           float *out);

/* Attention of signs to (batch, queries, heads, size). `mask` may be NULL. `levels`: the thresholds of queries, keys,
 * values, and of probabilities (without softmax: of scores), the scale of a score, and the scales of the two products
 * that a context is the sum of. UNSURE: some bytes of `unsure`, (batch, heads, queries), are 1; in those rows torch's
 * softmax has to decide, with the two functions below. NOT_TAKEN: the levels, the size or the mask are unusual, and
 * nothing was computed. No size is 0. */
EXPORTED int hf_bnn_attention(int64_t set, parallel_for pool, const struct attention_shape *shape, const float *query,
                              const float *key, const float *value, const float *mask, const float *levels,
                              float scaling, int softmax, float *out, uint8_t *unsure);

/* Scores of the given rows of (batch, heads, queries), mask and all, to (count, keys). */
EXPORTED int hf_bnn_attention_scores(int64_t set, const struct attention_shape *shape, const float *query,
                                     const float *key, const float *mask, const float *levels, float scaling,
                                     const int64_t *rows, int64_t count, float *out);

/* What follows from the probabilities, (count, keys), of the given rows: these rows of hf_bnn_attention's `out`. */
EXPORTED int hf_bnn_attention_context(int64_t set, const struct attention_shape *shape, const float *value,
                                      const float *levels, const float *weights, const int64_t *rows, int64_t count,
                                      float *out);

/* A convolution and what follows it. The input is floats `x` or, if `x` is NULL, bits [pixel][word]. The output is NHWC
 * floats `out`, or bits [pixel][word] against `next_threshold`, which is one number or one per output, or both; NULL
 * leaves one out. `shortcut`: NHWC floats, shortcut_group for each output, or NULL. It may be `out` itself. */
EXPORTED int hf_bnn_conv2d_block(int64_t set, parallel_for pool, int64_t threads, const struct conv2d_layer *layer,
                                 const float *x, const uint32_t *bits, const float *shortcut, float *out,
                                 uint32_t *out_bits, const float *next_threshold, int next_per_output);

/* The largest value of each window, or NaN if it has one, times alpha plus beta. NHWC floats. */
EXPORTED int hf_bnn_max_pool(int64_t set, parallel_for pool, const struct pool_shape *shape, const float *x,
                             const float *alpha, const float *beta, int fused, float *out);

/* Elementwise functions of training steps. Bit i of word n belongs to element 32 * n + i; bytes are int8. */
enum {
    SIGNS,          /* floats: -1 where x < 0, else +1 */
    SIGN_BITS,      /* bits: 1 where x < 0 */
    INSIDE_BITS,    /* bits: 1 where -number < x < number */
    SIGNS_OF_BITS,  /* floats: -1 where a bit is 1, else +1 */
    KEEP_WHERE,     /* floats: x times the bit */
    TO_BYTES,       /* bytes: x * number, rounded away from 0, from -127 to 127 */
    FROM_BYTES,     /* floats: the middle of what a byte stands for, over `number` */
    SIGNS_OF_BYTES, /* floats: -1 where a byte is < 0, else +1 */
    KEEP_WITHIN,    /* floats: x where the size of the byte is at most `number`, else 0 * x */
};

/* One of these functions of `count` elements. `codes`: bits or bytes. `codes` or `x` may be NULL where it is not read. */
EXPORTED void hf_bnn_elements(int64_t set, parallel_for pool, int64_t function, int64_t count, const void *codes,
                              const float *x, float number, void *out);

/* The signs of float weights to panels: (rows, inputs) if `taps` is 0, else a convolution's (rows, inputs, taps). */
EXPORTED int hf_bnn_pack_weight(int64_t set, parallel_for pool, const float *x, int64_t rows, int64_t inputs,
                                int64_t taps, uint32_t *out);

/* The products of the signs of (batch, rows, inputs) and (batch, outputs, inputs), to (batch, rows, outputs). */
EXPORTED int hf_bnn_sign_products(int64_t set, parallel_for pool, const float *left, const float *right, int64_t batch,
                                  int64_t rows, int64_t inputs, int64_t outputs, float *out);

/* A digest of these bytes. */
EXPORTED uint64_t hf_bnn_digest(const struct memory_span *spans, int64_t count);

/* For benchmarks: counts differing bits in registers; returns how many it compared, 0 if the processor cannot. */
EXPORTED int64_t hf_bnn_count_bits(int64_t rounds);

#endif
