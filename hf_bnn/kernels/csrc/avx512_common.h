/* What both kinds of AVX-512 do alike. */
#include "vectors.h"

#include "weight_only_avx512.h"

static int has_avx512(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

/* Any function of three bits is one instruction; its truth table is the last argument. There are fewer units for it
 * than for xor, so that nothing else is done with it. */
INLINE words carry(words d1, words d12, words z)
{
    return (words)_mm512_ternarylogic_epi32((__m512i)d1, (__m512i)d12, (__m512i)z, 0xB8);
}

INLINE uint32_t signs_of_16(const float *x, const float *t, const int step)
{
    __m512 threshold = step ? _mm512_loadu_ps(t) : _mm512_set1_ps(*t);
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(x), threshold, _CMP_LT_OQ);
}

INLINE uint32_t signs_of_32(const float *x, const float *t, const int step)
{
    return signs_of_16(x, t, step) | signs_of_16(x + 16, t + 16 * step, step) << 16;
}

INLINE floats multiply_add(floats a, floats b, floats c)
{
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

#include "packing.h"
#include "epilogue.h"
#include "pooling.h"
