// A warp walks a row of channels: each lane takes 16 bytes at a time where rows are aligned, one
// element otherwise, or, where it sums over channels, the same elements of Loose rows: so a view
// that is not aligned has the sums of its copy.
#pragma once

#include "common/cuda/chunk.cuh"
#include "common/cuda/warp.cuh"

namespace tokred::cuda::merging {

// An element of rows that are not aligned to 16 bytes.
template <class T>
struct Loose {
  T value;
};

// Neighbouring channels as stored: as many as 16 bytes hold, or one. Of a row that is not aligned
// `left` channels are left.
template <class T, int kWidth>
struct Piece {
  static_assert(kWidth * sizeof(T) == 16);
  Chunk bits;

  __device__ __forceinline__ void load(const T* p, int64_t) { bits = load_chunk(p); }
  __device__ __forceinline__ void store(T* p, int64_t) const { store_chunk(p, bits); }
  __device__ __forceinline__ float get(int i) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(bits.word[i]);
    } else {
      return to_float(T{static_cast<uint16_t>(bits.word[i / 2] >> 16 * (i % 2))});
    }
  }
  __device__ __forceinline__ void set(const float (&x)[kWidth]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        bits.word[i] = __float_as_uint(x[i]);
      } else {
        bits.word[i] = pack_pair<T>(x[2 * i], x[2 * i + 1]);
      }
    }
  }
};
template <class T>
struct Piece<T, 1> {
  T value;

  __device__ __forceinline__ void load(const T* p, int64_t) { value = *p; }
  __device__ __forceinline__ void store(T* p, int64_t) const { *p = value; }
  __device__ __forceinline__ float get(int) const { return to_float(value); }
  __device__ __forceinline__ void set(const float (&x)[1]) { value = from_float<T>(x[0]); }
};
template <class T, int kWidth>
struct Piece<Loose<T>, kWidth> {
  T value[kWidth];

  __device__ __forceinline__ void load(const Loose<T>* p, int64_t left) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) value[i] = i < left ? p[i].value : T{};
  }
  __device__ __forceinline__ void store(Loose<T>* p, int64_t left) const {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (i < left) p[i].value = value[i];
    }
  }
  __device__ __forceinline__ float get(int i) const { return to_float(value[i]); }
  __device__ __forceinline__ void set(const float (&x)[kWidth]) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) value[i] = from_float<T>(x[i]);
  }
};

// The part of a row that a warp has in registers at once: kPieces pieces a lane.
template <class T, int kWidth, int kPieces>
struct Part {
  static constexpr int kChannels = kPieces * kWarp * kWidth;
  Piece<T, kWidth> piece[kPieces];

  // f(n) for every piece of this lane that the row reaches; `offset` is where piece n lies.
  template <class F>
  static __device__ __forceinline__ void each(int64_t first, int64_t channels, F f) {
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      const int64_t offset = first + (n * kWarp + lane_id()) * kWidth;
      if (offset < channels) f(n, offset);
    }
  }
  // Zeros where the row does not reach.
  __device__ __forceinline__ void load(const T* row, int64_t first, int64_t channels) {
#pragma unroll
    for (int n = 0; n < kPieces; ++n) piece[n] = {};
    each(first, channels,
         [&](int n, int64_t offset) { piece[n].load(row + offset, channels - offset); });
  }
  __device__ __forceinline__ void store(T* row, int64_t first, int64_t channels) const {
    each(first, channels,
         [&](int n, int64_t offset) { piece[n].store(row + offset, channels - offset); });
  }
};

// The same part in fp32.
template <int kWidth, int kPieces>
struct Values {
  float at[kPieces][kWidth];

  template <class F>
  __device__ __forceinline__ void fill(F f) {
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) at[n][i] = f(n, i);
    }
  }
  template <class T>
  __device__ __forceinline__ void store(T* row, int64_t first, int64_t channels) const {
    Part<T, kWidth, kPieces>::each(first, channels, [&](int n, int64_t offset) {
      Piece<T, kWidth> piece;
      piece.set(at[n]);
      piece.store(row + offset, channels - offset);
    });
  }
};

template <int kWidth, class T>
__device__ __forceinline__ void copy_row(T* to, const T* from, int64_t channels) {
  using RowPart = Part<T, kWidth, 4>;
  for (int64_t c = 0; c < channels; c += RowPart::kChannels) {
    RowPart part;
    part.load(from, c, channels);
    part.store(to, c, channels);
  }
}

template <int kWidth, class T>
__device__ __forceinline__ void zero_row(T* to, int64_t channels) {
  Values<kWidth, 4> zeros;
  zeros.fill([](int, int) { return 0.0f; });
  for (int64_t c = 0; c < channels; c += Part<T, kWidth, 4>::kChannels) {
    zeros.store(to, c, channels);
  }
}

// a . b, summed lane by lane in ascending channels and then over the lanes.
template <int kWidth, class T>
__device__ __forceinline__ float dot_rows(const T* a, const T* b, int64_t channels) {
  using RowPart = Part<T, kWidth, 4>;
  float sum = 0.0f;
  for (int64_t c = 0; c < channels; c += RowPart::kChannels) {
    RowPart left, right;
    left.load(a, c, channels);
    right.load(b, c, channels);
    RowPart::each(c, channels, [&](int n, int64_t) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        sum = fmaf(left.piece[n].get(i), right.piece[n].get(i), sum);
      }
    });
  }
  return warp_sum(sum);
}

}  // namespace tokred::cuda::merging
