/* What the packing of attention's operands (attention_pack.c) and its products (attention.c) share. */
#ifndef HF_BNN_ATTENTION_H
#define HF_BNN_ATTENTION_H

#include "kernels.h"

/* Of a row of a mask: the number of tokens up to the last one that is not masked, and whether none of them is. */
struct span {
    int32_t end, whole;
};

struct attention {
    const struct instruction_set *set;
    const struct attention_shape *shape;
    const float *query, *key, *value, *mask;
    const float *levels;
    struct scores scores; /* without keys */
    int64_t token_words;
    int64_t mask_steps[3]; /* of `masked`, in rows; 0 where rows are the same */
    uint32_t *keys;        /* [head][token][word] */
    uint32_t *values;      /* [head] panels */
    uint32_t *masked;      /* [mask row][word] or NULL */
    struct span *spans;    /* [mask row] */
    float *scale, *shift;  /* [size], [head][size] */
    float *out;
    uint8_t *unsure;
    int failed, other_mask;
};

/* Words in the panels of the values of a head. */
static inline int64_t value_words(const struct attention *a)
{
    return divide_up(a->shape->size, PANEL) * PANEL * a->token_words;
}

/* Words in the bits of a query or key. */
static inline int64_t head_words(int64_t size) { return words_of(size) <= 4 ? words_of(size) : MOST_HEAD_WORDS; }

/* Memory that pack_values needs, in words. */
static inline int64_t spare_words(const struct attention *a)
{
    return (a->shape->size + 1) * a->token_words + 2 * a->shape->size;
}

/* Packs rows of a head into rows of scores.words words, not in pairs. */
void pack_head(const struct attention *a, const float *x, int64_t step, int64_t rows, const float *threshold,
               uint32_t *out);

/* Multiplies a block of rows of token bits by the values of a head. */
void sum_values(const struct attention *a, const uint32_t *panels, const struct block *block, const float *scale,
                int64_t out_step, float *out);

/* Packs the values of a head into panels. `shift`: their sums times a scale, the result for a query without a low
 * probability. `spare`: spare_words() words of memory. */
void pack_values(const struct attention *a, int64_t head, uint32_t *spare, uint32_t *panels, float *shift);

void pack_keys(const struct attention *a, int64_t head, uint32_t *keys);

/* For for_range: all heads of [begin, end). Sets `failed` if memory is short. */
void pack_keys_and_values(int64_t begin, int64_t end, void *context);

/* For for_range: rows of the mask, with their spans. Sets `other_mask` if a row holds numbers other than 0 and those
 * that exclude a token. */
void pack_mask(int64_t begin, int64_t end, void *context);

#endif
