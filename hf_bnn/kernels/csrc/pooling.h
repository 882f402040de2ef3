/* Maximum pooling and a normalization, written once for all instruction sets. The file that includes this has included
 * epilogue.h.
 */

/* As torch chooses: the first of equal values, and NaN once there is one. */
INLINE floats larger(floats a, floats b)
{
    const words takes_b = (words)(b > a) | (words)(b != b);
    return (floats)((takes_b & (words)b) | (~takes_b & (words)a));
}

INLINE floats window_maximum(const float *from, int64_t rows, int64_t columns, int64_t row_step, int64_t pixel_step,
                             int64_t count)
{
    floats most = load_some(from, count);
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t column = 0; column < columns; column++) {
            most = larger(most, load_some(from + row * row_step + column * pixel_step, count));
        }
    }
    return most;
}

/* The part of a window that lies in the image. */
INLINE int64_t clipped(int64_t start, int64_t length, int64_t size, int64_t *first)
{
    const int64_t last = smaller(start + length, size);
    *first = start < 0 ? 0 : start;
    return last - *first;
}

INLINE floats finished_maximum(floats most, const float *alpha, const float *beta, int fused, int64_t count)
{
    return fused ? normalized(most, alpha, beta, 1, count) : normalized(most, alpha, beta, 0, count);
}

TARGET static void max_pool(const struct pool_shape *s, const float *image, int64_t y, const float *alpha,
                            const float *beta, int fused, float *out)
{
    const int64_t row_step = s->width * s->channels, channels = s->channels;
    int64_t row, column;
    const int64_t rows = clipped(y * s->stride[0] - s->padding[0], s->kernel[0], s->height, &row);
    for (int64_t x = 0; x < s->out_width; x++, out += channels) {
        const int64_t columns = clipped(x * s->stride[1] - s->padding[1], s->kernel[1], s->width, &column);
        const float *from = image + row * row_step + column * channels;
        int64_t i = 0;
        for (; i + LANES <= channels; i += LANES) {
            floats most = rows == 3 && columns == 3 ? window_maximum(from + i, 3, 3, row_step, channels, LANES)
                                                    : window_maximum(from + i, rows, columns, row_step, channels, LANES);
            STORE(out + i, finished_maximum(most, alpha + i, beta + i, fused, LANES));
        }
        if (i < channels) {
            floats most = window_maximum(from + i, rows, columns, row_step, channels, channels - i);
            most = finished_maximum(most, alpha + i, beta + i, fused, channels - i);
            store_some(out + i, most, channels - i);
        }
    }
}
