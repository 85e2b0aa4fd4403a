// One update of Adam with decoupled weight decay, in place: the operations of src/kernels/adamw.rs, in their order.
//
// `state` is `count` values, as many means, then mean squares; `copy`, where there is one, gets the new values in bf16. Each
// thread has N neighbours, which divides the count.
#include "element.cuh"

struct AdamW {
  float beta1, beta2, new1, new2, correct1, correct2, keep, rate, epsilon, scale;
};

/// The first element of this thread.
template <int N> __device__ inline size_t first() { return N * ((size_t)blockIdx.x * blockDim.x + threadIdx.x); }

/// Updates N neighbours of the state; returns the new values.
template <int N>
__device__ inline Pack<float, N> adamw(float *state, const float *gradient, word count, const AdamW &update) {
  const size_t at = first<N>();
  float *places[3] = {state + at, state + count + at, state + 2 * (size_t)count + at};
  Pack<float, N> values = load<float, N>(places[0]), means = load<float, N>(places[1]);
  Pack<float, N> squares = load<float, N>(places[2]);
  const Pack<float, N> slopes = load<float, N>(gradient + at);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float slope = slopes.at[j] * update.scale;
    means.at[j] = means.at[j] * update.beta1 + slope * update.new1;
    squares.at[j] = squares.at[j] * update.beta2 + slope * slope * update.new2;
    const float change = means.at[j] * update.correct1 / (sqrtf(squares.at[j] * update.correct2) + update.epsilon);
    values.at[j] = values.at[j] * update.keep - change * update.rate;
  }
  store<float, N>(places[0], values);
  store<float, N>(places[1], means);
  store<float, N>(places[2], squares);
  return values;
}

template <int N> __device__ inline void set(bf16 *copy, const Pack<float, N> &values) {
  Pack<bf16, N> narrowed;
#pragma unroll
  for (int j = 0; j < N; ++j) narrowed.at[j] = narrow<bf16>(values.at[j]);
  store<bf16, N>(copy + first<N>(), narrowed);
}

#define RATES                                                                                                          \
  word count, float beta1, float beta2, float new1, float new2, float correct1, float correct2, float keep,            \
      float rate, float epsilon, float scale
#define UPDATE                                                                                                         \
  { beta1, beta2, new1, new2, correct1, correct2, keep, rate, epsilon, scale }

#define ADAMW(N)                                                                                                       \
  extern "C" __global__ void adamw_##N(float *state, const float *gradient, RATES) {                                   \
    if (first<N>() < count) adamw<N>(state, gradient, count, UPDATE);                                                  \
  }                                                                                                                    \
  EXPORT(adamw_##N)

#define ADAMW_TO_BF16(N)                                                                                               \
  extern "C" __global__ void adamw_to_bf16_##N(float *state, const float *gradient, bf16 *copy, RATES) {               \
    if (first<N>() < count) set<N>(copy, adamw<N>(state, gradient, count, UPDATE));                              \
  }                                                                                                                    \
  EXPORT(adamw_to_bf16_##N)

ADAMW(1)
ADAMW(4)
ADAMW_TO_BF16(1)
ADAMW_TO_BF16(4)
