// Products of a few rows with many gathered ones. Lanes are channels, so a gathered row is read
// once for all the rows that meet it, where it lies; the sum over the lanes is the tree of sum(),
// for sixteen rows at a time. No result depends on how many rows share a call.
#pragma once

#include "common/cpu/prefetch.h"
#include "common/cpu/row.h"
#include "common/cpu/sizes.h"

namespace tokred::TOKRED_ISA {

// ---- Channels -----------------------------------------------------------------------------------

// Sixteen channels in the order in which they are cheapest to widen. For bf16: the even channels,
// then the odd ones, because a pair is widened by a shift and a mask. A dot product needs the same
// order on both sides only, and store_channels() restores the natural one.
template <class T>
TOKRED_INLINE Vec<Accumulator<T>> load_channels(const T* p) {
  return load_as(p);
}
template <class T>
TOKRED_INLINE Vec<Accumulator<T>> load_half_channels(const T* p) {
  return load_half(p);
}
#ifdef __AVX2__
TOKRED_INLINE f32x16 widen_channels(__m256i raw) {
#ifdef __AVX512F__
  const __m512i shift = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi32(16), 0);
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return {(f32x16::N)_mm512_and_si512(_mm512_sllv_epi32(_mm512_broadcast_i64x4(raw), shift), high)};
#else
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {(f32x16::N)_mm256_slli_epi32(raw, 16), (f32x16::N)_mm256_and_si256(raw, high)};
#endif
}
TOKRED_INLINE f32x16 load_channels(const bf16* p) {
  return widen_channels(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
TOKRED_INLINE f32x16 load_half_channels(const bf16* p) { return widen_channels(load_half_bits(p)); }
#else
TOKRED_INLINE f32x16 load_channels(const bf16* p) {
  float lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i % 2 * 8 + i / 2] = to_float(p[i]);
  return load(lane);
}
TOKRED_INLINE f32x16 load_half_channels(const bf16* p) {
  bf16 lane[kLanes] = {};
  for (int i = 0; i < kLanes / 2; ++i) lane[i] = p[i];
  return load_channels(lane);
}
#endif

// The first `count` channels, zeros behind them.
template <class T>
TOKRED_INLINE Vec<Accumulator<T>> load_channels(const T* p, int64_t count) {
  if (count >= kLanes) return load_channels(p);
  if (count == kLanes / 2) return load_half_channels(p);
  T lane[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lane[i] = p[i];
  return load_channels(lane);
}

// Of lanes that are even channels, then odd ones.
TOKRED_INLINE f32x16 natural_order(f32x16 v) {
  float lane[kLanes], natural[kLanes];
  store(lane, v);
  for (int i = 0; i < kLanes; ++i) natural[i] = lane[i % 2 * 8 + i / 2];
  return load(natural);
}

template <class T>
TOKRED_INLINE void store_channels(T* p, Vec<Accumulator<T>> v, int64_t count) {
  store_row(p, v, count);
}
TOKRED_INLINE void store_channels(bf16* p, f32x16 v, int64_t count) {
  store_row(p, natural_order(v), count);
}

inline constexpr int64_t whole_lanes(int64_t dim) { return round_up(dim, kLanes); }

// A row times `scale`, zeros up to whole_lanes(dim).
template <class T>
TOKRED_INLINE void pack_channels(const T* from, int64_t dim, Accumulator<T> scale,
                                 Accumulator<T>* to) {
  for (int64_t c = 0; c < dim; c += kLanes) {
    store(to + c, load_channels(from + c, dim - c) * splat(scale));
  }
}

// Rows that will be needed soon, prefetched a few at a time: a burst would fill the queue of
// outstanding loads, and all other loads would wait for it.
template <class T>
struct Prefetcher {
  const T* const* rows;
  int64_t left, dim;

  void prefetch(int64_t count) {
    for (; count > 0 && left > 0; --count, --left, ++rows) {
#pragma GCC unroll 4
      for (int64_t c = 0; c < dim; c += 64 / static_cast<int64_t>(sizeof(T))) {
        prefetch_line(*rows + c);
      }
    }
  }
};

// ---- Tiles --------------------------------------------------------------------------------------

// x, in a register: GCC would repeat its load in every multiply-add that can read memory, and run
// out of load ports.
template <class R>
TOKRED_INLINE R in_register(R x) {
#ifdef __AVX2__
  asm("" : "+v"(x));
#endif
  return x;
}

// Rows whose sums a tile keeps in registers. With kKeys gathered rows, or kVecs Vecs of channels,
// they are eight registers of sums: so many cover the latency of the multiply-add.
template <class Acc>
inline constexpr int kFewRows = Vec<Acc>::kRegisters <= 2 ? 4 : 2;
template <class Acc, int kRows>
inline constexpr int kBeside =
    kRows * Vec<Acc>::kRegisters < 8 ? 8 / (kRows * Vec<Acc>::kRegisters) : 1;
template <int kRows>
inline constexpr int kPowerOfTwo = kRows > 4   ? 8
                                   : kRows > 2 ? 4
                                               : kRows;

// f.template operator()<rows>() for 1 <= rows <= kMax.
template <int kMax, class F>
TOKRED_INLINE void visit_rows(int64_t rows, const F& f) {
  if constexpr (kMax > 1) {
    if (rows < kMax) return visit_rows<kMax - 1>(rows, f);
  }
  f.template operator()<kMax>();
}

// The sums of the lanes of sixteen Vecs [16][16], each by the tree of sum(), four or eight at once.
template <class Acc>
TOKRED_INLINE Vec<Acc> sum_each(const Acc* vecs) {
  Acc total[kLanes];
  if constexpr (kRegisterBytes < 4 * static_cast<int>(sizeof(Acc))) {
    for (int i = 0; i < kLanes; ++i) total[i] = sum(load(vecs + i * kLanes));
    return load(total);
  } else {
    constexpr bool kEight = kRegisterBytes >= 8 * static_cast<int>(sizeof(Acc));
    typedef Acc Wide __attribute__((vector_size((kEight ? 8 : 4) * sizeof(Acc))));
    using Index = decltype(Wide{} < Wide{});
    const auto at = [&](int i) {
      Wide x;
      std::memcpy(&x, vecs + i, sizeof x);
      return x;
    };
    for (int first = 0; first < kLanes; first += kEight ? 8 : 4) {
      Wide four[4], two[2], one;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int vec = (first + i) * kLanes;
        if constexpr (kEight) {
          const Wide a = at(vec) + at(vec + 8), b = at(vec + 4 * kLanes) + at(vec + 4 * kLanes + 8);
          four[i] = __builtin_shuffle(a, b, Index{0, 1, 2, 3, 8, 9, 10, 11}) +
                    __builtin_shuffle(a, b, Index{4, 5, 6, 7, 12, 13, 14, 15});
        } else {
          four[i] = (at(vec) + at(vec + 8)) + (at(vec + 4) + at(vec + 12));
        }
      }
      if constexpr (kEight) {
        constexpr Index kLow = {0, 1, 8, 9, 4, 5, 12, 13}, kHigh = {2, 3, 10, 11, 6, 7, 14, 15};
        constexpr Index kEven = {0, 2, 8, 10, 4, 6, 12, 14}, kOdd = {1, 3, 9, 11, 5, 7, 13, 15};
        two[0] =
            __builtin_shuffle(four[0], four[1], kLow) + __builtin_shuffle(four[0], four[1], kHigh);
        two[1] =
            __builtin_shuffle(four[2], four[3], kLow) + __builtin_shuffle(four[2], four[3], kHigh);
        one = __builtin_shuffle(two[0], two[1], kEven) + __builtin_shuffle(two[0], two[1], kOdd);
      } else {
        constexpr Index kLow = {0, 1, 4, 5}, kHigh = {2, 3, 6, 7};
        constexpr Index kEven = {0, 2, 4, 6}, kOdd = {1, 3, 5, 7};
        two[0] =
            __builtin_shuffle(four[0], four[1], kLow) + __builtin_shuffle(four[0], four[1], kHigh);
        two[1] =
            __builtin_shuffle(four[2], four[3], kLow) + __builtin_shuffle(four[2], four[3], kHigh);
        one = __builtin_shuffle(two[0], two[1], kEven) + __builtin_shuffle(two[0], two[1], kOdd);
      }
      std::memcpy(total + first, &one, sizeof one);
    }
    return load(total);
  }
}

// partial[row][16][16 lanes]: the lane sums of kRows packed rows with kKeys gathered ones. The
// registers of a Vec go one after the other, so that each load serves several multiply-adds.
template <int kRows, int kKeys, class T>
TOKRED_INLINE void dot_tile(const Accumulator<T>* x, int64_t x_stride, const T* const* y,
                            int64_t dim, Accumulator<T>* partial) {
  using Acc = Accumulator<T>;
  constexpr int kWidth = Vec<Acc>::kWidth;
#pragma GCC unroll 4
  for (int part = 0; part < Vec<Acc>::kRegisters; ++part) {
    Register<Acc> sum[kRows][kKeys];
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
      for (int key = 0; key < kKeys; ++key) sum[row][key] = Register<Acc>{};
    }
    const auto add = [&](int64_t c, const auto& channels) {
      Register<Acc> k[kKeys];
#pragma GCC unroll 8
      for (int key = 0; key < kKeys; ++key) k[key] = channels(y[key] + c).r[part];
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
        const Register<Acc> q = in_register(load(x + row * x_stride + c).r[part]);
#pragma GCC unroll 8
        for (int key = 0; key < kKeys; ++key) {
          sum[row][key] = fma(k[key], q, sum[row][key]);
        }
      }
    };
    int64_t c = 0;
    for (; c + kLanes <= dim; c += kLanes) add(c, [](const T* p) { return load_channels(p); });
    if (c < dim) add(c, [&](const T* p) { return load_channels(p, dim - c); });
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
      for (int key = 0; key < kKeys; ++key) {
        std::memcpy(partial + (row * kLanes + key) * kLanes + part * kWidth, &sum[row][key],
                    sizeof sum[row][key]);
      }
    }
  }
}

// out[row][i] = x_row . y_i for i < whole_lanes(count); y has pointers that far.
template <class T>
__attribute__((noinline)) static void dot_rows(const Accumulator<T>* x, int64_t x_stride,
                                               int64_t rows, const T* const* y, int64_t count,
                                               int64_t dim, Accumulator<T>* out, int64_t out_stride,
                                               Prefetcher<T> prefetcher = {}) {
  using Acc = Accumulator<T>;
  alignas(64) Acc partial[kFewRows<Acc> * kLanes * kLanes];
  for (int64_t key = 0; key < count; key += kLanes) {
    for (int64_t row = 0; row < rows; row += kFewRows<Acc>) {
      visit_rows<kFewRows<Acc>>(rows - row, [&]<int kRows>() {
        constexpr int kKeys = 8 / kPowerOfTwo<kRows>;
        for (int i = 0; i < kLanes; i += kKeys) {
          prefetcher.prefetch(row == 0 ? kKeys : 0);
          dot_tile<kRows, kKeys>(x + row * x_stride, x_stride, y + key + i, dim,
                                 partial + i * kLanes);
        }
        for (int r = 0; r < kRows; ++r) {
          store(out + (row + r) * out_stride + key, sum_each(partial + r * kLanes * kLanes));
        }
      });
    }
  }
}

// out_row = out_row * factor_row + the sum, in order, of weights[row][i] y_i, for kVecs Vecs.
template <int kRows, int kVecs, class T, class Load>
TOKRED_INLINE void add_tile(const Accumulator<T>* weights, int64_t weight_stride, const T* const* y,
                            int64_t count, int64_t c, const Accumulator<T>* factor,
                            Accumulator<T>* out, int64_t out_stride, const Load& channels) {
  using Acc = Accumulator<T>;
  Vec<Acc> sum[kRows][kVecs];
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      sum[row][v] = load(out + row * out_stride + c + v * kLanes) * splat(factor[row]);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    Vec<Acc> x[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) x[v] = channels(y[i] + c + v * kLanes);
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const Vec<Acc> weight = splat(weights[row * weight_stride + i]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) sum[row][v] = fma(weight, x[v], sum[row][v]);
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      store(out + row * out_stride + c + v * kLanes, sum[row][v]);
    }
  }
}

// The same for one row of weights, but weights of exactly 0 are skipped, so that 0 times an
// infinity or NaN adds nothing. Equal bits where all are finite.
template <class T>
__attribute__((noinline)) static void add_nonzero(const Accumulator<T>* weights, const T* const* y,
                                                  int64_t count, int64_t dim, Accumulator<T> factor,
                                                  Accumulator<T>* out) {
  for (int64_t c = 0; c < dim; c += kLanes) {
    auto sum = load(out + c) * splat(factor);
    for (int64_t i = 0; i < count; ++i) {
      if (weights[i] != 0) sum = fma(splat(weights[i]), load_channels(y[i] + c, dim - c), sum);
    }
    store(out + c, sum);
  }
}

// The same for all rows and channels; out rows have whole_lanes(dim) numbers. Sixteen gathered rows
// at a time: their pages stay in the first-level TLB, and they in the first-level cache.
template <class T>
__attribute__((noinline)) static void add_rows(const Accumulator<T>* weights, int64_t weight_stride,
                                               int64_t rows, const T* const* y, int64_t count,
                                               int64_t dim, const Accumulator<T>* factor,
                                               Accumulator<T>* out, int64_t out_stride,
                                               Prefetcher<T> prefetcher = {}) {
  using Acc = Accumulator<T>;
  constexpr Acc kOne[4] = {1, 1, 1, 1};
  const auto whole = [](const T* p) { return load_channels(p); };
  for (int64_t first = 0; first < count; first += kLanes) {
    const int64_t here = count - first < kLanes ? count - first : kLanes;
    for (int64_t row = 0; row < rows; row += kFewRows<Acc>) {
      visit_rows<kFewRows<Acc>>(rows - row, [&]<int kRows>() {
        constexpr int kVecs = kBeside<Acc, kPowerOfTwo<kRows>>;
        const auto tile = [&]<int kCount>(int64_t c, const auto& channels) {
          add_tile<kRows, kCount>(weights + row * weight_stride + first, weight_stride, y + first,
                                  here, c, first == 0 ? factor + row : kOne, out + row * out_stride,
                                  out_stride, channels);
        };
        const int64_t share = row == 0 ? (kLanes * kVecs * kLanes + dim - 1) / dim : 0;
        int64_t c = 0;
        for (; c + kVecs * kLanes <= dim; c += kVecs * kLanes) {
          prefetcher.prefetch(share);
          tile.template operator()<kVecs>(c, whole);
        }
        for (; c + kLanes <= dim; c += kLanes) tile.template operator()<1>(c, whole);
        if (c < dim) {
          tile.template operator()<1>(c, [&](const T* p) { return load_channels(p, dim - c); });
        }
      });
    }
  }
  prefetcher.prefetch(prefetcher.left);
}

}  // namespace tokred::TOKRED_ISA
