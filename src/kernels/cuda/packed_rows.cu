// Attention over packed rows for f32, and for heads that there are no tiles for, of any width up to 256.
//
//   packed_rows           the output and the logarithms of sums, one warp a row and query head
//   packed_rows_queries   the gradient of queries, one warp a row and query head
//   packed_rows_keys      those of keys and values, one warp a row and key-value head: the query heads of the group
//                         one after the other, and of each the rows that see it from the first on
//
// 32 rows are taken at a time, counted from the start of the item, or on the way from keys to queries from the row
// itself: a lane computes what one of them weighs, then adds the columns `lane`, `lane + 32`, … of all of them.
// `items` holds the first row and the end of the item of each row; rows of none have an end of 0.
#include "packed.cuh"

constexpr int PACKED_WARPS = 4;
constexpr int PACKED_WIDTH = 256;
constexpr int PACKED_COLUMNS = PACKED_WIDTH / 32; // of a lane

struct PackedHeads {
  const word *items;
  word rows, query, key_value, width, window;
  float scale, factor; // of scores, to the base of 2 and as it is
};

/// The row and head of a warp, and the item of the row.
struct Place {
  word row, head, item, item_end;
};

__device__ inline Place own_place(const PackedHeads &of, word heads) {
  const word index = blockIdx.x * PACKED_WARPS + threadIdx.x / 32, row = index / heads;
  if (row >= of.rows) return {0, 0, 0, 0};
  const Pack<word, 2> item = load<word, 2>(of.items + 2 * (size_t)row);
  return {row, index % heads, item.at[0], item.at[1]};
}

/// Copies the own row to shared memory.
template <typename T> __device__ inline void share(float *to, const T *from, word width) {
  for (word i = threadIdx.x % 32; i < width; i += 32) to[i] = widen(from[i]);
  __syncwarp();
}

template <typename T> __device__ inline float shared_dot(const float *own, const T *other, word width) {
  float sum = 0.0f;
  for (word i = 0; i < width; ++i) sum = fmaf(own[i], widen(other[i]), sum);
  return sum;
}

/// Adds a row, times `share`, to the sums of columns of a lane.
template <typename T>
__device__ inline void add_row(float (&sums)[PACKED_COLUMNS], float share, const T *row, word width) {
#pragma unroll
  for (int i = 0; i < PACKED_COLUMNS; ++i) {
    const word column = threadIdx.x % 32 + 32 * i;
    if (column < width) sums[i] = fmaf(share, widen(row[column]), sums[i]);
  }
}

template <typename T>
__device__ inline void write_row(T *to, const float (&sums)[PACKED_COLUMNS], float factor, word width) {
#pragma unroll
  for (int i = 0; i < PACKED_COLUMNS; ++i) {
    const word column = threadIdx.x % 32 + 32 * i;
    if (column < width) to[column] = narrow<T>(sums[i] * factor);
  }
}

template <typename T>
__device__ inline void packed_rows(const PackedHeads &of, const T *queries, const T *keys, const T *values, T *out,
                                   float *log_sums) {
  __shared__ float shared[PACKED_WARPS][PACKED_WIDTH];
  const Place own = own_place(of, of.query);
  if (own.item_end == 0) return; // with its whole warp; no barrier of the block follows
  const word lane = threadIdx.x % 32, kept = own.head / (of.query / of.key_value);
  const size_t number = (size_t)own.row * of.query + own.head, narrow = (size_t)of.key_value * of.width;
  float *query = shared[threadIdx.x / 32];
  share(query, queries + number * of.width, of.width);
  keys += kept * of.width;
  values += kept * of.width;

  const word from = first_seen(own.row, own.item, of.window);
  Softmax all = {-INFINITY, 0.0f};
  float sums[PACKED_COLUMNS] = {};
  for (word first = own.item + (from - own.item) / 32 * 32; first <= own.row; first += 32) {
    const word row = first + lane;
    float score = -INFINITY;
    if (row >= from && row <= own.row) score = shared_dot(query, keys + row * narrow, of.width) * of.scale;
    const float top = fmaxf(all.top, warp_max(score)); // each 32 rows have one that is seen
    const float keep = exp2f(all.top - top), weight = exp2f(score - top);
    all = {top, fmaf(all.total, keep, warp_sum(weight))};
#pragma unroll
    for (int i = 0; i < PACKED_COLUMNS; ++i) sums[i] = sums[i] * keep;
    for (word j = 0; j < min(32u, own.row - first + 1); ++j) {
      add_row(sums, __shfl_sync(0xffffffffu, weight, j), values + (first + j) * narrow, of.width);
    }
  }
  write_row(out + number * of.width, sums, 1.0f / all.total, of.width);
  if (lane == 0) log_sums[number] = all.top + log2f(all.total);
}

template <typename T>
__device__ inline void packed_rows_queries(const PackedHeads &of, const T *queries, const T *keys, const T *values,
                                           const T *gradient, const float *log_sums, const float *along,
                                           T *of_queries) {
  __shared__ float shared[PACKED_WARPS][2][PACKED_WIDTH];
  const Place own = own_place(of, of.query);
  if (own.item_end == 0) return; // with its whole warp; no barrier of the block follows
  const word lane = threadIdx.x % 32, kept = own.head / (of.query / of.key_value);
  const size_t number = (size_t)own.row * of.query + own.head, narrow = (size_t)of.key_value * of.width;
  float *query = shared[threadIdx.x / 32][0], *slope = shared[threadIdx.x / 32][1];
  share(query, queries + number * of.width, of.width);
  share(slope, gradient + number * of.width, of.width);
  keys += kept * of.width;
  values += kept * of.width;

  const word from = first_seen(own.row, own.item, of.window);
  float sums[PACKED_COLUMNS] = {};
  for (word first = own.item + (from - own.item) / 32 * 32; first <= own.row; first += 32) {
    const word row = first + lane;
    float of_score = 0.0f;
    if (row >= from && row <= own.row) {
      const float score = shared_dot(query, keys + row * narrow, of.width) * of.scale;
      const float of_weight = shared_dot(slope, values + row * narrow, of.width);
      of_score = exp2f(score - log_sums[number]) * (of_weight - along[number]);
    }
    for (word j = 0; j < min(32u, own.row - first + 1); ++j) {
      add_row(sums, __shfl_sync(0xffffffffu, of_score, j), keys + (first + j) * narrow, of.width);
    }
  }
  write_row(of_queries + number * of.width, sums, of.factor, of.width);
}

template <typename T>
__device__ inline void packed_rows_keys(const PackedHeads &of, const T *queries, const T *keys, const T *values,
                                        const T *gradient, const float *log_sums, const float *along, T *of_keys,
                                        T *of_values) {
  __shared__ float shared[PACKED_WARPS][2][PACKED_WIDTH];
  const Place own = own_place(of, of.key_value);
  if (own.item_end == 0) return; // with its whole warp; no barrier of the block follows
  const word lane = threadIdx.x % 32, group = of.query / of.key_value;
  const size_t at = ((size_t)own.row * of.key_value + own.head) * of.width;
  float *key = shared[threadIdx.x / 32][0], *value = shared[threadIdx.x / 32][1];
  share(key, keys + at, of.width);
  share(value, values + at, of.width);

  const word end = seen_until(own.row, own.item_end, of.window);
  float key_sums[PACKED_COLUMNS] = {}, value_sums[PACKED_COLUMNS] = {};
  for (word head = own.head * group; head < (own.head + 1) * group; ++head) {
    for (word first = own.row; first < end; first += 32) {
      const word row = first + lane;
      float weight = 0.0f, of_score = 0.0f;
      if (row < end) {
        const size_t number = (size_t)row * of.query + head;
        const float score = shared_dot(key, queries + number * of.width, of.width) * of.scale;
        const float of_weight = shared_dot(value, gradient + number * of.width, of.width);
        weight = exp2f(score - log_sums[number]);
        of_score = weight * (of_weight - along[number]);
      }
      for (word j = 0; j < min(32u, end - first); ++j) {
        const size_t other = ((size_t)(first + j) * of.query + head) * of.width;
        add_row(value_sums, __shfl_sync(0xffffffffu, weight, j), gradient + other, of.width);
        add_row(key_sums, __shfl_sync(0xffffffffu, of_score, j), queries + other, of.width);
      }
    }
  }
  write_row(of_keys + at, key_sums, of.factor, of.width);
  write_row(of_values + at, value_sums, 1.0f, of.width);
}

#define PACKED_ROWS(T)                                                                                                 \
  extern "C" __global__ void __launch_bounds__(32 * PACKED_WARPS)                                                      \
      packed_rows_##T(const T *queries, const T *keys, const T *values, const word *items, T *out, float *log_sums,    \
                      word rows, word query, word key_value, word width, word window, float scale) {                   \
    packed_rows<T>({items, rows, query, key_value, width, window, scale, 0.0f}, queries, keys, values, out, log_sums); \
  }                                                                                                                    \
  EXPORT(packed_rows_##T)                                                                                              \
  extern "C" __global__ void __launch_bounds__(32 * PACKED_WARPS)                                                      \
      packed_rows_queries_##T(const T *queries, const T *keys, const T *values, const T *gradient,                     \
                              const float *log_sums, const float *along, const word *items, T *of_queries, word rows,  \
                              word query, word key_value, word width, word window, float scale, float factor) {        \
    packed_rows_queries<T>({items, rows, query, key_value, width, window, scale, factor}, queries, keys, values,       \
                           gradient, log_sums, along, of_queries);                                                     \
  }                                                                                                                    \
  EXPORT(packed_rows_queries_##T)                                                                                      \
  extern "C" __global__ void __launch_bounds__(32 * PACKED_WARPS)                                                      \
      packed_rows_keys_##T(const T *queries, const T *keys, const T *values, const T *gradient, const float *log_sums, \
                           const float *along, const word *items, T *of_keys, T *of_values, word rows, word query,     \
                           word key_value, word width, word window, float scale, float factor) {                       \
    packed_rows_keys<T>({items, rows, query, key_value, width, window, scale, factor}, queries, keys, values,          \
                        gradient, log_sums, along, of_keys, of_values);                                                \
  }                                                                                                                    \
  EXPORT(packed_rows_keys_##T)

PACKED_ROWS(f32)
PACKED_ROWS(bf16)
