// Attention over packed rows in bf16 on tensor cores, with the logarithms of the sums of weights for the way back.
//
// Blocks of threads: tiles of 64 rows across, the last first, for they see most; query heads down. A tile walks
// through its item in blocks of 64 rows that are counted from the start of the item, so that an item gets the same
// bits wherever it stands. While one of keys and values is computed with, the other is copied.
#include "packed.cuh"

struct PackedForward {
  const bf16 *queries, *keys, *values;
  const word *tiles;
  bf16 *out;
  float *log_sums;
  word key_value, window;
  float scale; // of scores, to the base of 2
};

template <int D> __device__ inline void packed_forward(const PackedForward &of, unsigned char *shared) {
  bf16 *keys = reinterpret_cast<bf16 *>(shared), *values = keys + TILE * D;
  const word head = blockIdx.y, heads = gridDim.y, kept = head / (heads / of.key_value), lane = threadIdx.x % 32;
  const size_t wide = (size_t)heads * D, narrow = (size_t)of.key_value * D;
  const RowTile tile = tile_at(of.tiles, gridDim.x - 1 - blockIdx.x);
  const OwnRows own = own_rows(tile);
  word queries[D / 16][4];
  const bf16 *rows[2] = {of.queries + own.row[0] * wide + head * D, of.queries + own.row[1] * wide + head * D};
  load_fragments<D>(queries, rows);
  const Seen seen = {{first_seen(own.row[0], tile.item, of.window), first_seen(own.row[1], tile.item, of.window)},
                     {own.row[0], own.row[1]}};

  const word first = (first_seen(tile.first, tile.item, of.window) - tile.item) / TILE;
  const word last = (tile.end - 1 - tile.item) / TILE;
  auto copy = [&](bf16 *to, const bf16 *from, word block) {
    const word at = tile.item + block * TILE;
    copy_rows<D, TILE, TILE_THREADS>(to, from + at * narrow + kept * D, narrow, tile.end - at);
  };
  copy(keys, of.keys, first);
  close_copies();
  copy(values, of.values, first);
  close_copies();

  Softmax all[2] = {{-INFINITY, 0.0f}, {-INFINITY, 0.0f}};
  float sums[D / 8][4];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) sums[i / 4][i % 4] = 0.0f;
  for (word block = first; block <= last; ++block) {
    auto next_keys = [&] {
      if (block < last) copy(keys, of.keys, block + 1);
    };
    auto next_values = [&] {
      if (block < last) copy(values, of.values, block + 1);
    };
    meet<D, TILE>(sums, all, queries, keys, values, seen, tile.item + block * TILE, of.scale, next_keys, next_values);
  }
  await_copies<0>();

  float inverse[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float total = row_sum(all[i].total);
    inverse[i] = 1.0f / total;
    if (own.is_there[i] && lane % 4 == 0) of.log_sums[(size_t)own.row[i] * heads + head] = all[i].top + log2f(total);
  }
  write_rows<D>(of.out + head * D, wide, own, sums, inverse);
}

#define PACKED_FORWARD(D)                                                                                              \
  extern "C" __global__ void __launch_bounds__(TILE_THREADS)                                                           \
      packed_forward_##D(const bf16 *queries, const bf16 *keys, const bf16 *values, const word *tiles, bf16 *out,      \
                         float *log_sums, word key_value, word window, float scale) {                                  \
    DYNAMIC_SHARED(shared);                                                                                            \
    packed_forward<D>({queries, keys, values, tiles, out, log_sums, key_value, window, scale}, shared);                \
  }                                                                                                                    \
  EXPORT(packed_forward_##D)

PACKED_FORWARD(32)
PACKED_FORWARD(64)
PACKED_FORWARD(128)
