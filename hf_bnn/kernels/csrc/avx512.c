/* AVX-512 with VPOPCNTDQ: Intel from Ice Lake, AMD from Zen 4. 16 words are counted by one instruction. */
#if defined(__x86_64__)
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq")))
#define LANES 16
#define TILE_VECTORS 4
#define COUNTS_WORDS 1
#include "avx512_common.inc"

INLINE words count_bits(words v) { return (words)_mm512_popcnt_epi32((__m512i)v); }

#include "templates.inc"

static int available(void)
{
    return has_avx512() && __builtin_cpu_supports("avx512vpopcntdq");
}

INSTRUCTION_SET(avx512, "avx512");
#endif
