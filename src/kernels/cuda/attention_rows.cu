// Attention of the rows of a step to the blocks of the cache, for any type and any width up to 256.
//
// One warp a row and query head. Positions are taken 32 at a time, each from its place in the sequence: a lane
// computes the score of one position, then the columns `lane`, `lane + 32`, … of the result.
#include "attention.cuh"

constexpr int WARPS = 4;
constexpr int WIDTH_MAX = 256;

template <typename T>
__device__ inline void attend_row(const T *queries, const T *keys, const T *values, const word *words, T *out,
                                  word row_runs, word runs, word rows, word stride, word query, word key_value,
                                  word width, word window, float scale) {
  __shared__ float shared[WARPS][WIDTH_MAX];
  const word lane = threadIdx.x % 32, item = blockIdx.x * WARPS + threadIdx.x / 32;
  if (item >= rows * query) return; // with its whole warp; no barrier of the block follows
  float *own = shared[threadIdx.x / 32];
  const word row = item / query, head = item % query, kept = head / (query / key_value);
  const Run run = run_at(words, runs, words[row_runs + row]);
  const word position = run.position + (row - run.first_row), from = first_visible(position, window);
  const T *own_query = queries + (size_t)row * stride + (size_t)head * width;
  for (word i = lane; i < width; i += 32) own[i] = widen(own_query[i]);
  __syncwarp();

  Softmax all = {-INFINITY, 0.0f};
  float sums[WIDTH_MAX / 32];
#pragma unroll
  for (int i = 0; i < WIDTH_MAX / 32; ++i) sums[i] = 0.0f;
  for (word first = from / 32 * 32; first <= position; first += 32) {
    const size_t block = words[run.table + first / BLOCK];
    const size_t page = ((block * key_value + kept) * BLOCK + first % BLOCK) * width;
    const word own_position = first + lane;
    float score = -INFINITY;
    if (own_position >= from && own_position <= position) {
      const T *key = keys + page + (size_t)lane * width;
      float sum = 0.0f;
      for (word i = 0; i < width; i += 4) {
        const Pack<T, 4> pack = load<T, 4>(key + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum = fmaf(own[i + j], widen(pack.at[j]), sum);
      }
      score = sum * scale;
    }
    const float top = fmaxf(all.top, warp_max(score)); // each 32 positions have one that is seen
    const float keep = expf(all.top - top), weight = expf(score - top);
    all = {top, fmaf(all.total, keep, warp_sum(weight))};
#pragma unroll
    for (int i = 0; i < WIDTH_MAX / 32; ++i) sums[i] = sums[i] * keep;
    const word start = from > first ? from - first : 0, stop = min(32u, position - first + 1);
    for (word j = start; j < stop; ++j) {
      const float share = __shfl_sync(0xffffffffu, weight, j);
      const T *value = values + page + (size_t)j * width;
#pragma unroll
      for (int i = 0; i < WIDTH_MAX / 32; ++i) {
        const word column = lane + 32 * i;
        if (column < width) sums[i] = fmaf(share, widen(value[column]), sums[i]);
      }
    }
  }
  const float inverse = 1.0f / all.total;
  T *to = out + ((size_t)row * query + head) * width;
#pragma unroll
  for (int i = 0; i < WIDTH_MAX / 32; ++i) {
    const word column = lane + 32 * i;
    if (column < width) to[column] = narrow<T>(sums[i] * inverse);
  }
}

#define ATTENTION_ROWS(T)                                                                                              \
  extern "C" __global__ void __launch_bounds__(32 * WARPS)                                                             \
      attention_rows_##T(const T *queries, const T *keys, const T *values, const word *words, T *out, word row_runs,   \
                         word runs, word rows, word stride, word query, word key_value, word width, word window,       \
                         float scale) {                                                                                \
    attend_row<T>(queries, keys, values, words, out, row_runs, runs, rows, stride, query, key_value, width, window,    \
                  scale);                                                                                              \
  }                                                                                                                    \
  EXPORT(attention_rows_##T)

ATTENTION_ROWS(f32)
ATTENTION_ROWS(bf16)
ATTENTION_ROWS(f16)
