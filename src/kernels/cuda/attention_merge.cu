// Puts the partial results of a pair together, partition by partition, as attention_tiles.cu does in one piece.
//
// Blocks of threads: tiles of at most 16 pairs across, key-value heads down, pairs in depth; a thread has the
// columns `threadIdx.x`, `threadIdx.x + 32`, … of one pair.
#include "attention.cuh"

/// `merges` are four words each: run, first pair, partitions, first partial result.
extern "C" __global__ void __launch_bounds__(32)
    attention_merge(const float *partials, const word *words, const word *merges, bf16 *out, word runs, word group,
                    word width) {
  const word head = blockIdx.y, heads = gridDim.y;
  const Pack<word, 4> merge = load<word, 4>(merges + 4 * (size_t)blockIdx.x);
  const Run run = run_at(words, runs, merge.at[0]);
  const word first_pair = merge.at[1], count = min(16u, run.rows * group - first_pair);
  if (blockIdx.z >= count) return;
  const word pair_index = first_pair + blockIdx.z, row = pair_index / group, member = pair_index % group;
  bf16 *to = out + ((size_t)(run.first_row + row) * heads * group + head * group + member) * width;
  for (word column = threadIdx.x; column < width; column += 32) {
    Softmax all = {-INFINITY, 0.0f};
    float sum = 0.0f;
    for (word partition = 0; partition < merge.at[2]; ++partition) {
      // Partials of one partition of the tile: head after head, pair after pair.
      const size_t place = (merge.at[3] + (size_t)partition * count) * heads + head * count + blockIdx.z;
      const float *from = partials + place * (width + 2);
      const Pack<float, 2> part = load<float, 2>(from);
      const Shares shares = put_together(all, {part.at[0], part.at[1]});
      sum = fmaf(sum, shares.before, from[2 + column] * shares.part);
    }
    to[column] = narrow<bf16>(sum * (1.0f / all.total));
  }
}
EXPORT(attention_merge)
