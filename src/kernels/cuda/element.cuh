// What all kernels share: element types, vectors of them, sums over a block, and how kernels are exported.
//
// Everything is computed in f32. The sources are compiled with --fmad=false: a product and a sum are one
// operation only where fmaf says so, so that two kernels that spell out the same arithmetic get the same bits.
#pragma once

#ifdef HEADWATER_EMULATED
#include "emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
// Kernels are found by their names; only the emulation needs to be told about them.
#define EXPORT(name)
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

using f32 = float;
using bf16 = __nv_bfloat16;
using f16 = __half;
using word = unsigned int;

/// Positions of one block of the cache: `BLOCK` in src/kernels/cached.rs.
constexpr word BLOCK = 64;

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(bf16 x) { return __bfloat162float(x); }
__device__ inline float widen(f16 x) { return __half2float(x); }

template <typename T> __device__ inline T narrow(float x);
template <> __device__ inline float narrow<float>(float x) { return x; }
template <> __device__ inline bf16 narrow<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ inline f16 narrow<f16>(float x) { return __float2half_rn(x); }

/// `N` neighbours that are loaded and stored at once. Addresses are multiples of its size.
template <typename T, int N> struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

template <typename T, int N> __device__ inline Pack<T, N> load(const T *from) {
  return *reinterpret_cast<const Pack<T, N> *>(from);
}

template <typename T, int N> __device__ inline void store(T *to, const Pack<T, N> &pack) {
  *reinterpret_cast<Pack<T, N> *>(to) = pack;
}

/// The sum over the lanes of a warp; each lane gets the same bits.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = x + __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

/// The largest over the lanes of a warp.
__device__ inline float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

/// The sum over a block of `THREADS` threads; each thread gets the same bits. `parts` is shared memory that may
/// have been used by the sum before.
template <int THREADS> __device__ inline float block_sum(float x, float (&parts)[THREADS / 32]) {
  x = warp_sum(x);
  __syncthreads(); // the sum before has been read
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; ++warp) sum = sum + parts[warp];
  return sum;
}
