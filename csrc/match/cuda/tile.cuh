// Tiles of the match kernels: rows of a and b in shared memory, bf16 or f16 for the tensor cores.
// fp32 is split exactly into three bf16 planes x = high + middle + low; of the nine products of
// planes the six above 2^-24 are taken, so a dot product is as good as one in fp32.
#pragma once

#include "common/cuda/block.cuh"
#include "common/cuda/chunk.cuh"
#include "common/cuda/ptx.cuh"
#include "match/cuda/plan.h"
#include "match/params.h"

namespace tokred::cuda::matching {

inline constexpr float kInfinity = __builtin_huge_valf();

// kAsync: 16-bit rows at 16-byte boundaries, copied asynchronously, the next tile during this one.
// Otherwise any rows, through registers. kGeneral adds weights and the band.
template <class T, bool kAsyncCopies, bool kGeneralScores, MatchTiles kMatchTiles>
struct MatchConfig {
  using Type = T;
  static constexpr bool kAsync = kAsyncCopies, kGeneral = kGeneralScores;
  static constexpr MatchTiles kTiles = kMatchTiles;
  static constexpr int kPlanes = sizeof(T) == 4 ? 3 : 1;
  static constexpr int kStages = kAsync ? 2 : 1;
  static constexpr int kThreads = kTiles.threads(), kRows = kTiles.rows();
};

template <class T>
struct Plane { using Element = T; };
template <>
struct Plane<float> { using Element = bf16; };

template <class T, int kRows>
struct MatchTile {
  static constexpr int kPlanes = sizeof(T) == 4 ? 3 : 1;
  alignas(16) typename Plane<T>::Element plane[kPlanes][kRows][kMatchPitch];
};

// What turns dot products into scores: s(i, j) = ((dot * scale_i) * scale_j + add_i) + add_j, times
// weight_i * weight_j.
template <int kCount>
struct MatchTerms {
  float squared[kCount], scale[kCount], add[kCount], weight[kCount];
};

template <class Config>
struct MatchShared {
  MatchTile<typename Config::Type, Config::kRows> a[Config::kStages];
  MatchTile<typename Config::Type, kMatchColumns> b[Config::kStages];
  MatchTerms<Config::kRows> rows;
  MatchTerms<kMatchColumns> columns;
};

// One batch item's side of the matching.
struct Side {
  const TokenSet& set;
  int64_t item;

  // Where row t stands, or -1 where it points nowhere.
  __device__ int64_t position(int64_t t) const {
    if (t >= set.count) return -1;
    const int64_t at = set.rows ? set.rows[item * set.rows_stride_batch + t]
                                : set.first + set.step * t;
    return at >= 0 && at < set.tokens ? at : -1;
  }
  __device__ bool masked(int64_t position) const {
    return set.mask && !set.mask[item * set.mask_stride_batch + position * set.mask_stride_token];
  }
  __device__ float weight(int64_t position) const {
    if (!set.weight) return 1.0f;
    return set.weight[item * set.weight_stride_batch + position * set.weight_stride_token];
  }
  template <class T>
  __device__ const T* row(int64_t position) const {
    return static_cast<const T*>(set.data) + item * set.stride_batch + position * set.stride_token;
  }
};

// Loading ----------------------------------------------------------------------------------------

// Eight neighbours of a row.
template <class T>
struct alignas(16) Eight {
  T x[8];
};

template <class T>
__device__ __forceinline__ Eight<T> load_eight(const T* source, int count, bool aligned) {
  Eight<T> out;
  if (aligned && count == 8) {
#pragma unroll
    for (int i = 0; i < 8; i += 16 / sizeof(T)) store_chunk(&out.x[i], load_chunk(source + i));
    return out;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) out.x[i] = i < count ? source[i] : T{};
  return out;
}

// A truncated split is exact: 24 significant bits are three times 8. Non-finite numbers stay whole.
__device__ __forceinline__ void split(float x, bf16 (&part)[3]) {
  const bool finite = fabsf(x) < kInfinity;
  if (!finite) x = x == x ? x : __uint_as_float(0x7fc00000);
#pragma unroll
  for (int plane = 0; plane < 3; ++plane) {
    const uint32_t bits = __float_as_uint(x) & 0xffff0000u;
    part[plane].bits = static_cast<uint16_t>(bits >> 16);
    x = finite ? x - __uint_as_float(bits) : 0.0f;
  }
}

template <class T, int kRows>
__device__ __forceinline__ void store_eight(MatchTile<T, kRows>& tile, int row, int column,
                                            const Eight<T>& in) {
  if constexpr (sizeof(T) == 2) {
    store_chunk(&tile.plane[0][row][column], load_chunk(&in));
  } else {
    bf16 part[8][3];
#pragma unroll
    for (int i = 0; i < 8; ++i) split(in.x[i], part[i]);
#pragma unroll
    for (int plane = 0; plane < 3; ++plane) {
      Chunk chunk;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        chunk.word[i] = pack(part[2 * i][plane], part[2 * i + 1][plane]);
      }
      store_chunk(&tile.plane[plane][row][column], chunk);
    }
  }
}

// Brings 64 channels of kRows rows of one side to shared memory: fetch, then land, then a barrier.
template <class Config, int kRows>
struct Loader {
  using T = typename Config::Type;
  static constexpr int kColumns = kMatchChannels / 8;
  static constexpr int kSteps = (kRows * kColumns + Config::kThreads - 1) / Config::kThreads;
  Eight<T> staged[Config::kAsync ? 1 : kSteps];

  static __device__ __forceinline__ int place(int step) {
    return step * Config::kThreads + static_cast<int>(threadIdx.x);
  }

  __device__ __forceinline__ void fetch(MatchTile<T, kRows>& tile, const Side& side, int64_t row0,
                                        int64_t channel0, int64_t channels) {
    const TokenSet& set = side.set;
    const uint64_t strides = static_cast<uint64_t>(set.stride_batch | set.stride_token);
    const uint64_t addresses = reinterpret_cast<uintptr_t>(set.data) | sizeof(T) * strides;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int row = place(step) / kColumns, column = place(step) % kColumns * 8;
      if (row >= kRows) break;
      const int64_t position = side.position(row0 + row);
      const int64_t left = position < 0 ? 0 : channels - channel0 - column;
      const int count = left < 0 ? 0 : left < 8 ? static_cast<int>(left) : 8;
      const T* source = side.row<T>(count ? position : 0) + (count ? channel0 + column : 0);
      if constexpr (Config::kAsync) {
        cp_async_16(&tile.plane[0][row][column], source, count * static_cast<int>(sizeof(T)));
      } else {
        staged[step] = load_eight(source, count, addresses % 16 == 0);
      }
    }
  }

  __device__ __forceinline__ void land(MatchTile<T, kRows>& tile) {
    if constexpr (!Config::kAsync) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int row = place(step) / kColumns, column = place(step) % kColumns * 8;
        if (row < kRows) store_eight(tile, row, column, staged[step]);
      }
    }
  }
};

// Products ---------------------------------------------------------------------------------------

// dot[i][j] += 16 rows of a, number row0 + 16 i, times 8 rows of b, number 8 j, over 64 channels.
template <class T, int kRows, int kRowTiles>
__device__ __forceinline__ void multiply(float (&dot)[kRowTiles][kMatchColumns / 8][4],
                                         const MatchTile<T, kRows>& a,
                                         const MatchTile<T, kMatchColumns>& b, int row0) {
  constexpr int kPlanes = MatchTile<T, kRows>::kPlanes;
  using Element = typename Plane<T>::Element;
  const int lane = lane_id();
#pragma unroll 1
  for (int k = 0; k < kMatchChannels; k += 16) {
    uint32_t left[kRowTiles][kPlanes][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        ldmatrix_x4(left[i][plane], &a.plane[plane][row0 + 16 * i + lane % 16][k + lane / 16 * 8]);
      }
    }
#pragma unroll
    for (int j = 0; j < kMatchColumns / 8; j += 2) {
#pragma unroll
      for (int plane = kPlanes - 1; plane >= 0; --plane) {
        uint32_t r[4];
        ldmatrix_x4(r, &b.plane[plane][8 * j + lane % 8 + lane / 16 * 8][k + lane / 8 % 2 * 8]);
        const uint32_t right[2][2] = {{r[0], r[1]}, {r[2], r[3]}};
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
          for (int other = kPlanes - 1 - plane; other >= 0; --other) {
            mma(Element{}, dot[i][j], left[i][other], right[0]);
            mma(Element{}, dot[i][j + 1], left[i][other], right[1]);
          }
        }
      }
    }
  }
}

// The sum of squares of eight channels of a row, in order.
template <class T, int kRows>
__device__ __forceinline__ float sum_squares(const MatchTile<T, kRows>& tile, int row, int column) {
  using Element = typename Plane<T>::Element;
  Eight<Element> part[MatchTile<T, kRows>::kPlanes];
#pragma unroll
  for (int plane = 0; plane < MatchTile<T, kRows>::kPlanes; ++plane) {
    store_chunk(&part[plane], load_chunk(&tile.plane[plane][row][column]));
  }
  float sum = 0.0f;
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    float x = to_float(part[0].x[c]);
    if constexpr (sizeof(T) == 4) x += to_float(part[1].x[c]) + to_float(part[2].x[c]);
    sum = fmaf(x, x, sum);
  }
  return sum;
}

// Adds the squares of a tile's 64 channels to the rows' sums, and calls done(row, sum so far) once
// for every row. The order of the sums does not depend on the number of threads.
template <int kThreads, class T, int kRows, class Done>
__device__ __forceinline__ void add_squares(float (&squared)[kRows],
                                            const MatchTile<T, kRows>& tile, bool first,
                                            Done done) {
  constexpr int kGroups = kMatchChannels / 8, kSteps = (kRows * kGroups + kThreads - 1) / kThreads;
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
    const int place = step * kThreads + static_cast<int>(threadIdx.x);
    const int row = place / kGroups, column = place % kGroups * 8;
    float sum = row < kRows ? sum_squares(tile, row, column) : 0.0f;
    sum = warp_sum<kGroups>(sum);
    if (row < kRows && column == 0) {
      if (!first) sum += squared[row];
      squared[row] = sum;
      done(row, sum);
    }
  }
}

}  // namespace tokred::cuda::matching
