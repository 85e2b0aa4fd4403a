// Root mean square normalisation of rows of the f32 stream, for a product in another type.
//
// One block of 256 threads a row; `rows` names the rows to take, or is null for all in order. The columns are
// a multiple of 4. The order of each sum depends on nothing but the number of columns.
#include "element.cuh"

constexpr int THREADS = 256;

template <typename T>
__device__ inline void rms_norm(const float *x, const word *rows, const T *weight, T *out, word columns,
                                float epsilon) {
  __shared__ float parts[THREADS / 32];
  const word row = rows ? rows[blockIdx.x] : blockIdx.x;
  const float *from = x + (size_t)row * columns;
  T *to = out + (size_t)blockIdx.x * columns;
  float sum = 0.0f;
  for (word i = 4 * threadIdx.x; i < columns; i += 4 * THREADS) {
    const Pack<float, 4> pack = load<float, 4>(from + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum = fmaf(pack.at[j], pack.at[j], sum);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; ++warp) sum = sum + parts[warp];
  const float scale = 1.0f / sqrtf(sum / (float)columns + epsilon);
  for (word i = 4 * threadIdx.x; i < columns; i += 4 * THREADS) {
    const Pack<float, 4> pack = load<float, 4>(from + i);
    const Pack<T, 4> factors = load<T, 4>(weight + i);
    Pack<T, 4> result;
#pragma unroll
    for (int j = 0; j < 4; ++j) result.at[j] = narrow<T>(pack.at[j] * scale * widen(factors.at[j]));
    store<T, 4>(to + i, result);
  }
}

#define RMS_NORM(T)                                                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      rms_norm_##T(const float *x, const word *rows, const T *weight, T *out, word columns, float epsilon) {           \
    rms_norm<T>(x, rows, weight, out, columns, epsilon);                                                               \
  }                                                                                                                    \
  EXPORT(rms_norm_##T)

RMS_NORM(f32)
RMS_NORM(bf16)
RMS_NORM(f16)
