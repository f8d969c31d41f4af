// One-line PTX wrappers. Under TOKRED_SIMT their C++ twins of simt_ptx.h replace them.
#pragma once

#include "common/cuda/numbers.cuh"

#ifdef TOKRED_SIMT
#include "simt_ptx.h"
#else

namespace tokred::cuda {

// D += A B for one warp: A is 16 x 16 by rows, B 16 x 8 by columns, D 16 x 8 in fp32. With
// g = lane / 4 and t = lane % 4, a lane holds D at rows g, g + 8 (d[0..1], d[2..3]), columns
// 2t, 2t + 1; ldmatrix_x4 of A's four 8 x 8 quarters (top left, bottom left, top right, bottom
// right) gives a, ldmatrix of the rows of B^T gives b (PTX ISA, mma.m16n8k16).
__device__ __forceinline__ void mma(bf16, float (&d)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma(f16, float (&d)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Loads 8 x 8 matrices of 16-bit numbers. Lane l brings the address of row l % 8 of matrix l / 8
// (16 bytes, aligned); lane l gets elements 2 (l % 4), 2 (l % 4) + 1 of row l / 4 of matrix m in
// r[m].
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
// The same of the transposed matrices.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// Copies the first `bytes` of 16 from global to shared memory and zeroes the rest; 0 reads nothing.
__device__ __forceinline__ void cp_async_16(void* destination, const void* source, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(destination)),
               "l"(source), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_4(void* destination, const void* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(destination)),
               "l"(source)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most N of this thread's committed groups are still on their way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Hides the value of x from the compiler: expressions of it are computed where they stand, not
// before a loop, where they would hold registers all along.
__device__ __forceinline__ int64_t optimization_barrier(int64_t x) {
  asm volatile("" : "+l"(x));
  return x;
}
__device__ __forceinline__ uint32_t optimization_barrier(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// a - b of two pairs of 16-bit numbers.
__device__ __forceinline__ uint32_t subtract_pairs(f16, uint32_t a, uint32_t b) {
  uint32_t d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ uint32_t subtract_pairs(bf16, uint32_t a, uint32_t b) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(b), "r"(0xbf80bf80u), "r"(a));
  return d;
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace tokred::cuda

#endif
