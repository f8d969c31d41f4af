// The C++ twins of csrc/common/cuda/ptx.cuh.
#pragma once

#include "common/cuda/numbers.cuh"
#include "tensor_core.h"

namespace tokred::cuda {

// Reads the fragments of all lanes, multiplies the matrices, and hands the result back.
template <class T>
void mma(T, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Argument {
    float (&d)[4];
    const uint32_t (&a)[4];
    const uint32_t (&b)[2];
  } argument{d, a, b};
  simt::collective(~0u, argument, [](Argument* const* lanes) {
    float left[16][16], right[16][8], sum[16][8];
    const auto half = [](uint32_t pair, int i) { return to_float(T{uint16_t(pair >> 16 * i)}); };
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4 * 2;
      const Argument& from = *lanes[lane];
      for (int i = 0; i < 2; ++i) {
        for (int quarter = 0; quarter < 4; ++quarter) {
          left[g + quarter % 2 * 8][t + quarter / 2 * 8 + i] = half(from.a[quarter], i);
        }
        right[t + i][g] = half(from.b[0], i);
        right[t + 8 + i][g] = half(from.b[1], i);
        sum[g][t + i] = from.d[i];
        sum[g + 8][t + i] = from.d[2 + i];
      }
    }
    for (int row = 0; row < 16; ++row) simt::add_products(sum[row], left[row], right);
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        lanes[lane]->d[i] = sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
      }
    }
  });
}

template <int kMatrices, bool kTransposed>
void ldmatrix(uint32_t (&r)[kMatrices], const void* row) {
  struct Argument {
    uint32_t (&r)[kMatrices];
    const void* row;
  } argument{r, row};
  simt::collective(~0u, argument, [](Argument* const* lanes) {
    for (int lane = 0; lane < 8 * kMatrices; ++lane) {
      const void* row = lanes[lane]->row;
      if (!simt::is_shared(row, 16)) simt::fail("ldmatrix reads outside shared memory");
      if (reinterpret_cast<uintptr_t>(row) % 16) simt::fail("ldmatrix at a misaligned address");
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < kMatrices; ++matrix) {
        const auto at = [&](int i, int j) {
          const int row = matrix * 8 + (kTransposed ? j : i), column = kTransposed ? i : j;
          return static_cast<const uint16_t*>(lanes[row]->row)[column];
        };
        const int j = lane % 4 * 2;
        lanes[lane]->r[matrix] = at(lane / 4, j) | uint32_t{at(lane / 4, j + 1)} << 16;
      }
    }
  });
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { ldmatrix<4, false>(r, row); }
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row) { ldmatrix<2, false>(r, row); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { ldmatrix<4, true>(r, row); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) { ldmatrix<2, true>(r, row); }

inline void cp_async_16(void* destination, const void* source, int bytes = 16) {
  simt::copy_async(destination, source, static_cast<unsigned>(bytes));
}
inline void cp_async_4(void* destination, const void* source) {
  simt::copy_async(destination, source, 4, 4);
}
inline void cp_async_commit() { simt::copy_commit(); }
template <int N>
void cp_async_wait() {
  simt::copy_wait(N);
}

inline int64_t optimization_barrier(int64_t x) { return x; }
inline uint32_t optimization_barrier(uint32_t x) { return x; }
template <class T>
uint32_t subtract_pairs(T, uint32_t a, uint32_t b) {
  const auto half = [](uint32_t pair, int i) { return to_float(T{uint16_t(pair >> 16 * i)}); };
  return pack_pair<T>(half(a, 0) - half(b, 0), half(a, 1) - half(b, 1));
}
inline float exp2_approx(float x) { return std::exp2(x); }

}  // namespace tokred::cuda
