/* The speed at which this processor counts differing bits in registers: a bound with which benchmarks compare. */
#include "hf_bnn.h"

#if defined(__x86_64__)
#include <immintrin.h>

__attribute__((target("avx512f,avx512vpopcntdq"))) static int64_t count_vectors(int64_t rounds)
{
    enum { SUMS = 12 };
    __m512i sums[SUMS], x = _mm512_set1_epi32((int)rounds);
    for (int i = 0; i < SUMS; i++) {
        sums[i] = _mm512_set1_epi32(i);
    }
    for (int64_t round = 0; round < rounds; round++) {
        _Pragma("GCC unroll 12") for (int i = 0; i < SUMS; i++) {
            /* The sums are what is counted: an operand that does not change would let the compiler drop the xor. */
            sums[i] = _mm512_add_epi64(sums[i], _mm512_popcnt_epi64(_mm512_xor_si512(sums[i], x)));
        }
    }
    for (int i = 1; i < SUMS; i++) {
        sums[0] = _mm512_add_epi64(sums[0], sums[i]);
    }
    return _mm512_reduce_add_epi64(sums[0]) == 1 ? 0 : rounds * SUMS * 512;
}

int64_t hf_bnn_count_bits(int64_t rounds)
{
    return __builtin_cpu_supports("avx512vpopcntdq") ? count_vectors(rounds) : 0;
}
#else
int64_t hf_bnn_count_bits(int64_t rounds) { return 0 * rounds; }
#endif
