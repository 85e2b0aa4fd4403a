// The gradients of keys and values of packed rows, in bf16 on tensor cores.
//
//   weights^T = exp2(scale * keys queries^T - log_sums)                   of values = weights^T gradient
//   of scores^T = weights^T * (values gradient^T - along)                 of keys = factor * (of scores)^T queries
//
// Blocks of threads: tiles of 64 rows across, key-value heads down. A tile meets the query heads of its group one
// after the other, and of each the rows that see it, 32 at a time from the first on: the order of all sums. While it
// computes with some, the next are copied.
#include "packed.cuh"

struct PackedKeys {
  const bf16 *queries, *keys, *values, *gradient;
  const float *log_sums, *along;
  const word *tiles;
  bf16 *of_keys, *of_values;
  word query, window;
  float scale, factor; // of scores, to the base of 2 and as it is
};

/// Rows of one query head that a tile of keys meets at a time.
template <int D> struct Met {
  alignas(16) bf16 queries[STEP * D];
  alignas(16) bf16 gradients[STEP * D];
  float log_sums[STEP];
  float along[STEP];
};

/// What a tile works with in shared memory: `keys_shared` in src/kernels/cuda/training/attention.rs.
template <int D> struct SharedKeys {
  alignas(16) bf16 keys[TILE * D];
  alignas(16) bf16 values[TILE * D];
  Met<D> met[2];
};

/// From scores to weights, and from the gradients of weights to those of scores, of rows from `first_row` on.
template <int D>
__device__ inline void turn_back(float (&scores)[STEP / 8][4], float (&of_weights)[STEP / 8][4], const Met<D> &met,
                                 const OwnRows &own, const word (&until)[2], word first_row, float scale) {
#pragma unroll
  for (int i = 0; i < STEP / 2; ++i) {
    const int column = i / 4, mine = i % 4 / 2;
    const word place = 8 * column + 2 * (threadIdx.x % 4) + i % 2, row = first_row + place;
    const bool sees = row >= own.row[mine] && row < until[mine];
    const float weight = sees ? exp2_fast(scores[column][i % 4] * scale - met.log_sums[place]) : 0.0f;
    scores[column][i % 4] = weight;
    of_weights[column][i % 4] = weight * (of_weights[column][i % 4] - met.along[place]);
  }
}

template <int D> __device__ inline void packed_keys(const PackedKeys &of, unsigned char *shared_bytes) {
  SharedKeys<D> &shared = *reinterpret_cast<SharedKeys<D> *>(shared_bytes);
  const word kept = blockIdx.y, group = of.query / gridDim.y;
  const size_t wide = (size_t)of.query * D, narrow = (size_t)gridDim.y * D;
  const RowTile tile = tile_at(of.tiles, blockIdx.x);
  const OwnRows own = own_rows(tile);
  const word until[2] = {seen_until(own.row[0], tile.item_end, of.window),
                         seen_until(own.row[1], tile.item_end, of.window)};
  const word end = seen_until(tile.end - 1, tile.item_end, of.window); // of the rows that see any of the tile
  const word blocks = (end - tile.first + STEP - 1) / STEP, steps = group * blocks;

  auto copy = [&](word step) {
    Met<D> &met = shared.met[step % 2];
    const word head = kept * group + step / blocks, at = tile.first + step % blocks * STEP;
    copy_rows<D, STEP, TILE_THREADS>(met.queries, of.queries + at * wide + head * D, wide, end - at);
    copy_rows<D, STEP, TILE_THREADS>(met.gradients, of.gradient + at * wide + head * D, wide, end - at);
    if (threadIdx.x < STEP) {
      const word row = at + threadIdx.x;
      const size_t number = (size_t)row * of.query + head;
      met.log_sums[threadIdx.x] = row < end ? of.log_sums[number] : 0.0f;
      met.along[threadIdx.x] = row < end ? of.along[number] : 0.0f;
    }
  };
  const size_t at = tile.first * narrow + kept * D;
  copy_rows<D, TILE, TILE_THREADS>(shared.keys, of.keys + at, narrow, tile.end - tile.first);
  copy_rows<D, TILE, TILE_THREADS>(shared.values, of.values + at, narrow, tile.end - tile.first);
  copy(0);
  close_copies();
  const word first_own = threadIdx.x / 32 * 16;
  float key_sums[D / 8][4], value_sums[D / 8][4];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) key_sums[i / 4][i % 4] = value_sums[i / 4][i % 4] = 0.0f;
  for (word step = 0; step < steps; ++step) {
    if (step + 1 < steps) copy(step + 1);
    close_copies();
    await_copies<1>();
    __syncthreads(); // the rows are there
    Met<D> &met = shared.met[step % 2];
    float scores[STEP / 8][4], of_weights[STEP / 8][4];
    times_rows<D>(scores, shared.keys, first_own, met.queries);
    times_rows<D>(of_weights, shared.values, first_own, met.gradients);
    turn_back<D>(scores, of_weights, met, own, until, tile.first + step % blocks * STEP, of.scale);
    add_rows<D>(value_sums, scores, met.gradients);
    add_rows<D>(key_sums, of_weights, met.queries);
    __syncthreads(); // and read by all
  }
  await_copies<0>();
  const float factors[2] = {of.factor, of.factor}, ones[2] = {1.0f, 1.0f};
  write_rows<D>(of.of_keys + kept * D, narrow, own, key_sums, factors);
  write_rows<D>(of.of_values + kept * D, narrow, own, value_sums, ones);
}

#define PACKED_KEYS(D)                                                                                                 \
  extern "C" __global__ void __launch_bounds__(TILE_THREADS)                                                           \
      packed_keys_##D(const bf16 *queries, const bf16 *keys, const bf16 *values, const bf16 *gradient,                 \
                      const float *log_sums, const float *along, const word *tiles, bf16 *of_keys, bf16 *of_values,    \
                      word query, word window, float scale, float factor) {                                            \
    DYNAMIC_SHARED(shared);                                                                                            \
    packed_keys<D>({queries, keys, values, gradient, log_sums, along, tiles, of_keys, of_values, query, window, scale, \
                    factor},                                                                                           \
                   shared);                                                                                            \
  }                                                                                                                    \
  EXPORT(packed_keys_##D)

PACKED_KEYS(32)
PACKED_KEYS(64)
PACKED_KEYS(128)
