// What the attention kernels share: how the rows of a step lie, and how parts of one row are put together.
//
// The words of a step are laid out by src/kernels/cuda/plan.rs, which says what each of them means.
#pragma once
#include "tiles.cuh"

/// Positions of one partition. A row is summed up partition by partition, each from nothing, whether one block
/// of threads walks through all of them or each has one: `PARTITION` in src/kernels/cuda/plan.rs.
constexpr word PARTITION = 512;

/// The rows of one sequence.
struct Run {
  word first_row; // of the step
  word rows;
  word position; // of the first row
  word table;    // where its blocks stand among the words of the step
};

__device__ inline Run run_at(const word *words, word runs, word index) {
  const Pack<word, 4> run = load<word, 4>(words + runs + 4 * (size_t)index);
  return {run.at[0], run.at[1], run.at[2], run.at[3]};
}

/// The first position that a row sees. `window` is 0 for all.
__device__ inline word first_visible(word position, word window) {
  return window != 0 && position + 1 > window ? position + 1 - window : 0;
}

/// What two parts of a row are to be multiplied with when they are put together.
struct Shares {
  float before;
  float part;
};

/// Puts a part behind the parts before. A part in which the row sees nothing (its top is minus infinity)
/// changes no bit.
__device__ inline Shares put_together(Softmax &all, Softmax part) {
  Shares shares = {1.0f, 0.0f};
  if (part.top != -INFINITY) {
    const float top = fmaxf(all.top, part.top);
    shares = {exp2_fast(all.top - top), exp2_fast(part.top - top)};
    all.top = top;
  }
  all.total = fmaf(all.total, shares.before, part.total * shares.part);
  return shares;
}
