// The gradients of root mean square normalisation.
//
//   rms_norm_backward   of the rows, one block of 256 threads a row; notes what the row was scaled with
//   rms_norm_parts      of the weight over 64 rows: blocks of threads across columns, then down such parts
//   rms_norm_weight     of the weight: all parts in their order, a thread a column
//
// Which rows are added in which order depends on nothing but their number.
#include "element.cuh"

constexpr int NORM_BACK_THREADS = 256;

/// Rows of a part: `ROWS_PER_PART` in src/kernels/cuda/training/rms_norm.rs.
constexpr word ROWS_PER_PART = 64;

template <typename T, int N>
__device__ inline void rms_norm_backward(const T *x, const T *weight, const T *gradient, T *of_x, float *scales,
                                         word columns, float epsilon) {
  __shared__ float parts[NORM_BACK_THREADS / 32];
  const size_t row = (size_t)blockIdx.x * columns;
  float squares = 0.0f, along = 0.0f;
  for (word i = N * threadIdx.x; i < columns; i += N * NORM_BACK_THREADS) {
    const Pack<T, N> pack = load<T, N>(x + row + i), factors = load<T, N>(weight + i);
    const Pack<T, N> slopes = load<T, N>(gradient + row + i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float value = widen(pack.at[j]);
      squares = fmaf(value, value, squares);
      along = fmaf(widen(slopes.at[j]) * widen(factors.at[j]), value, along);
    }
  }
  squares = block_sum<NORM_BACK_THREADS>(squares, parts);
  along = block_sum<NORM_BACK_THREADS>(along, parts);
  const float scale = 1.0f / sqrtf(squares / (float)columns + epsilon);
  along = along * scale * scale * scale / (float)columns;
  if (threadIdx.x == 0) scales[blockIdx.x] = scale;
  for (word i = N * threadIdx.x; i < columns; i += N * NORM_BACK_THREADS) {
    const Pack<T, N> pack = load<T, N>(x + row + i), factors = load<T, N>(weight + i);
    const Pack<T, N> slopes = load<T, N>(gradient + row + i);
    Pack<T, N> result;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float scaled = widen(slopes.at[j]) * widen(factors.at[j]) * scale;
      result.at[j] = narrow<T>(scaled - widen(pack.at[j]) * along);
    }
    store<T, N>(of_x + row + i, result);
  }
}

template <typename T>
__device__ inline void rms_norm_parts(const T *x, const T *gradient, const float *scales, float *parts, word rows,
                                      word columns) {
  const word column = blockIdx.x * NORM_BACK_THREADS + threadIdx.x;
  if (column >= columns) return;
  const word first = blockIdx.y * ROWS_PER_PART, end = min(first + ROWS_PER_PART, rows);
  float sum = 0.0f;
  for (word row = first; row < end; ++row) {
    const size_t at = (size_t)row * columns + column;
    sum = fmaf(widen(gradient[at]), widen(x[at]) * scales[row], sum);
  }
  parts[(size_t)blockIdx.y * columns + column] = sum;
}

extern "C" __global__ void __launch_bounds__(NORM_BACK_THREADS)
    rms_norm_weight(const float *parts, float *of_weight, word count, word columns) {
  const word column = blockIdx.x * NORM_BACK_THREADS + threadIdx.x;
  if (column >= columns) return;
  float sum = 0.0f;
  for (word part = 0; part < count; ++part) sum = sum + parts[(size_t)part * columns + column];
  of_weight[column] = sum;
}
EXPORT(rms_norm_weight)

#define RMS_NORM_BACKWARD(T, N)                                                                                        \
  extern "C" __global__ void __launch_bounds__(NORM_BACK_THREADS)                                                      \
      rms_norm_backward_##T##_##N(const T *x, const T *weight, const T *gradient, T *of_x, float *scales,              \
                                  word columns, float epsilon) {                                                       \
    rms_norm_backward<T, N>(x, weight, gradient, of_x, scales, columns, epsilon);                                      \
  }                                                                                                                    \
  EXPORT(rms_norm_backward_##T##_##N)

#define RMS_NORM_PARTS(T)                                                                                              \
  extern "C" __global__ void __launch_bounds__(NORM_BACK_THREADS)                                                      \
      rms_norm_parts_##T(const T *x, const T *gradient, const float *scales, float *parts, word rows, word columns) {  \
    rms_norm_parts<T>(x, gradient, scales, parts, rows, columns);                                                      \
  }                                                                                                                    \
  EXPORT(rms_norm_parts_##T)

RMS_NORM_BACKWARD(f32, 1)
RMS_NORM_BACKWARD(f32, 4)
RMS_NORM_BACKWARD(bf16, 1)
RMS_NORM_BACKWARD(bf16, 4)
RMS_NORM_PARTS(f32)
RMS_NORM_PARTS(bf16)
