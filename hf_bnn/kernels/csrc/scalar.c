/* x86 with nothing but POPCNT: a vector's words are counted one by one. */
#if defined(__x86_64__)
#define TARGET __attribute__((target("popcnt")))
#define LANES 4
#define TILE_VECTORS 2
#define COUNTS_WORDS 1
#include "vectors.inc"
#include "plain_bits.inc"

INLINE words count_bits(words v)
{
    return (words){(uint32_t)__builtin_popcount(v[0]), (uint32_t)__builtin_popcount(v[1]),
                   (uint32_t)__builtin_popcount(v[2]), (uint32_t)__builtin_popcount(v[3])};
}

#include "templates.inc"

static int available(void) { return __builtin_cpu_supports("popcnt"); }

INSTRUCTION_SET(scalar, "scalar");
#endif
