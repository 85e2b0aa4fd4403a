// Sums rows of a gradient by token id into the gradient of the table, in f32 and in the order of the rows.
//
// `order` names the rows, those of one id together and in their order; group g, whose id is `ids[g]`, has those from
// `starts[g]` to `starts[g + 1]`. Blocks of threads: groups across, columns down; each thread has N neighbours, which
// divides the columns. No two blocks write to one place.
#include "element.cuh"

template <typename T, int N>
__device__ inline void embedding_gradient(const T *gradient, const word *order, const word *ids, const word *starts,
                                          float *out, word columns) {
  const word column = N * (blockIdx.y * blockDim.x + threadIdx.x);
  if (column >= columns) return;
  Pack<float, N> sums;
#pragma unroll
  for (int j = 0; j < N; ++j) sums.at[j] = 0.0f;
  const word end = starts[blockIdx.x + 1];
  for (word i = starts[blockIdx.x]; i < end; ++i) {
    const Pack<T, N> pack = load<T, N>(gradient + (size_t)order[i] * columns + column);
#pragma unroll
    for (int j = 0; j < N; ++j) sums.at[j] = sums.at[j] + widen(pack.at[j]);
  }
  store<float, N>(out + (size_t)ids[blockIdx.x] * columns + column, sums);
}

#define EMBEDDING_GRADIENT(T, N)                                                                                       \
  extern "C" __global__ void embedding_gradient_##T##_##N(const T *gradient, const word *order, const word *ids,       \
                                                          const word *starts, float *out, word columns) {              \
    embedding_gradient<T, N>(gradient, order, ids, starts, out, columns);                                              \
  }                                                                                                                    \
  EXPORT(embedding_gradient_##T##_##N)

EMBEDDING_GRADIENT(f32, 1)
EMBEDDING_GRADIENT(f32, 4)
EMBEDDING_GRADIENT(bf16, 1)
EMBEDDING_GRADIENT(bf16, 4)
