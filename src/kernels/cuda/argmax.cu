// The index of the largest logit of each row, the first of several. One block of 1024 threads a row.
//
// What is no number is never the largest; a row of nothing else gives 0.
#include "element.cuh"

constexpr int ARGMAX_THREADS = 1024;
constexpr word NOBODY = 0xffffffffu;

struct Best {
  float value;
  word index;
};

__device__ inline Best better(Best a, Best b) {
  const bool second = b.value > a.value || (b.value == a.value && b.index < a.index);
  return second ? b : a;
}

__device__ inline Best warp_best(Best best) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const Best other = {__shfl_xor_sync(0xffffffffu, best.value, step),
                        __shfl_xor_sync(0xffffffffu, best.index, step)};
    best = better(best, other);
  }
  return best;
}

extern "C" __global__ void __launch_bounds__(ARGMAX_THREADS) argmax(const float *logits, word *out, word columns) {
  __shared__ Best parts[ARGMAX_THREADS / 32];
  const float *row = logits + (size_t)blockIdx.x * columns;
  Best best = {-INFINITY, NOBODY};
  for (word i = threadIdx.x; i < columns; i += ARGMAX_THREADS) {
    const float value = row[i];
    if (value > best.value || (value == best.value && best.index == NOBODY)) best = {value, i};
  }
  best = warp_best(best);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x < 32) {
    best = warp_best(parts[threadIdx.x]);
    if (threadIdx.x == 0) out[blockIdx.x] = best.index == NOBODY ? 0 : best.index;
  }
}
EXPORT(argmax)
