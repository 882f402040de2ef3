/* What both kinds of AVX-512 do alike. */
#include <immintrin.h>

#include "vectors.h"

/* The compiler has this value in a register here, and knows nothing of how it came about. */
#define IN_REGISTER(vector) __asm__("" : "+v"(vector))

static int has_avx512(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

/* Any function of three bits is one instruction; its truth table is the last argument. There are fewer units for it
 * than for xor, so that nothing else is done with it. */
INLINE words carry(words t, words s, words z)
{
    return (words)_mm512_ternarylogic_epi32((__m512i)t, (__m512i)s, (__m512i)z, 0x3A);
}

#define CARRY_OF_PAIR
INLINE words carry_of_pair(words d1, words d12, words z)
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

#define SIGNS_OF_SOME
INLINE uint32_t signs_of_some(const float *x, const float *t, const int step, int64_t count)
{
    uint32_t signs = 0, mask = (1u << count) - 1;
    UNROLL for (int i = 0; i < 32; i += 16) {
        const __mmask16 part = (__mmask16)(mask >> i);
        __m512 values = _mm512_maskz_loadu_ps(part, x + i);
        __m512 threshold = step ? _mm512_maskz_loadu_ps(part, t + i) : _mm512_set1_ps(*t);
        signs |= (uint32_t)_mm512_mask_cmp_ps_mask(part, values, threshold, _CMP_LT_OQ) << i;
    }
    return signs;
}

/* A register holds a table of 16; of an index, only the low 4 bits count. */
INLINE floats add_exponentials(floats sums, const struct scores *s, words counts, const int masks, words shut,
                               uint32_t bit)
{
    __m512 coarse = _mm512_permutexvar_ps((__m512i)(counts >> 4), _mm512_loadu_ps(s->coarse));
    __m512 fine = _mm512_permutexvar_ps((__m512i)counts, _mm512_loadu_ps(s->fine));
    if (!masks) {
        return (floats)_mm512_fmadd_ps(coarse, fine, (__m512)sums);
    }
    __mmask16 open = _mm512_testn_epi32_mask((__m512i)shut, _mm512_set1_epi32((int)bit));
    return (floats)_mm512_mask3_fmadd_ps(coarse, fine, (__m512)sums, open);
}

INLINE words set_where(words bits, const uint32_t *counts, integers limits, uint32_t bit)
{
    __mmask16 many = _mm512_cmpge_epi32_mask(_mm512_loadu_si512(counts), (__m512i)limits);
    return (words)_mm512_mask_or_epi32((__m512i)bits, many, (__m512i)bits, _mm512_set1_epi32((int)bit));
}

INLINE floats look_up(floats table, words v)
{
    return (floats)_mm512_permutexvar_ps((__m512i)v, (__m512)table);
}

INLINE floats multiply_add(floats a, floats b, floats c)
{
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

#include "packing.h"
#include "training.inc"
#include "epilogue.h"
#include "pooling.h"
#include "weight_only_lookup.h"
