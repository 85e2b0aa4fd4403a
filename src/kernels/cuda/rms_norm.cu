// Root mean square normalisation of rows.
//
//   rms_norm_T             of the f32 stream, for a product in another type: columns are a multiple of 4; `rows` names
//                          the rows to take, or is null for all in order
//   rms_norm_forward_T_N   in training, of rows of the type of the weight; N divides the columns
//
// One block of 256 threads a row; each thread has N neighbours at a time. The order of each sum depends on nothing but
// the number of columns.
#include "element.cuh"

constexpr int THREADS = 256;

template <typename X, typename T, int N>
__device__ inline void rms_norm(const X *x, const word *rows, const T *weight, T *out, word columns, float epsilon) {
  __shared__ float parts[THREADS / 32];
  const word row = rows ? rows[blockIdx.x] : blockIdx.x;
  const X *from = x + (size_t)row * columns;
  T *to = out + (size_t)blockIdx.x * columns;
  float sum = 0.0f;
  for (word i = N * threadIdx.x; i < columns; i += N * THREADS) {
    const Pack<X, N> pack = load<X, N>(from + i);
#pragma unroll
    for (int j = 0; j < N; ++j) sum = fmaf(widen(pack.at[j]), widen(pack.at[j]), sum);
  }
  sum = block_sum<THREADS>(sum, parts);
  const float scale = 1.0f / sqrtf(sum / (float)columns + epsilon);
  for (word i = N * threadIdx.x; i < columns; i += N * THREADS) {
    const Pack<X, N> pack = load<X, N>(from + i);
    const Pack<T, N> factors = load<T, N>(weight + i);
    Pack<T, N> result;
#pragma unroll
    for (int j = 0; j < N; ++j) result.at[j] = narrow<T>(widen(pack.at[j]) * scale * widen(factors.at[j]));
    store<T, N>(to + i, result);
  }
}

#define RMS_NORM(T)                                                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      rms_norm_##T(const float *x, const word *rows, const T *weight, T *out, word columns, float epsilon) {           \
    rms_norm<float, T, 4>(x, rows, weight, out, columns, epsilon);                                                     \
  }                                                                                                                    \
  EXPORT(rms_norm_##T)

RMS_NORM(f32)
RMS_NORM(bf16)
RMS_NORM(f16)

#define RMS_NORM_FORWARD(T, N)                                                                                         \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      rms_norm_forward_##T##_##N(const T *x, const T *weight, T *out, word columns, float epsilon) {                   \
    rms_norm<T, T, N>(x, nullptr, weight, out, columns, epsilon);                                                      \
  }                                                                                                                    \
  EXPORT(rms_norm_forward_##T##_##N)

RMS_NORM_FORWARD(f32, 1)
RMS_NORM_FORWARD(f32, 4)
RMS_NORM_FORWARD(bf16, 1)
RMS_NORM_FORWARD(bf16, 4)
