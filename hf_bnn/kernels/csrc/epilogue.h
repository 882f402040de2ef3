/* What follows a convolution, written once for all instruction sets. The file that includes this has included packing.h
 * and says
 *
 *   multiply_add(a, b, c)   a * b + c, rounded once
 */

/* Stores the first `count` <= LANES floats. */
INLINE void store_some(float *to, floats v, int64_t count)
{
    if (count >= LANES) {
        STORE(to, v);
    } else {
        memcpy(to, &v, (size_t)count * sizeof *to);
    }
}

/* A batch normalization in evaluation, as torch rounds it on this processor. */
INLINE floats normalized(floats x, const float *alpha, const float *beta, const int fused, int64_t count)
{
    floats a = load_some(alpha, count), b = load_some(beta, count);
    return fused ? multiply_add(x, a, b) : x * a + b;
}

/* x > 0 ? x : slope * x between two shifts. */
INLINE floats rprelu(floats x, const struct conv2d_epilogue *e, int64_t i, int64_t count)
{
    x -= load_some(e->rprelu_shift + i, count);
    const words above = (words)(x > (floats){0});
    x = (floats)((above & (words)x) | (~above & (words)(load_some(e->rprelu_slope + i, count) * x)));
    return x + load_some(e->rprelu_offset + i, count);
}

/* The first `count` <= LANES of the shortcut's values from `x` on; means are summed one after the other, as torch does
 * it. */
INLINE floats shortcut_values(const float *x, int64_t group, int64_t count)
{
    if (group == 1) {
        return load_some(x, count);
    }
    float sums[LANES] = {0}; /* an array: compilers make vectors of loops over one */
    if (count >= LANES && group == 4) {
        for (int i = 0; i < LANES; i++) {
            sums[i] = x[4 * i] + x[4 * i + 1] + x[4 * i + 2] + x[4 * i + 3];
        }
    } else {
        for (int64_t i = 0; i < smaller(count, LANES); i++) {
            const float *from = x + i * group;
            sums[i] = group == 2 ? from[0] + from[1] : from[0] + from[1] + from[2] + from[3];
        }
    }
    return LOAD(floats, sums) * (group == 2 ? 0.5f : 0.25f);
}

/* What most rows need has a case of its own, `usual`: whole vectors, a normalization, a plain shortcut or none. */
INLINE void finish_rows(const struct conv2d_epilogue e, const int usual, const int fused, const int around,
                        int64_t count, int64_t rows, const float *sums, const float *shortcut, int64_t shortcut_step,
                        float *out, int64_t out_step)
{
    for (int64_t row = 0; row < rows; row++) {
        const float *from = sums + row * CHUNK, *beside = around ? shortcut + row * shortcut_step : NULL;
        float *to = out + row * out_step;
        for (int64_t i = 0; i < count; i += LANES) {
            const int64_t some = usual ? LANES : count - i;
            floats y = load_some(from + i, some);
            if (usual || e.alpha) {
                y = normalized(y, e.alpha + i, e.beta + i, fused, some);
            }
            if (usual && around) {
                y += LOAD(floats, beside + i);
            } else if (around) {
                floats x = shortcut_values(beside + i * e.shortcut_group, e.shortcut_group, some);
                y += e.shortcut_alpha ? normalized(x, e.shortcut_alpha + i, e.shortcut_beta + i, fused, some) : x;
            }
            if (!usual && e.rprelu_shift) {
                y = rprelu(y, &e, i, some);
            }
            store_some(to + i, y, some);
        }
    }
}

/* `e` with its arrays from output `first` on. */
INLINE struct conv2d_epilogue from_output(const struct conv2d_epilogue *e, int64_t first)
{
    struct conv2d_epilogue moved = *e;
    const float **arrays[] = {&moved.alpha,         &moved.beta,         &moved.shortcut_alpha, &moved.shortcut_beta,
                              &moved.rprelu_shift, &moved.rprelu_slope, &moved.rprelu_offset};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) {
        *arrays[i] = *arrays[i] ? *arrays[i] + first : NULL;
    }
    return moved;
}

#define FINISH_ROWS(usual, fused, around) \
    finish_rows(e, usual, fused, around, count, rows, sums, shortcut, shortcut_step, out, out_step)

TARGET static void finish(const struct conv2d_epilogue *all, int64_t first, int64_t count, int64_t rows,
                          const float *sums, const float *shortcut, int64_t shortcut_step, float *out,
                          int64_t out_step)
{
    const struct conv2d_epilogue e = from_output(all, first);
    const int usual = e.alpha && !e.shortcut_alpha && !e.rprelu_shift && count % LANES == 0 && e.fused &&
                      (!shortcut || e.shortcut_group == 1);
    if (usual && shortcut) {
        FINISH_ROWS(1, 1, 1);
    } else if (usual) {
        FINISH_ROWS(1, 1, 0);
    } else if (e.fused) {
        FINISH_ROWS(0, 1, shortcut != NULL);
    } else {
        FINISH_ROWS(0, 0, shortcut != NULL);
    }
}
