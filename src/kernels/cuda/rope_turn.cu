// Turns the heads of rows by the angles of their positions, or, with sign -1, back.
//
// One block of threads a row; each thread has N neighbours of either half of a head at a time, which divides `half`.
#include "element.cuh"

template <typename T, int N>
__device__ inline void rope_turn(const T *x, const T *cosines, const T *sines, const word *positions, T *out,
                                 word columns, word half, float sign) {
  const size_t row = (size_t)blockIdx.x * columns, angle = (size_t)positions[blockIdx.x] * half;
  const word pieces = half / N; // of half a head
  for (word i = threadIdx.x; i < columns / 2 / N; i += blockDim.x) {
    const word column = N * (i % pieces);
    const size_t at = row + (size_t)(i / pieces) * 2 * half + column;
    const Pack<T, N> left = load<T, N>(x + at), right = load<T, N>(x + at + half);
    const Pack<T, N> cosine = load<T, N>(cosines + angle + column), sine = load<T, N>(sines + angle + column);
    Pack<T, N> turned_left, turned_right;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float a = widen(left.at[j]), b = widen(right.at[j]);
      const float along = widen(cosine.at[j]), across = widen(sine.at[j]) * sign;
      turned_left.at[j] = narrow<T>(a * along - b * across);
      turned_right.at[j] = narrow<T>(b * along + a * across);
    }
    store<T, N>(out + at, turned_left);
    store<T, N>(out + at + half, turned_right);
  }
}

#define ROPE_TURN(T, N)                                                                                                \
  extern "C" __global__ void rope_turn_##T##_##N(const T *x, const T *cosines, const T *sines, const word *positions,  \
                                                 T *out, word columns, word half, float sign) {                        \
    rope_turn<T, N>(x, cosines, sines, positions, out, columns, half, sign);                                           \
  }                                                                                                                    \
  EXPORT(rope_turn_##T##_##N)

ROPE_TURN(f32, 1)
ROPE_TURN(f32, 4)
ROPE_TURN(bf16, 1)
ROPE_TURN(bf16, 4)
