// Attention of the rows of a step to the blocks of the cache, in bf16 on tensor cores.
//
// A *pair* is a row with one query head of a group: pair i of a run is row i / group, head i % group. A block of
// threads has a tile of 16 pairs a warp, all of one run and one key-value head, and walks through blocks of 64
// positions; all warps share what is loaded of them.
//
//   split   one warp, one partition of the positions: for rows that are few, such as one token a sequence.
//           Where there are several partitions, attention_merge.cu puts them together.
//   whole   four warps, all partitions one after the other: for prompts.
//
// Both compute a pair the same way, bit for bit, and independently of the other pairs of the tile:
//   - a product of tensor cores computes each of its rows from that row alone;
//   - positions are taken in blocks of the cache, from the first of a partition to the last, each from its place
//     in the sequence; a block in which the pair sees nothing changes no bit;
//   - each partition starts from nothing, and partitions are put together in order (put_together).
//
// Keys and values lie in shared memory. While one of the two is computed with, the other is copied.
#include "attention.cuh"

struct Tiles {
  const bf16 *queries; // rows of `stride` elements
  const bf16 *keys;    // [block][key-value head][64][D]
  const bf16 *values;
  const word *words;  // of the step
  const word *tiles;  // four words each: run, first pair, partition, first partial result
  bf16 *out;          // rows of `key_value * group * D` elements
  float *partials;    // one for each pair: top, total, then D sums
  word runs;          // where the runs stand among the words
  word stride;
  word group;
  word window;
  float scale; // of scores, to the base of 2
};

/// No partial result: the tile has one partition only, and writes what it computed.
constexpr word DIRECT = 0xffffffffu;

/// Two pairs of each lane, of the 16 of its warp: those of rows lane / 4 and lane / 4 + 8 of a product.
struct Pairs {
  word index[2]; // among the pairs of the run
  bool is_there[2];
  Seen seen;
};

template <int D, int WARPS, bool SPLIT> __device__ inline void attend(const Tiles &step, unsigned char *shared) {
  constexpr int THREADS = 32 * WARPS;
  constexpr word BLOCKS_EACH = PARTITION / BLOCK;
  bf16 *keys = reinterpret_cast<bf16 *>(shared), *values = keys + BLOCK * D;
  // Sums of the partitions before, for each thread its own: [sum][thread]. Not used by split tiles.
  float *before = reinterpret_cast<float *>(values + BLOCK * D) + threadIdx.x;

  const word head = blockIdx.y, heads = gridDim.y, group = step.group, lane = threadIdx.x % 32;
  const Pack<word, 4> tile = load<word, 4>(step.tiles + 4 * (size_t)blockIdx.x);
  const Run run = run_at(step.words, step.runs, tile.at[0]);
  const word first_pair = tile.at[1], all_pairs = run.rows * group;
  const word last_pair = min(first_pair + 16 * WARPS, all_pairs) - 1;

  Pairs pairs;
  word queries[D / 16][4];
  const bf16 *rows[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const word index = first_pair + threadIdx.x / 32 * 16 + lane / 4 + 8 * i;
    pairs.is_there[i] = index <= last_pair;
    pairs.index[i] = min(index, last_pair); // those that are not there compute what the last one does
    const word row = pairs.index[i] / group, member = pairs.index[i] % group;
    pairs.seen.last[i] = run.position + row;
    pairs.seen.first[i] = first_visible(pairs.seen.last[i], step.window);
    rows[i] = step.queries + (size_t)(run.first_row + row) * step.stride + (head * group + member) * D;
  }
  load_fragments<D>(queries, rows);

  const word last_position = run.position + last_pair / group, end = run.position + run.rows;
  word first = first_visible(run.position + first_pair / group, step.window) / BLOCK, last = last_position / BLOCK;
  if (SPLIT) {
    first = max(first, tile.at[2] * BLOCKS_EACH);
    last = min(last, tile.at[2] * BLOCKS_EACH + BLOCKS_EACH - 1);
  }
  const word *table = step.words + run.table;
  auto copy = [&](bf16 *to, const bf16 *from, word block) {
    const size_t page = (size_t)table[block] * heads + head;
    copy_rows<D, BLOCK, THREADS>(to, from + page * BLOCK * D, D, end - block * BLOCK);
  };
  copy(keys, step.keys, first);
  close_copies();
  copy(values, step.values, first);
  close_copies();

  Softmax all[2] = {{-INFINITY, 0.0f}, {-INFINITY, 0.0f}}, part[2] = {all[0], all[1]};
  float sums[D / 8][4];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) sums[i / 4][i % 4] = 0.0f;
  for (word block = first; block <= last; ++block) {
    auto next_keys = [&] {
      if (block < last) copy(keys, step.keys, block + 1);
    };
    auto next_values = [&] {
      if (block < last) copy(values, step.values, block + 1);
    };
    meet<D, BLOCK>(sums, part, queries, keys, values, pairs.seen, block * BLOCK, step.scale, next_keys, next_values);

    if (block < last && (block + 1) % BLOCKS_EACH != 0) continue;
    // A partition is through.
#pragma unroll
    for (int i = 0; i < 2; ++i) part[i].total = row_sum(part[i].total);
    if constexpr (!SPLIT) {
      if (first / BLOCKS_EACH == last / BLOCKS_EACH) continue; // it is the only one
      Shares shares[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) shares[i] = put_together(all[i], part[i]);
      const bool is_first = block / BLOCKS_EACH == first / BLOCKS_EACH;
#pragma unroll
      for (int i = 0; i < D / 2; ++i) {
        float &sum = sums[i / 4][i % 4];
        const Shares &share = shares[i % 4 / 2];
        sum = fmaf(is_first ? 0.0f : before[i * THREADS], share.before, sum * share.part);
        if (block < last) {
          before[i * THREADS] = sum;
          sum = 0.0f;
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) part[i] = block < last ? Softmax{-INFINITY, 0.0f} : all[i];
    }
  }
  await_copies<0>();

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!pairs.is_there[i]) continue;
    const word column = 2 * (lane % 4);
    if (SPLIT && tile.at[3] != DIRECT) {
      // Partial results of the pairs of this tile stand together, head after head.
      const size_t count = last_pair - first_pair + 1;
      const size_t place = tile.at[3] * (size_t)heads + head * count + (pairs.index[i] - first_pair);
      float *to = step.partials + place * (D + 2);
      if (lane % 4 == 0) store<float, 2>(to, {part[i].top, part[i].total});
#pragma unroll
      for (int j = 0; j < D / 8; ++j) store<float, 2>(to + 2 + 8 * j + column, {sums[j][2 * i], sums[j][2 * i + 1]});
      continue;
    }
    const float inverse = 1.0f / part[i].total;
    const word row = pairs.index[i] / group, member = pairs.index[i] % group;
    bf16 *to = step.out + ((size_t)(run.first_row + row) * heads * group + head * group + member) * D + column;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      *reinterpret_cast<word *>(to + 8 * j) = pair(sums[j][2 * i] * inverse, sums[j][2 * i + 1] * inverse);
    }
  }
}

#define ATTENTION_TILES(NAME, D, WARPS, SPLIT)                                                                         \
  extern "C" __global__ void __launch_bounds__(32 * WARPS, SPLIT ? 1 : 3)                                              \
      NAME(const bf16 *queries, const bf16 *keys, const bf16 *values, const word *words, const word *tiles, bf16 *out, \
           float *partials, word runs, word stride, word group, word window, float scale) {                            \
    DYNAMIC_SHARED(shared);                                                                                            \
    attend<D, WARPS, SPLIT>(                                                                                           \
        {queries, keys, values, words, tiles, out, partials, runs, stride, group, window, scale}, shared);             \
  }                                                                                                                    \
  EXPORT(NAME)

ATTENTION_TILES(attention_tiles_32_split, 32, 1, true)
ATTENTION_TILES(attention_tiles_64_split, 64, 1, true)
ATTENTION_TILES(attention_tiles_128_split, 128, 1, true)
ATTENTION_TILES(attention_tiles_32_whole, 32, 4, false)
ATTENTION_TILES(attention_tiles_64_whole, 64, 4, false)
ATTENTION_TILES(attention_tiles_128_whole, 128, 4, false)
