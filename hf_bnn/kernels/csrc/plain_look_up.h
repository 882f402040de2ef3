/* Look-up for instruction sets that have none: number by number. */

INLINE floats look_up(const struct scores *s, words counts)
{
    float found[LANES];
    UNROLL for (int i = 0; i < LANES; i++) found[i] = s->exponentials[counts[i]];
    return LOAD(floats, found);
}
