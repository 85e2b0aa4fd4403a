// One update of Adam with decoupled weight decay, in place: the operations of src/kernels/adamw.rs, in their order.
//
// `state` is `count` values, as many means, then mean squares. Each thread has N neighbours, which divides the count.
#include "element.cuh"

struct AdamW {
  float beta1, beta2, new1, new2, correct1, correct2, keep, rate, epsilon, scale;
};

template <int N>
__device__ inline void adamw(float *state, const float *gradient, word count, const AdamW &update) {
  const size_t at = N * ((size_t)blockIdx.x * blockDim.x + threadIdx.x);
  if (at >= count) return;
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
}

#define ADAMW(N)                                                                                                       \
  extern "C" __global__ void adamw_##N(float *state, const float *gradient, word count, float beta1, float beta2,      \
                                       float new1, float new2, float correct1, float correct2, float keep, float rate, \
                                       float epsilon, float scale) {                                                   \
    adamw<N>(state, gradient, count, {beta1, beta2, new1, new2, correct1, correct2, keep, rate, epsilon, scale});      \
  }                                                                                                                    \
  EXPORT(adamw_##N)

ADAMW(1)
ADAMW(4)
