/* Which instruction sets this library has, and which of them the processor has. */
#include "kernels.h"

extern const struct instruction_set portable;
#if defined(__x86_64__)
extern const struct instruction_set avx512, avx512bw, avx2, scalar;
static const struct instruction_set *const BUILT[] = {&avx512, &avx512bw, &avx2, &scalar, &portable, NULL};
#elif defined(__aarch64__)
extern const struct instruction_set neon;
static const struct instruction_set *const BUILT[] = {&neon, &portable, NULL};
#else
static const struct instruction_set *const BUILT[] = {&portable, NULL};
#endif

const struct instruction_set *instruction_set(int64_t i) { return BUILT[i]; }

int64_t hf_bnn_interface(void) { return 7; }

/* The name of the i-th instruction set, best first; NULL after the last one. */
const char *hf_bnn_name(int64_t i) { return BUILT[i] ? BUILT[i]->name : NULL; }

int hf_bnn_available(int64_t i) { return BUILT[i]->available(); }
