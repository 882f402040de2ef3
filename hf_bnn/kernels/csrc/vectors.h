/* Vectors of LANES words for functions with the attribute TARGET; both are defined by the file that includes this. */
#include "kernels.h"

#define INLINE TARGET static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(4 * LANES)));
typedef float floats __attribute__((vector_size(4 * LANES)));

/* memcpy: no alignment is asked of any tensor. It compiles to one load or store. */
#define LOAD(type, address) __extension__({ type loaded_; memcpy(&loaded_, (address), sizeof loaded_); loaded_; })
#define STORE(address, vector)                           \
    __extension__({                                      \
        __typeof__(vector) stored_ = (vector);           \
        memcpy((address), &stored_, sizeof stored_);     \
    })

INLINE words all_words(uint32_t value) { return value - (words){0}; }

INLINE floats all_floats(float value) { return value - (floats){0}; } /* value - 0, not + 0, keeps a value of -0.0 */
