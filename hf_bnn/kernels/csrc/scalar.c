/* x86 with nothing but POPCNT: a vector's words are counted one by one. */
#if defined(__x86_64__)
#define TARGET __attribute__((target("popcnt")))
#define LANES 4
#define TILE_VECTORS 2
#define COUNTS_WORDS 1
#include "vectors.h"
#include "plain_bits.h"

INLINE words count_bits(words v)
{
    return (words){(uint32_t)__builtin_popcount(v[0]), (uint32_t)__builtin_popcount(v[1]),
                   (uint32_t)__builtin_popcount(v[2]), (uint32_t)__builtin_popcount(v[3])};
}

#include "packing.h"
#include "training.inc"
#include "epilogue.h"
#include "pooling.h"
#include "tile.h"
#include "weight_only.h"

#include "plain_look_up.h"
#include "attention.h"

#include "instruction_set.h"

static int available(void) { return __builtin_cpu_supports("popcnt"); }

INSTRUCTION_SET(scalar, "scalar");
#endif
