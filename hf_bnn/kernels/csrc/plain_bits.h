/* Operations on bits for instruction sets that have no better ones. */

INLINE words carry(words t, words s, words z) { return (t & ~s) | (~t & z); }

INLINE uint32_t signs_of_32(const float *x, const float *t, const int step)
{
    uint32_t signs = 0;
    for (int i = 0; i < 32; i++) {
        signs |= (uint32_t)(x[i] < t[i * step]) << i;
    }
    return signs;
}
