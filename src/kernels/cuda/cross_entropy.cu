// Losses of rows of logits, and, in `learn`, their gradient in their place.
//
//   loss = ln(sum(exp(logits))) - logits[target]
//
// One block of 1024 threads a row; each thread has N neighbours at a time, which divides the columns. Maximum and sum
// are taken in one pass: what a thread has summed is scaled down when it meets a larger logit. Gradients are those of
// scale * (loss + z_loss * ln(sum(exp(logits)))^2).
#include "element.cuh"

constexpr int LOSS_THREADS = 1024;

template <typename T, int N, bool LEARN>
__device__ inline void cross_entropy(T *logits, const word *targets, float *losses, word columns, float scale,
                                     float z_loss) {
  __shared__ float parts[LOSS_THREADS / 32];
  T *row = logits + (size_t)blockIdx.x * columns;
  const word target = targets[blockIdx.x];
  const float wanted = widen(row[target]);
  float own_top = -INFINITY, own_total = 0.0f;
  for (word i = N * threadIdx.x; i < columns; i += N * LOSS_THREADS) {
    const Pack<T, N> pack = load<T, N>(row + i);
    float top = own_top;
#pragma unroll
    for (int j = 0; j < N; ++j) top = fmaxf(top, widen(pack.at[j]));
    const float reference = top == -INFINITY ? 0.0f : top; // all are 0 so far
    own_total = own_total * expf(own_top - reference);
#pragma unroll
    for (int j = 0; j < N; ++j) own_total = own_total + expf(widen(pack.at[j]) - reference);
    own_top = top;
  }
  float top = warp_max(own_top);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = top;
  __syncthreads();
  top = warp_max(parts[threadIdx.x % 32]);
  const float total = block_sum<LOSS_THREADS>(own_total * expf(own_top - top), parts);
  const float log_total = logf(total);
  if (threadIdx.x == 0) losses[blockIdx.x] = log_total + (top - wanted);
  if (!LEARN) return;
  const float factor = scale * (1.0f + 2.0f * z_loss * (log_total + top)) / total;
  for (word i = N * threadIdx.x; i < columns; i += N * LOSS_THREADS) {
    Pack<T, N> pack = load<T, N>(row + i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float share = expf(widen(pack.at[j]) - top) * factor;
      pack.at[j] = narrow<T>(i + j == target ? share - scale : share);
    }
    store<T, N>(row + i, pack);
  }
}

#define CROSS_ENTROPY(T, N)                                                                                            \
  extern "C" __global__ void __launch_bounds__(LOSS_THREADS)                                                           \
      cross_entropy_losses_##T##_##N(T *logits, const word *targets, float *losses, word columns, float scale,         \
                                     float z_loss) {                                                                   \
    cross_entropy<T, N, false>(logits, targets, losses, columns, scale, z_loss);                                       \
  }                                                                                                                    \
  EXPORT(cross_entropy_losses_##T##_##N)                                                                               \
  extern "C" __global__ void __launch_bounds__(LOSS_THREADS)                                                           \
      cross_entropy_learn_##T##_##N(T *logits, const word *targets, float *losses, word columns, float scale,          \
                                    float z_loss) {                                                                    \
    cross_entropy<T, N, true>(logits, targets, losses, columns, scale, z_loss);                                        \
  }                                                                                                                    \
  EXPORT(cross_entropy_learn_##T##_##N)

CROSS_ENTROPY(f32, 1)
CROSS_ENTROPY(f32, 4)
CROSS_ENTROPY(bf16, 1)
CROSS_ENTROPY(bf16, 4)
