// Root mean square normalisation of rows in training: input and output are of the type of the weight.
//
// One block of 256 threads a row; each thread has N neighbours at a time, which divides the columns. The order of
// each sum depends on nothing but the number of columns.
#include "element.cuh"

constexpr int NORM_THREADS = 256;

template <typename T, int N>
__device__ inline void rms_norm_forward(const T *x, const T *weight, T *out, word columns, float epsilon) {
  __shared__ float parts[NORM_THREADS / 32];
  const size_t row = (size_t)blockIdx.x * columns;
  float sum = 0.0f;
  for (word i = N * threadIdx.x; i < columns; i += N * NORM_THREADS) {
    const Pack<T, N> pack = load<T, N>(x + row + i);
#pragma unroll
    for (int j = 0; j < N; ++j) sum = fmaf(widen(pack.at[j]), widen(pack.at[j]), sum);
  }
  sum = block_sum<NORM_THREADS>(sum, parts);
  const float scale = 1.0f / sqrtf(sum / (float)columns + epsilon);
  for (word i = N * threadIdx.x; i < columns; i += N * NORM_THREADS) {
    const Pack<T, N> pack = load<T, N>(x + row + i), factors = load<T, N>(weight + i);
    Pack<T, N> result;
#pragma unroll
    for (int j = 0; j < N; ++j) result.at[j] = narrow<T>(widen(pack.at[j]) * scale * widen(factors.at[j]));
    store<T, N>(out + row + i, result);
  }
}

#define RMS_NORM_FORWARD(T, N)                                                                                         \
  extern "C" __global__ void __launch_bounds__(NORM_THREADS)                                                           \
      rms_norm_forward_##T##_##N(const T *x, const T *weight, T *out, word columns, float epsilon) {                   \
    rms_norm_forward<T, N>(x, weight, out, columns, epsilon);                                                          \
  }                                                                                                                    \
  EXPORT(rms_norm_forward_##T##_##N)

RMS_NORM_FORWARD(f32, 1)
RMS_NORM_FORWARD(f32, 4)
RMS_NORM_FORWARD(bf16, 1)
RMS_NORM_FORWARD(bf16, 4)
