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
// Keys and values lie in shared memory in rows of `D` elements, in pieces of 16 bytes that are shuffled so that
// eight rows are read without two pieces in one bank. While one of the two is computed with, the other is copied.
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

/// The place of a piece of 16 bytes of row `row`.
template <int D> __device__ inline bf16 *piece(bf16 *rows, word row, word index) {
  constexpr word pieces = D / 8;
  const word shuffle = pieces >= 8 ? row % 8 : row / 2 % pieces;
  return rows + row * D + 8 * (index ^ shuffle);
}

/// Starts to copy the keys or values of a block; zeros for positions from `end` on.
template <int D, int THREADS>
__device__ inline void copy_block(bf16 *to, const bf16 *from, word first_position, word end) {
  constexpr word pieces = D / 8;
#pragma unroll
  for (word i = threadIdx.x; i < BLOCK * pieces; i += THREADS) {
    const word row = i / pieces, index = i % pieces;
    copy_async(piece<D>(to, row, index), from + row * D + 8 * index, first_position + row < end);
  }
}

/// Two pairs of each lane, of the 16 of its warp: those of rows lane / 4 and lane / 4 + 8 of a product.
struct Pairs {
  word index[2]; // among the pairs of the run
  bool is_there[2];
  word position[2];
  word first_visible[2];
};

/// Scores of 16 pairs and 64 positions, in the layout of products.
template <int D> __device__ inline void score(float (&scores)[8][4], const word (&queries)[D / 16][4], bf16 *keys) {
  const word lane = threadIdx.x % 32;
#pragma unroll
  for (int column = 0; column < 8; ++column) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[column][i] = 0.0f;
#pragma unroll
    for (int depth = 0; depth < D / 32; ++depth) {
      word b[4];
      load_matrices(b, piece<D>(keys, 8 * column + lane % 8, 4 * depth + lane / 8));
      mma(scores[column], queries[2 * depth], b[0], b[1]);
      mma(scores[column], queries[2 * depth + 1], b[2], b[3]);
    }
  }
}

/// Turns scores into weights, and returns what the sums before are to be multiplied with.
__device__ inline void weigh(float (&scores)[8][4], Softmax (&rows)[2], float (&keep)[2], const Pairs &pairs,
                             word first_position, float scale) {
  const word lane = threadIdx.x % 32;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float top = -INFINITY;
#pragma unroll
    for (int column = 0; column < 8; ++column) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const word position = first_position + 8 * column + 2 * (lane % 4) + i;
        const bool is_visible = position >= pairs.first_visible[row] && position <= pairs.position[row];
        float &score = scores[column][2 * row + i];
        score = is_visible ? score * scale : -INFINITY;
        top = fmaxf(top, score);
      }
    }
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    top = fmaxf(top, rows[row].top);
    const float reference = top == -INFINITY ? 0.0f : top; // nothing seen so far: all weights are 0
    keep[row] = exp2_fast(rows[row].top - reference);
    float total = 0.0f;
#pragma unroll
    for (int column = 0; column < 8; ++column) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float &score = scores[column][2 * row + i];
        score = exp2_fast(score - reference);
        total = total + score;
      }
    }
    rows[row] = {top, fmaf(rows[row].total, keep[row], total)};
  }
}

/// Adds the weighted values of 64 positions to the sums.
template <int D>
__device__ inline void add_values(float (&sums)[D / 8][4], const float (&weights)[8][4], const float (&keep)[2],
                                  bf16 *values) {
  const word lane = threadIdx.x % 32;
#pragma unroll
  for (int column = 0; column < D / 8; ++column) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[column][i] = sums[column][i] * keep[i / 2];
  }
#pragma unroll
  for (int depth = 0; depth < 4; ++depth) {
    const float(&left)[4] = weights[2 * depth], (&right)[4] = weights[2 * depth + 1];
    const word a[4] = {pair(left[0], left[1]), pair(left[2], left[3]), pair(right[0], right[1]),
                       pair(right[2], right[3])};
#pragma unroll
    for (int column = 0; column < D / 16; ++column) {
      word b[4];
      load_matrices_transposed(b, piece<D>(values, 16 * depth + lane % 16, 2 * column + lane / 16));
      mma(sums[2 * column], a, b[0], b[1]);
      mma(sums[2 * column + 1], a, b[2], b[3]);
    }
  }
}

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
    pairs.position[i] = run.position + row;
    pairs.first_visible[i] = first_visible(pairs.position[i], step.window);
    rows[i] = step.queries + (size_t)(run.first_row + row) * step.stride + (head * group + member) * D;
  }
#pragma unroll
  for (int depth = 0; depth < D / 16; ++depth) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bf16 *at = rows[i % 2] + 16 * depth + 8 * (i / 2) + 2 * (lane % 4);
      queries[depth][i] = *reinterpret_cast<const word *>(at);
    }
  }

  const word last_position = run.position + last_pair / group, end = run.position + run.rows;
  word first = first_visible(run.position + first_pair / group, step.window) / BLOCK, last = last_position / BLOCK;
  if (SPLIT) {
    first = max(first, tile.at[2] * BLOCKS_EACH);
    last = min(last, tile.at[2] * BLOCKS_EACH + BLOCKS_EACH - 1);
  }
  const word *table = step.words + run.table;
  auto copy = [&](bf16 *to, const bf16 *from, word block) {
    const size_t page = (size_t)table[block] * heads + head;
    copy_block<D, THREADS>(to, from + page * BLOCK * D, block * BLOCK, end);
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
    float weights[8][4], keep[2];
    await_copies<1>();
    __syncthreads(); // keys are there
    score<D>(weights, queries, keys);
    __syncthreads(); // and read by all
    if (block < last) copy(keys, step.keys, block + 1);
    close_copies();
    weigh(weights, part, keep, pairs, block * BLOCK, step.scale);
    await_copies<1>();
    __syncthreads(); // values are there
    add_values<D>(sums, weights, keep, values);
    __syncthreads(); // and read by all
    if (block < last) copy(values, step.values, block + 1);
    close_copies();

    if (block < last && (block + 1) % BLOCKS_EACH != 0) continue;
    // A partition is through.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      part[i].total = part[i].total + __shfl_xor_sync(0xffffffffu, part[i].total, 1);
      part[i].total = part[i].total + __shfl_xor_sync(0xffffffffu, part[i].total, 2);
    }
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
