/* AVX-512 without VPOPCNTDQ: Skylake-X and its kin. Bits are counted by look-up of half bytes. */
#if defined(__x86_64__)
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define LANES 16
#define TILE_VECTORS 4
#define COUNTS_WORDS 0
#include "avx512_common.inc"

INLINE words count_bits(words v)
{
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    __m512i low = _mm512_shuffle_epi8(table, (__m512i)(v & 0x0f0f0f0f));
    __m512i high = _mm512_shuffle_epi8(table, (__m512i)(v >> 4 & 0x0f0f0f0f));
    return (words)_mm512_add_epi8(low, high);
}

#include "templates.inc"

static int available(void) { return has_avx512(); }

INSTRUCTION_SET(avx512bw, "avx512bw");
#endif
