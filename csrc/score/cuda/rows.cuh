// Rows of up to 256 elements, shared out over some lanes of a warp, eight neighbours to a lane, and
// the sums of their products.
#pragma once

#include "common/cuda/chunk.cuh"
#include "common/cuda/warp.cuh"
#include "score/cuda/plan.h"
#include "score/params.h"

namespace tokred::cuda::scoring {

inline constexpr float kInfinity = __builtin_huge_valf();

// Whether every row of t starts at a multiple of 16 bytes.
__device__ __forceinline__ bool is_aligned(const HeadTensor& t, DType dtype) {
  const int64_t strides = t.stride_batch | t.stride_head | t.stride_token;
  const int64_t bytes = strides * (dtype == DType::f32 ? 4 : 2);
  return ((reinterpret_cast<uintptr_t>(t.data) | static_cast<uint64_t>(bytes)) & 15) == 0;
}

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

// The greater of two numbers, NaN where either is.
__device__ __forceinline__ float greater(float x, float y) { return y > x || y != y ? y : x; }
__device__ __forceinline__ float lesser(float x, float y) { return y < x || y != y ? y : x; }

}  // namespace tokred::cuda::scoring
