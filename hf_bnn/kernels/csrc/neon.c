/* NEON, which every 64-bit ARM has: an instruction counts the bits of each byte. */
#if defined(__aarch64__)
#include <arm_neon.h>
#define TARGET
#define LANES 4
#define TILE_VECTORS 4
#define COUNTS_WORDS 0
#include "vectors.inc"

INLINE words carry(words t, words s, words z)
{
    return (words)vbslq_u32((uint32x4_t)t, (uint32x4_t)~s, (uint32x4_t)z);
}

INLINE words count_bits(words v) { return (words)vcntq_u8((uint8x16_t)v); }

INLINE uint32_t signs_of_4(const float *x, const float *t, const int step)
{
    const uint32x4_t bits = {1, 2, 4, 8};
    float32x4_t threshold = step ? vld1q_f32(t) : vdupq_n_f32(*t);
    return vaddvq_u32(vandq_u32(vcltq_f32(vld1q_f32(x), threshold), bits));
}

INLINE uint32_t signs_of_32(const float *x, const float *t, const int step)
{
    uint32_t signs = 0;
    UNROLL for (int i = 0; i < 8; i++) signs |= signs_of_4(x + 4 * i, t + 4 * i * step, step) << (4 * i);
    return signs;
}

INLINE floats multiply_add(floats a, floats b, floats c)
{
    return (floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}

#include "templates.inc"

static int available(void) { return 1; }

INSTRUCTION_SET(neon, "neon");
#endif
