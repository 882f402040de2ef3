/* Operations for instruction sets that have no better ones. */

INLINE words carry(words t, words s, words z) { return (t & ~s) | (~t & z); }

INLINE uint32_t signs_of_32(const float *x, const float *t, const int step)
{
    uint32_t signs = 0;
    for (int i = 0; i < 32; i++) {
        signs |= (uint32_t)(x[i] < t[i * step]) << i;
    }
    return signs;
}

/* a * b + c, rounded once. A double holds the product exactly, the sum not always: where it is rounded, the last bit
 * of it is made 1, so that the rounding to float sees that there was something behind (rounding to odd). */
INLINE float multiply_add_one(float a, float b, float c)
{
    const double product = (double)a * b, sum = product + c;
    const double back = sum - product, error = (product - (sum - back)) + (c - back);
    uint64_t bits;
    memcpy(&bits, &sum, sizeof bits);
    if (error != 0 && sum - sum == 0 && !(bits & 1)) {
        bits += (error > 0) == (sum > 0) ? 1 : -1; /* away from 0 or towards it */
    }
    double odd;
    memcpy(&odd, &bits, sizeof odd);
    return (float)odd;
}

INLINE floats multiply_add(floats a, floats b, floats c)
{
    UNROLL for (int i = 0; i < LANES; i++) a[i] = multiply_add_one(a[i], b[i], c[i]);
    return a;
}
