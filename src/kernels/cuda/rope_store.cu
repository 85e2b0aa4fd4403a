// Turns queries in place, and puts turned keys and values into the cache: one launch a block of the model.
//
// A row of `qkv` is query heads, key heads, value heads, each `width` columns. The cache holds, for each of its
// blocks and each key-value head, 64 positions of `width` columns; `slots[row]` is block * 64 + position within
// it. One block of threads a row. `width` is a multiple of 4: two columns of either half are turned at a time.
#include "element.cuh"

template <typename T>
__device__ inline void rope_store(T *qkv, const float *cosines, const float *sines, const word *positions,
                                  const word *slots, T *keys, T *values, word query, word key_value, word width) {
  const word half = width / 2, quarter = width / 4;
  T *row = qkv + (size_t)blockIdx.x * (query + 2 * key_value) * width;
  const size_t angle = (size_t)positions[blockIdx.x] * half;
  const word slot = slots[blockIdx.x];
  // Where head 0 of this position is kept; heads of a block stand BLOCK * width apart.
  const size_t kept = ((size_t)(slot / BLOCK) * key_value * BLOCK + slot % BLOCK) * width;
  for (word i = threadIdx.x; i < (query + key_value) * quarter; i += blockDim.x) {
    const word head = i / quarter, column = 2 * (i % quarter);
    T *from = row + (size_t)head * width + column;
    const Pack<T, 2> left = load<T, 2>(from), right = load<T, 2>(from + half);
    const Pack<float, 2> cosine = load<float, 2>(cosines + angle + column);
    const Pack<float, 2> sine = load<float, 2>(sines + angle + column);
    Pack<T, 2> turned_left, turned_right;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float x = widen(left.at[j]), y = widen(right.at[j]);
      turned_left.at[j] = narrow<T>(x * cosine.at[j] - y * sine.at[j]);
      turned_right.at[j] = narrow<T>(y * cosine.at[j] + x * sine.at[j]);
    }
    T *to = head < query ? from : keys + kept + (size_t)(head - query) * BLOCK * width + column;
    store<T, 2>(to, turned_left);
    store<T, 2>(to + half, turned_right);
  }
  const T *from = row + (size_t)(query + key_value) * width;
  for (word i = threadIdx.x; i < key_value * quarter; i += blockDim.x) {
    const word head = i / quarter, column = 4 * (i % quarter);
    const Pack<T, 4> value = load<T, 4>(from + (size_t)head * width + column);
    store<T, 4>(values + kept + (size_t)head * BLOCK * width + column, value);
  }
}

#define ROPE_STORE(T)                                                                                                  \
  extern "C" __global__ void rope_store_##T(T *qkv, const float *cosines, const float *sines, const word *positions,   \
                                            const word *slots, T *keys, T *values, word query, word key_value,         \
                                            word width) {                                                              \
    rope_store<T>(qkv, cosines, sines, positions, slots, keys, values, query, key_value, width);                       \
  }                                                                                                                    \
  EXPORT(rope_store_##T)

ROPE_STORE(f32)
ROPE_STORE(bf16)
ROPE_STORE(f16)
