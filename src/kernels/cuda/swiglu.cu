// The gated activation: silu(gate) * up.
//
//   swiglu_T             a row of the input is `columns` gates, then as many inputs; columns are a multiple of 4. Blocks of
//                        threads: rows across, columns down, each thread four of them
//   swiglu_forward_T_N   in training, of two tensors of `count` elements; each thread has N neighbours, which divides
//                        the count
#include "element.cuh"

template <typename T, int N> __device__ inline void gated(const T *gate, const T *up, T *out) {
  const Pack<T, N> gates = load<T, N>(gate), ups = load<T, N>(up);
  Pack<T, N> result;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float x = widen(gates.at[j]);
    result.at[j] = narrow<T>(x / (1.0f + expf(-x)) * widen(ups.at[j]));
  }
  store<T, N>(out, result);
}

template <typename T> __device__ inline void swiglu(const T *gate_up, T *out, word columns) {
  const word column = 4 * (blockIdx.y * blockDim.x + threadIdx.x);
  if (column >= columns) return;
  const T *from = gate_up + (size_t)blockIdx.x * 2 * columns + column;
  gated<T, 4>(from, from + columns, out + (size_t)blockIdx.x * columns + column);
}

template <typename T, int N> __device__ inline void swiglu_forward(const T *gate, const T *up, T *out, word count) {
  const size_t at = N * ((size_t)blockIdx.x * blockDim.x + threadIdx.x);
  if (at < count) gated<T, N>(gate + at, up + at, out + at);
}

#define SWIGLU(T)                                                                                                      \
  extern "C" __global__ void swiglu_##T(const T *gate_up, T *out, word columns) { swiglu<T>(gate_up, out, columns); }  \
  EXPORT(swiglu_##T)

SWIGLU(f32)
SWIGLU(bf16)
SWIGLU(f16)

#define SWIGLU_FORWARD(T, N)                                                                                           \
  extern "C" __global__ void swiglu_forward_##T##_##N(const T *gate, const T *up, T *out, word count) {                \
    swiglu_forward<T, N>(gate, up, out, count);                                                                        \
  }                                                                                                                    \
  EXPORT(swiglu_forward_##T##_##N)

SWIGLU_FORWARD(f32, 1)
SWIGLU_FORWARD(f32, 4)
SWIGLU_FORWARD(bf16, 1)
SWIGLU_FORWARD(bf16, 4)
