// The gradients of both inputs of the gated activation.
//
// Each thread has N neighbours, which divides the count.
#include "element.cuh"

template <typename T, int N>
__device__ inline void swiglu_backward(const T *gate, const T *up, const T *gradient, T *of_gate, T *of_up,
                                       word count) {
  const size_t at = N * ((size_t)blockIdx.x * blockDim.x + threadIdx.x);
  if (at >= count) return;
  const Pack<T, N> gates = load<T, N>(gate + at), ups = load<T, N>(up + at), slopes = load<T, N>(gradient + at);
  Pack<T, N> left, right;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float x = widen(gates.at[j]), slope = widen(slopes.at[j]);
    const float open = 1.0f / (1.0f + expf(-x)), silu = x * open;
    left.at[j] = narrow<T>(slope * widen(ups.at[j]) * (open + silu * (1.0f - open)));
    right.at[j] = narrow<T>(slope * silu);
  }
  store<T, N>(of_gate + at, left);
  store<T, N>(of_up + at, right);
}

#define SWIGLU_BACKWARD(T, N)                                                                                          \
  extern "C" __global__ void swiglu_backward_##T##_##N(const T *gate, const T *up, const T *gradient, T *of_gate,      \
                                                       T *of_up, word count) {                                         \
    swiglu_backward<T, N>(gate, up, gradient, of_gate, of_up, count);                                                  \
  }                                                                                                                    \
  EXPORT(swiglu_backward_##T##_##N)

SWIGLU_BACKWARD(f32, 1)
SWIGLU_BACKWARD(f32, 4)
SWIGLU_BACKWARD(bf16, 1)
SWIGLU_BACKWARD(bf16, 4)
