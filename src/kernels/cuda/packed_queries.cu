// The gradient of queries of packed rows, in bf16 on tensor cores.
//
//   weights = exp2(scale * queries keys^T - log_sums)
//   of scores = weights * (gradient values^T - along)          of queries = factor * (of scores) keys
//
// Blocks of threads: tiles of 64 rows across, the last first; query heads down. A tile walks through its item 32 rows
// at a time; while it computes with some, the next are copied.
#include "packed.cuh"

struct PackedQueries {
  const bf16 *queries, *keys, *values, *gradient;
  const float *log_sums, *along;
  const word *tiles;
  bf16 *of_queries;
  word key_value, window;
  float scale, factor; // of scores, to the base of 2 and as it is
};

/// From scores to their gradients, given those of the weights, of rows from `first_row` on.
__device__ inline void of_scores(float (&scores)[STEP / 8][4], const float (&of_weights)[STEP / 8][4],
                                 const Seen &seen, word first_row, const float (&log_sums)[2],
                                 const float (&along)[2], float scale) {
#pragma unroll
  for (int i = 0; i < STEP / 2; ++i) {
    const int column = i / 4, own = i % 4 / 2;
    const word row = first_row + 8 * column + 2 * (threadIdx.x % 4) + i % 2;
    const bool is_visible = row >= seen.first[own] && row <= seen.last[own];
    const float weight = exp2_fast(scores[column][i % 4] * scale - log_sums[own]);
    scores[column][i % 4] = is_visible ? weight * (of_weights[column][i % 4] - along[own]) : 0.0f;
  }
}

template <int D> __device__ inline void packed_queries(const PackedQueries &of, unsigned char *shared) {
  bf16 *buffers = reinterpret_cast<bf16 *>(shared); // twice: keys, values
  const word head = blockIdx.y, heads = gridDim.y, kept = head / (heads / of.key_value);
  const size_t wide = (size_t)heads * D, narrow = (size_t)of.key_value * D;
  const RowTile tile = tile_at(of.tiles, gridDim.x - 1 - blockIdx.x);
  const OwnRows own = own_rows(tile);
  word queries[D / 16][4], gradients[D / 16][4];
  Seen seen;
  float log_sums[2], along[2], factors[2] = {of.factor, of.factor};
  const bf16 *query_rows[2], *gradient_rows[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const size_t at = own.row[i] * wide + head * D, number = (size_t)own.row[i] * heads + head;
    query_rows[i] = of.queries + at;
    gradient_rows[i] = of.gradient + at;
    log_sums[i] = of.log_sums[number];
    along[i] = of.along[number];
    seen.first[i] = first_seen(own.row[i], tile.item, of.window);
    seen.last[i] = own.row[i];
  }
  load_fragments<D>(queries, query_rows);
  load_fragments<D>(gradients, gradient_rows);

  const word first = (first_seen(tile.first, tile.item, of.window) - tile.item) / STEP;
  const word last = (tile.end - 1 - tile.item) / STEP;
  auto copy = [&](word block) {
    const word at = tile.item + block * STEP;
    bf16 *to = buffers + (block - first) % 2 * 2 * STEP * D;
    copy_rows<D, STEP, TILE_THREADS>(to, of.keys + at * narrow + kept * D, narrow, tile.end - at);
    copy_rows<D, STEP, TILE_THREADS>(to + STEP * D, of.values + at * narrow + kept * D, narrow, tile.end - at);
  };
  copy(first);
  close_copies();
  float sums[D / 8][4];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) sums[i / 4][i % 4] = 0.0f;
  for (word block = first; block <= last; ++block) {
    if (block < last) copy(block + 1);
    close_copies();
    await_copies<1>();
    __syncthreads(); // the rows are there
    bf16 *keys = buffers + (block - first) % 2 * 2 * STEP * D, *values = keys + STEP * D;
    float scores[STEP / 8][4], of_weights[STEP / 8][4];
    times_rows<D>(scores, queries, keys);
    times_rows<D>(of_weights, gradients, values);
    of_scores(scores, of_weights, seen, tile.item + block * STEP, log_sums, along, of.scale);
    add_rows<D>(sums, scores, keys);
    __syncthreads(); // and read by all
  }
  await_copies<0>();
  write_rows<D>(of.of_queries + head * D, wide, own, sums, factors);
}

#define PACKED_QUERIES(D)                                                                                              \
  extern "C" __global__ void __launch_bounds__(TILE_THREADS)                                                           \
      packed_queries_##D(const bf16 *queries, const bf16 *keys, const bf16 *values, const bf16 *gradient,              \
                         const float *log_sums, const float *along, const word *tiles, bf16 *of_queries,               \
                         word key_value, word window, float scale, float factor) {                                     \
    DYNAMIC_SHARED(shared);                                                                                            \
    packed_queries<D>({queries, keys, values, gradient, log_sums, along, tiles, of_queries, key_value, window, scale,  \
                       factor},                                                                                        \
                      shared);                                                                                         \
  }                                                                                                                    \
  EXPORT(packed_queries_##D)

PACKED_QUERIES(32)
PACKED_QUERIES(64)
PACKED_QUERIES(128)
