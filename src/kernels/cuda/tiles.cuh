// Products of a warp with rows that lie in shared memory, and the softmax between two of them.
//
// Rows have `D` elements of bf16, in pieces of 16 bytes that are shuffled so that eight rows are read without two
// pieces in one bank. Fragments are those of tensor_core.cuh: a warp has 16 rows of its own, and a lane two of them,
// lane / 4 and lane / 4 + 8.
#pragma once
#include "tensor_core.cuh"

/// The place of a piece of 16 bytes of row `row`.
template <int D> __device__ inline bf16 *piece(bf16 *rows, word row, word index) {
  constexpr word pieces = D / 8;
  const word shuffle = pieces >= 8 ? row % 8 : row / 2 % pieces;
  return rows + row * D + 8 * (index ^ shuffle);
}

/// Starts to copy `ROWS` rows that stand `stride` elements apart; zeros from row `end` on.
template <int D, int ROWS, int THREADS>
__device__ inline void copy_rows(bf16 *to, const bf16 *from, size_t stride, word end) {
  constexpr word pieces = D / 8;
#pragma unroll
  for (word i = threadIdx.x; i < ROWS * pieces; i += THREADS) {
    const word row = i / pieces, index = i % pieces;
    copy_async(piece<D>(to, row, index), from + row * stride + 8 * index, row < end);
  }
}

/// The fragments of 16 rows of which this lane has `rows`, from memory that is not shared.
template <int D> __device__ inline void load_fragments(word (&to)[D / 16][4], const bf16 *const (&rows)[2]) {
  const word lane = threadIdx.x % 32;
#pragma unroll
  for (int depth = 0; depth < D / 16; ++depth) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bf16 *at = rows[i % 2] + 16 * depth + 8 * (i / 2) + 2 * (lane % 4);
      to[depth][i] = *reinterpret_cast<const word *>(at);
    }
  }
}

/// Products of 16 own rows with each of 8 * COLUMNS rows.
template <int D, int COLUMNS>
__device__ inline void times_rows(float (&out)[COLUMNS][4], const word (&own)[D / 16][4], bf16 *rows) {
  const word lane = threadIdx.x % 32;
#pragma unroll
  for (int column = 0; column < COLUMNS; ++column) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[column][i] = 0.0f;
#pragma unroll
    for (int depth = 0; depth < D / 32; ++depth) {
      word b[4];
      load_matrices(b, piece<D>(rows, 8 * column + lane % 8, 4 * depth + lane / 8));
      mma(out[column], own[2 * depth], b[0], b[1]);
      mma(out[column], own[2 * depth + 1], b[2], b[3]);
    }
  }
}

/// The same for own rows that are shared, too: those from `first` on.
template <int D, int COLUMNS>
__device__ inline void times_rows(float (&out)[COLUMNS][4], bf16 *own, word first, bf16 *rows) {
  const word lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4 * COLUMNS; ++i) out[i / 4][i % 4] = 0.0f;
#pragma unroll
  for (int depth = 0; depth < D / 32; ++depth) {
    word left[4], right[4];
    load_matrices(left, piece<D>(own, first + lane % 16, 4 * depth + lane / 16));
    load_matrices(right, piece<D>(own, first + lane % 16, 4 * depth + 2 + lane / 16));
#pragma unroll
    for (int column = 0; column < COLUMNS; ++column) {
      word b[4];
      load_matrices(b, piece<D>(rows, 8 * column + lane % 8, 4 * depth + lane / 8));
      mma(out[column], left, b[0], b[1]);
      mma(out[column], right, b[2], b[3]);
    }
  }
}

/// Adds 8 * COLUMNS rows to the sums of the own rows, weighted and the weights rounded.
template <int D, int COLUMNS>
__device__ inline void add_rows(float (&sums)[D / 8][4], const float (&weights)[COLUMNS][4], bf16 *rows) {
  const word lane = threadIdx.x % 32;
#pragma unroll
  for (int depth = 0; depth < COLUMNS / 2; ++depth) {
    const float(&left)[4] = weights[2 * depth], (&right)[4] = weights[2 * depth + 1];
    const word a[4] = {pair(left[0], left[1]), pair(left[2], left[3]), pair(right[0], right[1]),
                       pair(right[2], right[3])};
#pragma unroll
    for (int column = 0; column < D / 16; ++column) {
      word b[4];
      load_matrices_transposed(b, piece<D>(rows, 16 * depth + lane % 16, 2 * column + lane / 16));
      mma(sums[2 * column], a, b[0], b[1]);
      mma(sums[2 * column + 1], a, b[2], b[3]);
    }
  }
}

/// The running maximum and sum of a row, to the base of 2.
struct Softmax {
  float top;
  float total;
};

/// What the two own rows of a lane see: positions from `first` to `last`.
struct Seen {
  word first[2];
  word last[2];
};

/// Turns scores of positions from `first_position` on into weights, and returns what the sums before are to be
/// multiplied with.
template <int COLUMNS>
__device__ inline void weigh(float (&scores)[COLUMNS][4], Softmax (&rows)[2], float (&keep)[2], const Seen &seen,
                             word first_position, float scale) {
  const word lane = threadIdx.x % 32;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float top = -INFINITY;
#pragma unroll
    for (int column = 0; column < COLUMNS; ++column) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const word position = first_position + 8 * column + 2 * (lane % 4) + i;
        const bool is_visible = position >= seen.first[row] && position <= seen.last[row];
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
    for (int column = 0; column < COLUMNS; ++column) {
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

/// Has own rows meet a block of keys and values that is on its way to shared memory, and asks for the next one: while
/// one of the two is computed with, `next` copies the other.
template <int D, int ROWS, typename Keys, typename Values>
__device__ inline void meet(float (&sums)[D / 8][4], Softmax (&rows)[2], const word (&queries)[D / 16][4], bf16 *keys,
                            bf16 *values, const Seen &seen, word first_position, float scale, const Keys &next_keys,
                            const Values &next_values) {
  float weights[ROWS / 8][4], keep[2];
  await_copies<1>();
  __syncthreads(); // keys are there
  times_rows<D>(weights, queries, keys);
  __syncthreads(); // and read by all
  next_keys();
  close_copies();
  weigh(weights, rows, keep, seen, first_position, scale);
  await_copies<1>();
  __syncthreads(); // values are there
#pragma unroll
  for (int i = 0; i < D / 2; ++i) sums[i / 4][i % 4] = sums[i / 4][i % 4] * keep[i % 4 / 2];
  add_rows<D>(sums, weights, values);
  __syncthreads(); // and read by all
  next_values();
  close_copies();
}

/// The sum over the lanes that share a row.
__device__ inline float row_sum(float x) {
  x = x + __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
