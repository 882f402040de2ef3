/* What the borders of a convolution (conv2d_border.c) and its product (conv2d.c) share. */
#ifndef HF_BNN_CONV2D_H
#define HF_BNN_CONV2D_H

#include "kernels.h"

/* The range [first, last) of a kernel's rows (or columns) that hit the image, and which outputs share it. */
struct range {
    int64_t first, last;
};

struct conv2d {
    const struct instruction_set *set;
    const struct conv2d_shape *shape;
    const struct conv2d_layer *layer; /* with its epilogue, or NULL */
    int finishes;                     /* whether the epilogue does anything, or bits are wanted */
    const float *x;
    const uint32_t *in_bits; /* of the input if `x` is NULL: [pixel][word] */
    const float *shortcut;
    struct threshold threshold;
    struct product product; /* of the first group */
    const float *offsets;   /* [row class][column class][outputs] */
    const int32_t *missing; /* the same */
    int64_t *row_class, *column_class;
    struct range *rows, *columns;
    int64_t row_classes, column_classes;
    float *out;
    uint32_t *out_bits; /* [pixel][word], of signs against `next_threshold` */
    struct threshold next_threshold;
    uint32_t *bits; /* [batch][padded height][padded width][groups][words] */
    int64_t group_words, pixel_words, padded_height, padded_width;
    int64_t rows_per_part, parts_per_image, pixels_per_block;
    int failed;
};

/* Sorts the outputs along one axis into classes that see the same range of the kernel; returns their number. */
int64_t classify(const struct conv2d_shape *s, int axis, int64_t *class_of, struct range *ranges);

/* Fills both tables for each class of pixels. `corners`: [kh + 1][kw + 1][outputs], the sums of the weights above and
 * left of a corner. */
void fill_border_tables(const struct conv2d *c, const int32_t *corners, const float *shift, const float *bias,
                        float *offsets, int32_t *missing);

#endif
