// The gated activation in training, silu(gate) * up, of two tensors of `count` elements.
//
// Each thread has N neighbours, which divides the count.
#include "element.cuh"

template <typename T, int N> __device__ inline void swiglu_forward(const T *gate, const T *up, T *out, word count) {
  const size_t at = N * ((size_t)blockIdx.x * blockDim.x + threadIdx.x);
  if (at >= count) return;
  const Pack<T, N> gates = load<T, N>(gate + at), ups = load<T, N>(up + at);
  Pack<T, N> result;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float x = widen(gates.at[j]);
    result.at[j] = narrow<T>(x / (1.0f + expf(-x)) * widen(ups.at[j]));
  }
  store<T, N>(out + at, result);
}

#define SWIGLU_FORWARD(T, N)                                                                                           \
  extern "C" __global__ void swiglu_forward_##T##_##N(const T *gate, const T *up, T *out, word count) {                \
    swiglu_forward<T, N>(gate, up, out, count);                                                                        \
  }                                                                                                                    \
  EXPORT(swiglu_forward_##T##_##N)

SWIGLU_FORWARD(f32, 1)
SWIGLU_FORWARD(f32, 4)
SWIGLU_FORWARD(bf16, 1)
SWIGLU_FORWARD(bf16, 4)
