// For each row and query head, the gradient of the output times the output: what gradients of weights are taken
// relative to. One warp a row and head.
#include "packed.cuh"

template <typename T>
__device__ inline void packed_along(const T *out, const T *gradient, float *along, word items, word width) {
  const word lane = threadIdx.x % 32, item = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (item >= items) return; // with its whole warp
  float sum = 0.0f;
  for (word i = lane; i < width; i += 32) {
    const size_t at = (size_t)item * width + i;
    sum = fmaf(widen(out[at]), widen(gradient[at]), sum);
  }
  sum = warp_sum(sum);
  if (lane == 0) along[item] = sum;
}

#define PACKED_ALONG(T)                                                                                                \
  extern "C" __global__ void packed_along_##T(const T *out, const T *gradient, float *along, word items, word width) { \
    packed_along<T>(out, gradient, along, items, width);                                                               \
  }                                                                                                                    \
  EXPORT(packed_along_##T)

PACKED_ALONG(f32)
PACKED_ALONG(bf16)
