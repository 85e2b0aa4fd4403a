// Matrix products of a warp on tensor cores, and copies to shared memory that run beside them.
//
// In the emulation, emulation.h has functions of the same names.
//
//   mma   m16n8k16:  c (16 x 8) += a (16 x 16) * b (16 x 8), bf16 with f32 sums. With g = lane / 4, t = lane % 4:
//         a[0], a[1]  rows g, g + 8, columns 2t, 2t + 1       a[2], a[3]  the same rows, columns 8 + 2t, 9 + 2t
//         b[0], b[1]  column g, rows 2t, 2t + 1 and 8 + 2t, 9 + 2t
//         c[0], c[1]  row g, columns 2t, 2t + 1               c[2], c[3]  row g + 8, the same columns
//   load_matrices:   four matrices of 8 rows of 16 bytes; lane 8i + j names row j of matrix i. Each lane gets
//         elements 2t, 2t + 1 of row g of each; transposed: rows 2t, 2t + 1 of column g.
#pragma once
#include "element.cuh"

#ifndef HEADWATER_EMULATED

/// Where shared memory is, as instructions want it.
__device__ inline word shared_address(const void *at) { return (word)__cvta_generic_to_shared(at); }

__device__ inline void mma(float (&c)[4], const word (&a)[4], word b0, word b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void load_matrices(word (&to)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void load_matrices_transposed(word (&to)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

/// Starts a copy of 16 bytes to shared memory, or writes 16 zeros where there is nothing to copy.
__device__ inline void copy_async(void *to, const void *from, bool is_there) {
  const int bytes = is_there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}

/// Closes a group of copies.
__device__ inline void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits until all but the newest `N` groups of this thread have arrived.
template <int N> __device__ inline void await_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

/// 2 to the power of x, to about 22 bits; 0 for minus infinity, exactly 1 for 0.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Two elements in a word, `x` in its lower half.
__device__ inline word pair(float x, float y) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const word *>(&both);
}

#endif
