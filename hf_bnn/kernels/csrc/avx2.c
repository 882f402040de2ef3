/* AVX2: Intel from Haswell, AMD from Excavator. Bits are counted by look-up of half bytes. */
#if defined(__x86_64__)
#include <immintrin.h>
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define TILE_VECTORS 2
#define COUNTS_WORDS 0
#include "vectors.inc"

INLINE words carry(words t, words s, words z)
{
    return (words)_mm256_or_si256(_mm256_andnot_si256((__m256i)s, (__m256i)t),
                                  _mm256_andnot_si256((__m256i)t, (__m256i)z));
}

INLINE words count_bits(words v)
{
    const __m256i table = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    __m256i low = _mm256_shuffle_epi8(table, (__m256i)(v & 0x0f0f0f0f));
    __m256i high = _mm256_shuffle_epi8(table, (__m256i)(v >> 4 & 0x0f0f0f0f));
    return (words)_mm256_add_epi8(low, high);
}

INLINE uint32_t signs_of_8(const float *x, const float *t, const int step)
{
    __m256 threshold = step ? _mm256_loadu_ps(t) : _mm256_set1_ps(*t);
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x), threshold, _CMP_LT_OQ));
}

INLINE uint32_t signs_of_32(const float *x, const float *t, const int step)
{
    return signs_of_8(x, t, step) | signs_of_8(x + 8, t + 8 * step, step) << 8 |
           signs_of_8(x + 16, t + 16 * step, step) << 16 | signs_of_8(x + 24, t + 24 * step, step) << 24;
}

#define LOOK_UP(table, indices) ((floats)_mm256_i32gather_ps((table), (__m256i)(indices), 4))

#define LOOKS_UP_FLOATS
INLINE floats look_up(floats table, words v)
{
    return (floats)_mm256_permutevar8x32_ps((__m256)table, (__m256i)v);
}

#define IN_REGISTER(vector) __asm__("" : "+x"(vector))

INLINE floats multiply_add(floats a, floats b, floats c)
{
    return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

#include "templates.inc"

static int available(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

INSTRUCTION_SET(avx2, "avx2");
#endif
