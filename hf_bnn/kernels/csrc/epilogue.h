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
    floats sums = {0};
    for (int64_t i = 0; i < smaller(count, LANES); i++) {
        const float *from = x + i * group;
        sums[i] = group == 2 ? from[0] + from[1] : from[0] + from[1] + from[2] + from[3];
    }
    return sums * (group == 2 ? 0.5f : 0.25f);
}

INLINE void finish_row(const struct conv2d_epilogue *e, int64_t first, int64_t count, const int fused,
                       const float *sums, const float *shortcut, float *out)
{
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t some = count - i;
        floats y = load_some(sums + i, some);
        if (e->alpha) {
            y = normalized(y, e->alpha + first + i, e->beta + first + i, fused, some);
        }
        if (shortcut) {
            floats x = shortcut_values(shortcut + i * e->shortcut_group, e->shortcut_group, some);
            if (e->shortcut_alpha) {
                x = normalized(x, e->shortcut_alpha + first + i, e->shortcut_beta + first + i, fused, some);
            }
            y += x;
        }
        if (e->rprelu_shift) {
            y = rprelu(y, e, first + i, some);
        }
        store_some(out + i, y, some);
    }
}

TARGET static void finish(const struct conv2d_epilogue *e, int64_t first, int64_t count, int64_t rows,
                          const float *sums, const float *shortcut, int64_t shortcut_step, float *out,
                          int64_t out_step)
{
    for (int64_t row = 0; row < rows; row++, sums += CHUNK, out += out_step) {
        if (e->fused) {
            finish_row(e, first, count, 1, sums, shortcut, out);
        } else {
            finish_row(e, first, count, 0, sums, shortcut, out);
        }
        shortcut = shortcut ? shortcut + shortcut_step : NULL;
    }
}
