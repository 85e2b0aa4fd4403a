// Ids of rows that are tokens of the step before: `pairs` are a row and which token each. One thread a pair.
#include "element.cuh"

extern "C" __global__ void fill_ids(const word *tokens, const word *pairs, word *ids, word count) {
  const word i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) ids[pairs[2 * i]] = tokens[pairs[2 * i + 1]];
}
EXPORT(fill_ids)
