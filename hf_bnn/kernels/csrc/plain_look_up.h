/* What attention.h needs, for instruction sets that look up number by number, unless they have said LOOK_UP. */

#ifndef LOOK_UP
#define LOOK_UP look_up
INLINE floats look_up(const float *table, words indices)
{
    float found[LANES];
    UNROLL for (int i = 0; i < LANES; i++) found[i] = table[indices[i]];
    return LOAD(floats, found);
}
#endif

INLINE floats add_exponentials(floats sums, const struct scores *s, words counts, const int masks, words shut,
                               uint32_t bit)
{
    floats terms = LOOK_UP(s->exponentials, counts);
    return masks ? sums + (floats)((words)terms & (words)((shut & bit) == 0)) : sums + terms;
}

INLINE words set_where(words bits, const uint32_t *counts, integers limits, uint32_t bit)
{
    return bits | ((words)(LOAD(integers, counts) >= limits) & bit);
}
