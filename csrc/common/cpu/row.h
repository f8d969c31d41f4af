// Rows of channels: partial loads and stores, conversion, transposition, and norms and dot products
// with a fixed summation order.
#pragma once

#include "common/cpu/copy.h"
#include "common/cpu/storage.h"

namespace tokred::TOKRED_ISA {

// Eight values, zeros behind them: the end of rows whose length is a multiple of eight.
template <class T>
TOKRED_INLINE Vec<Accumulator<T>> load_half(const T* p) {
  T lane[kLanes] = {};
  for (int i = 0; i < kLanes / 2; ++i) lane[i] = p[i];
  return load_as(lane);
}
#if defined(__AVX512F__)
TOKRED_INLINE f32x16 load_half(const float* p) {
  return {(f32x16::N)_mm512_zextps256_ps512(_mm256_loadu_ps(p))};
}
#elif defined(__AVX2__)
TOKRED_INLINE f32x16 load_half(const float* p) {
  return {(f32x16::N)_mm256_loadu_ps(p), f32x16::N{}};
}
#endif
#ifdef __AVX2__
TOKRED_INLINE __m256i load_half_bits(const void* p) {
  return _mm256_zextsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
TOKRED_INLINE f32x16 load_half(const bf16* p) { return widen_bf16(load_half_bits(p)); }
TOKRED_INLINE f32x16 load_half(const f16* p) { return widen_f16(load_half_bits(p)); }
#endif

// The first `count` <= 16 values, zeros behind them.
template <class T>
TOKRED_INLINE Vec<Accumulator<T>> load_row(const T* p, int64_t count) {
  if (count >= kLanes) return load_as(p);
  if (count == kLanes / 2) return load_half(p);
  T lane[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lane[i] = p[i];
  return load_as(lane);
}
template <class T>
TOKRED_INLINE void store_row(T* p, Vec<Accumulator<T>> v, int64_t count) {
  if (count >= kLanes) {
    store_as(p, v);
    return;
  }
  T lane[kLanes];
  store_as(lane, v);
  for (int64_t i = 0; i < count; ++i) p[i] = lane[i];
}

// Sixteen partial sums over the channels, then one tree.
template <class T>
TOKRED_INLINE Accumulator<T> dot_row(const T* x, const T* y, int64_t channels) {
  auto total = splat(Accumulator<T>(0));
  for (int64_t c = 0; c < channels; c += kLanes) {
    total = fma(load_row(x + c, channels - c), load_row(y + c, channels - c), total);
  }
  return sum(total);
}
template <class T>
TOKRED_INLINE Accumulator<T> squared_norm(const T* x, int64_t channels) {
  return dot_row(x, x, channels);
}

// 1 / |x| from |x|^2, with |x| clamped from below: a zero row stays zero.
TOKRED_INLINE float inverse_norm(float squared) {
  const float norm = __builtin_sqrtf(squared);
  return 1.0f / (norm < kNormEps ? kNormEps : norm);
}

// A row in the accumulator type.
template <class T>
TOKRED_INLINE void pack_row(const T* from, int64_t dim, Accumulator<T>* to) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(to + d, load_as(from + d));
  for (; d < dim; ++d) to[d] = to_float(from[d]);
}

// The same, times `scale`.
template <class T>
TOKRED_INLINE void pack_scaled(const T* from, int64_t dim, Accumulator<T> scale,
                               Accumulator<T>* to) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(to + d, load_as(from + d) * splat(scale));
  for (; d < dim; ++d) to[d] = to_float(from[d]) * scale;
}

template <class T, int kCount>
using Wide __attribute__((vector_size(kCount * sizeof(T)))) = T;

// Four rows of four.
template <class T>
TOKRED_INLINE void transpose(Wide<T, 4> (&x)[4]) {
  using Index = decltype(x[0] < x[0]);
  constexpr Index kLow = {0, 4, 1, 5}, kHigh = {2, 6, 3, 7};
  const auto even_low = __builtin_shuffle(x[0], x[2], kLow);
  const auto even_high = __builtin_shuffle(x[0], x[2], kHigh);
  const auto odd_low = __builtin_shuffle(x[1], x[3], kLow);
  const auto odd_high = __builtin_shuffle(x[1], x[3], kHigh);
  x[0] = __builtin_shuffle(even_low, odd_low, kLow);
  x[1] = __builtin_shuffle(even_low, odd_low, kHigh);
  x[2] = __builtin_shuffle(even_high, odd_high, kLow);
  x[3] = __builtin_shuffle(even_high, odd_high, kHigh);
}
// Eight rows of eight: exchanges numbers, then pairs, then fours.
template <class T>
TOKRED_INLINE void transpose(Wide<T, 8> (&x)[8]) {
  using Index = decltype(x[0] < x[0]);
  const auto exchange = [&](int step, Index low, Index high) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      if (i & step) continue;
      const auto a = x[i], b = x[i + step];
      x[i] = __builtin_shuffle(a, b, low);
      x[i + step] = __builtin_shuffle(a, b, high);
    }
  };
  exchange(1, Index{0, 8, 2, 10, 4, 12, 6, 14}, Index{1, 9, 3, 11, 5, 13, 7, 15});
  exchange(2, Index{0, 1, 8, 9, 4, 5, 12, 13}, Index{2, 3, 10, 11, 6, 7, 14, 15});
  exchange(4, Index{0, 1, 2, 3, 8, 9, 10, 11}, Index{4, 5, 6, 7, 12, 13, 14, 15});
}

// from [rows][columns] to [columns][rows], both without gaps, as far as whole squares of kSide
// reach; the rest, below `row_end` and right of `column_end`, number by number.
template <class Acc>
TOKRED_INLINE void transpose(const Acc* from, int64_t rows, int64_t columns, Acc* to) {
  constexpr int kSide = kRegisterBytes >= 8 * static_cast<int>(sizeof(Acc)) ? 8 : 4;
  const int64_t row_end = rows / kSide * kSide, column_end = columns / kSide * kSide;
  for (int64_t row = 0; row < row_end; row += kSide) {
    for (int64_t column = 0; column < column_end; column += kSide) {
      Wide<Acc, kSide> x[kSide];
#pragma GCC unroll 8
      for (int i = 0; i < kSide; ++i) {
        std::memcpy(&x[i], from + (row + i) * columns + column, sizeof x[i]);
      }
      transpose<Acc>(x);
#pragma GCC unroll 8
      for (int i = 0; i < kSide; ++i) {
        std::memcpy(to + (column + i) * rows + row, &x[i], sizeof x[i]);
      }
    }
    for (int64_t column = column_end; column < columns; ++column) {
      for (int i = 0; i < kSide; ++i) {
        to[column * rows + row + i] = from[(row + i) * columns + column];
      }
    }
  }
  for (int64_t row = row_end; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      to[column * rows + row] = from[row * columns + column];
    }
  }
}

}  // namespace tokred::TOKRED_ISA
