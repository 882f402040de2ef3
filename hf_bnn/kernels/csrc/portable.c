/* Any processor: C only. The compiler makes vectors of it where the processor has some. */
#define TARGET
#define LANES 4
#define TILE_VECTORS 2
#define COUNTS_WORDS 0
#include "vectors.inc"
#include "plain_bits.inc"

/* Sums of neighbouring bits, then of pairs, then of half bytes. */
INLINE words count_bits(words v)
{
    v = v - (v >> 1 & 0x55555555);
    v = (v & 0x33333333) + (v >> 2 & 0x33333333);
    return (v + (v >> 4)) & 0x0f0f0f0f;
}

#include "templates.inc"

static int available(void) { return 1; }

INSTRUCTION_SET(portable, "portable");
