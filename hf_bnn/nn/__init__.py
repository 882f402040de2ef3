"""Binary layers in two forms: latent for training (`layers`), packed for inference (`packed`).

**Why packed equals latent, bit for bit.** A packed model's outputs equal those of the latent model in evaluation, by
`torch.equal`, because both forms compute the same three steps with the same roundings:

1. *Signs.* Each input becomes -1 where `x < threshold`, else +1 (0, -0.0 and NaN count as +1). Each latent weight
   becomes -1 where `w < 0`, else +1. The bits of a packed weight are those signs (`functional.sign_int8`, `pack_bits`).
   No arithmetic happens in this step, so nothing rounds.
2. *Sums.* The product of signs is a sum of at most 2**24 terms of -1, 0 or +1. Float32 represents every such sum
   exactly. The order of summation therefore makes no difference: float products, int8 products and popcount kernels
   agree (`products`, `functional.integer_product`). Autocast is off here, because bfloat16 rounds sums above 256.
3. *Affine part.* Levels `a s + c` and a scale `m` per output channel turn a sum into
   `product * (m * a) + (sum(t) * (m * c) + bias)`, where `t` are the weight's signs. One function evaluates this
   expression for both forms, in float32 and in this order (`rescaling.rescale`); compiled kernels repeat its roundings.

The scale `m` is computed from the latent weight by one function (`functional.weight_scale`), at packing time and in
every latent forward. The packed layer stores the float32 result, and casts of the model leave it alone.

With float inputs (`binarize="weights"`) step 2 adds floats. There both forms call the same torch product on the same
operands in evaluation, so they still agree, but an optimized layer adds in another order and agrees only closely.

**Invariants** that layers, packing and kernels rely on:

- Dimension 0 of a weight is its outputs. Scales, biases and packed rows belong to it.
- A product sees signs only. Levels and scales are applied afterwards; zero padding of a convolution adds 0 to the sum,
  and `Conv2dProduct.weight_sum` counts only the taps inside the image.
- A layer knows no training method. Methods fill its slots with parts (`methods.base`), and packing empties them.
- Both forms keep the stock layer's names `weight` and `bias` in a state dict.
"""
