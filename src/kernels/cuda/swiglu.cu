// The gated activation: silu(gate) * up. A row of the input is `columns` gates, then as many inputs.
//
// Blocks of threads: rows across, columns down, each thread four of them. The columns are a multiple of 4.
#include "element.cuh"

template <typename T> __device__ inline void swiglu(const T *gate_up, T *out, word columns) {
  const word column = 4 * (blockIdx.y * blockDim.x + threadIdx.x);
  if (column >= columns) return;
  const T *from = gate_up + (size_t)blockIdx.x * 2 * columns + column;
  const Pack<T, 4> gates = load<T, 4>(from), ups = load<T, 4>(from + columns);
  Pack<T, 4> result;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float gate = widen(gates.at[j]);
    result.at[j] = narrow<T>(gate / (1.0f + expf(-gate)) * widen(ups.at[j]));
  }
  store<T, 4>(out + (size_t)blockIdx.x * columns + column, result);
}

#define SWIGLU(T)                                                                                                      \
  extern "C" __global__ void swiglu_##T(const T *gate_up, T *out, word columns) { swiglu<T>(gate_up, out, columns); }  \
  EXPORT(swiglu_##T)

SWIGLU(f32)
SWIGLU(bf16)
SWIGLU(f16)
