// Rows of the embedding table, as the f32 stream that all blocks add to.
//
// One block of threads a row. The columns are a multiple of 4.
#include "element.cuh"

template <typename T>
__device__ inline void embed(const T *table, const word *ids, float *out, word columns) {
  const T *from = table + (size_t)ids[blockIdx.x] * columns;
  float *to = out + (size_t)blockIdx.x * columns;
  for (word i = 4 * threadIdx.x; i < columns; i += 4 * blockDim.x) {
    const Pack<T, 4> pack = load<T, 4>(from + i);
    store<float, 4>(to + i, {widen(pack.at[0]), widen(pack.at[1]), widen(pack.at[2]), widen(pack.at[3])});
  }
}

#define EMBED(T)                                                                                                       \
  extern "C" __global__ void embed_##T(const T *table, const word *ids, float *out, word columns) {                    \
    embed<T>(table, ids, out, columns);                                                                                \
  }                                                                                                                    \
  EXPORT(embed_##T)

EMBED(f32)
EMBED(bf16)
EMBED(f16)
