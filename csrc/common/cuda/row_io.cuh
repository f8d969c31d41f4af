// Rows in global memory, to and from registers in f32: rows of any length, walked by a warp, and
// rows of up to 256 elements, shared out over some of its lanes.
#pragma once

#include "common/cuda/chunk.cuh"
#include "common/cuda/warp.cuh"
#include "common/types.h"

namespace tokred::cuda {

// Whether every row of t starts at a multiple of 16 bytes.
template <class T>
__host__ __device__ __forceinline__ bool is_aligned(const HeadTensor& t) {
  return is_aligned(t.data, t.stride_batch | t.stride_head | t.stride_token, sizeof(T));
}
__device__ __forceinline__ bool is_aligned(const HeadTensor& t, DType dtype) {
  return dtype == DType::f32 ? is_aligned<float>(t) : is_aligned<bf16>(t);
}

// Rows of any length -----------------------------------------------------------------------------
//
// A lane reads 16 bytes at a time where rows are aligned, one element at a time otherwise. A lane
// that sums over channels reads the elements of the same 16 bytes one by one (Loose) where rows are
// not aligned, so that a view gives the bits of its copy.

// An element of rows that are not aligned to 16 bytes.
template <class T>
struct Loose {
  T value;
};

// Neighbouring channels as stored: as many as 16 bytes hold, or one. In rows that are not aligned
// load and store touch only the `left` channels that the row still has.
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

// Rows of up to 256 elements, eight neighbours to a lane -----------------------------------------

// Elements first .. first + 7 of rows of `dim`, zeros beyond their ends; a null row is all zeros.
// All the loads are on their way before the first is waited for.
template <int kCount, class T>
__device__ __forceinline__ void load_rows(float (&x)[kCount][8], const T* const (&row)[kCount],
                                          int first, int dim, bool aligned) {
  if (!aligned || first + 8 > dim) {
#pragma unroll
    for (int i = 0; i < 8 * kCount; ++i) {
      const T* source = row[i / 8];
      const int column = first + i % 8;
      x[i / 8][i % 8] = source && column < dim ? to_float(source[column]) : 0.0f;
    }
    return;
  }
  constexpr int kPart = 16 / sizeof(T), kParts = 8 / kPart;
  Chunk bits[kCount][kParts];
#pragma unroll
  for (int i = 0; i < kCount * kParts; ++i) {
    const T* source = row[i / kParts];
    Chunk& chunk = bits[i / kParts][i % kParts];
    chunk = {};
    if (source) chunk = load_chunk(source + first + i % kParts * kPart);
  }
#pragma unroll
  for (int i = 0; i < 8 * kCount; ++i) {
    const Chunk& chunk = bits[i / 8][i % 8 / kPart];
    const int place = i % kPart;
    if constexpr (sizeof(T) == 4) {
      x[i / 8][i % 8] = __uint_as_float(chunk.word[place]);
    } else {
      const auto half = static_cast<uint16_t>(chunk.word[place / 2] >> 16 * (place % 2));
      x[i / 8][i % 8] = to_float(T{half});
    }
  }
}

// The same of rows of a dtype known at run time; offset[i] is where row i starts in `data`, in
// elements, negative for a row of zeros.
template <int kCount>
__device__ __forceinline__ void load_rows(float (&x)[kCount][8], const void* data, DType dtype,
                                          const int64_t (&offset)[kCount], int first, int dim,
                                          bool aligned) {
  const auto load = [&]<class T>(const T* base) {
    const T* row[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) row[i] = offset[i] < 0 ? nullptr : base + offset[i];
    load_rows(x, row, first, dim, aligned);
  };
  switch (dtype) {
    case DType::f16: return load(static_cast<const f16*>(data));
    case DType::bf16: return load(static_cast<const bf16*>(data));
    default: return load(static_cast<const float*>(data));
  }
}

// Stores elements first .. first + 7 of a row of `dim`, a multiple of eight.
template <class T>
__device__ __forceinline__ void store_eight(T* row, int first, int dim, bool aligned,
                                            const float (&x)[8]) {
  if (first >= dim) return;
  constexpr int kPart = 16 / sizeof(T);
#pragma unroll
  for (int part = 0; part < 8; part += kPart) {
    Chunk chunk;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        chunk.word[i] = __float_as_uint(x[part + i]);
      } else {
        chunk.word[i] = pack_pair<T>(x[2 * i], x[2 * i + 1]);
      }
    }
    if (aligned) store_chunk(row + first + part, chunk);
  }
  if (aligned) return;
#pragma unroll
  for (int i = 0; i < 8; ++i) row[first + i] = from_float<T>(x[i]);
}

// Sums kCount numbers a lane over groups of kLanes lanes. The results are shared out: lane l of a
// group gets those from number l * kCount / kLanes on, at the front of x.
template <int kLanes, int kCount, int kStep = kLanes / 2, int kSize>
__device__ __forceinline__ void sum_and_share(float (&x)[kSize]) {
  if constexpr (kStep > 0 && kCount > 1) {
    const bool upper = lane_id() & kStep;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const float sent = upper ? x[i] : x[i + kCount / 2];
      const float kept = upper ? x[i + kCount / 2] : x[i];
      x[i] = kept + __shfl_xor_sync(kAllLanes, sent, kStep);
    }
    sum_and_share<kLanes, kCount / 2, kStep / 2>(x);
  } else if constexpr (kStep > 0) {
    x[0] += __shfl_xor_sync(kAllLanes, x[0], kStep);
    sum_and_share<kLanes, 1, kStep / 2>(x);
  }
}

}  // namespace tokred::cuda
