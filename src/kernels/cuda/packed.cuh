// What the kernels of attention over packed rows share: items, what of them is seen, and tiles of their rows.
//
// Rows of several items stand below each other. A row sees the rows of its item up to itself, the last `window` of
// them if that is not 0. A row of queries is `query` heads, one of keys or values `key_value` heads; query head h
// meets head h / (query / key_value) of keys and values.
//
// The logarithm of a sum of weights is to the base of 2, one for each row and query head.
#pragma once
#include "tiles.cuh"

/// Rows of a tile: `TILE` in src/kernels/cuda/training/attention.rs.
constexpr word TILE = 64;

/// Warps of a tile, each with 16 of its rows.
constexpr int TILE_WARPS = 4;
constexpr int TILE_THREADS = 32 * TILE_WARPS;

/// Rows that a tile meets at a time on the way back.
constexpr word STEP = 32;

/// The first row that a row of an item sees.
__device__ inline word first_seen(word row, word item, word window) {
  return window != 0 && row - item >= window ? row - window + 1 : item;
}

/// One behind the last row of an item that sees a row.
__device__ inline word seen_until(word row, word item_end, word window) {
  return window != 0 && item_end - row > window ? row + window : item_end;
}

/// At most 64 rows of one item, from a multiple of 64 in it.
struct RowTile {
  word first, end;
  word item, item_end;
};

__device__ inline RowTile tile_at(const word *tiles, word index) {
  const Pack<word, 4> tile = load<word, 4>(tiles + 4 * (size_t)index);
  return {tile.at[0], tile.at[1], tile.at[2], tile.at[3]};
}

/// The two rows of a lane; one that is not there computes what the last row of the tile does.
struct OwnRows {
  word row[2];
  bool is_there[2];
};

__device__ inline OwnRows own_rows(const RowTile &tile) {
  OwnRows own;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const word row = tile.first + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * i;
    own.is_there[i] = row < tile.end;
    own.row[i] = min(row, tile.end - 1);
  }
  return own;
}

/// Writes the sums of own rows, `stride` elements a row, each times its factor.
template <int D>
__device__ inline void write_rows(bf16 *out, size_t stride, const OwnRows &own, const float (&sums)[D / 8][4],
                                  const float (&factors)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!own.is_there[i]) continue;
    bf16 *to = out + own.row[i] * stride + 2 * (threadIdx.x % 4);
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      *reinterpret_cast<word *>(to + 8 * j) = pair(sums[j][2 * i] * factors[i], sums[j][2 * i + 1] * factors[i]);
    }
  }
}
