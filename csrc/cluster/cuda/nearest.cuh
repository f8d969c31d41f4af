// The nearest centroid of every token: 128 tokens by 64 centroids a block, eight by four in the
// registers of a thread, in fp32 FMA, channels in order; every lane keeps the best of its columns.
//
// N = 65536, K = 256, C = 64 on an H200: 2.1 GFLOP, 32 us at 67 TFLOP/s; 17 MB of fp32 tokens, 3.5
// us at 4.8 TB/s.
#pragma once

#include "cluster/cuda/plan.h"
#include "cluster/params.h"
#include "common/cuda/block.cuh"
#include "common/cuda/row_io.cuh"

namespace tokred::cuda::clustering {

// What an item does in a round.
enum Round : int32_t { kMoving, kLastAssignment, kDone };

struct NearestParams : ClusterTokens {
  const float* centroids;  // f32 [B, K, C]
  const float* offset;  // f32 [B, K] added to the products: -|c|^2 / 2 or 0; -inf: never chosen
  const int32_t* round;  // i32 [B] a Round, or null
  const int32_t* owner;  // i32 [B, N] clusters that tokens belong to whatever is nearest, or -1;
                         // or null
  int32_t* assignment;  // i32 [B, N]
  int32_t* counts;  // i32 [B, K] to add to, or null
};

struct NearestShared {
  float tokens[kNearestChannels][raw_pitch(kNearestTokens)];
  float centroids[kNearestChannels][raw_pitch(kNearestClusters)];
};
static_assert(sizeof(NearestShared) == kNearestBytes);

template <class T>
__device__ __forceinline__ const T* token_row(const ClusterTokens& t, int64_t item, int64_t token) {
  return static_cast<const T*>(t.x) + item * t.stride_batch + token * t.stride_token;
}
__device__ __forceinline__ bool is_masked(const ClusterTokens& t, int64_t item, int64_t token) {
  return t.mask && !t.mask[item * t.mask_stride_batch + token * t.mask_stride_token];
}

// Tokens [token0, token0 + 128) of an item against all its centroids.
template <class T>
struct NearestTile {
  static constexpr int kRows = 8, kColumns = 4;  // of a thread
  static constexpr int kLaneColumns = kNearestClusters / kColumns;  // lanes that share their rows
  static_assert(kNearestThreads / kLaneColumns * kRows == kNearestTokens);

  const NearestParams& p;
  NearestShared& s;
  int64_t item, token0;
  int row0, column0;  // of this thread in the tile
  bool aligned;
  float token[1][8], centroid[4];  // on their way to shared memory
  float best[kRows];
  int index[kRows];

  __device__ NearestTile(const NearestParams& p, NearestShared& s, int64_t item, int64_t token0)
      : p(p), s(s), item(item), token0(token0),
        row0(static_cast<int>(threadIdx.x) / kLaneColumns * kRows),
        column0(static_cast<int>(threadIdx.x) % kLaneColumns * kColumns),
        aligned(is_aligned(p.x, p.stride_batch | p.stride_token, sizeof(T))) {}

  // Each thread brings eight channels of a token, and four of a centroid.
  static __device__ __forceinline__ int loaded_token() {
    return static_cast<int>(threadIdx.x) % kNearestTokens;
  }
  static __device__ __forceinline__ int token_channel() {
    return static_cast<int>(threadIdx.x) / kNearestTokens * 8;
  }
  static __device__ __forceinline__ int loaded_centroid() {
    return static_cast<int>(threadIdx.x) % kNearestClusters;
  }
  static __device__ __forceinline__ int centroid_channel() {
    return static_cast<int>(threadIdx.x) / kNearestClusters * 4;
  }
  static_assert(kNearestThreads / kNearestTokens * 8 == kNearestChannels);
  static_assert(kNearestThreads / kNearestClusters * 4 == kNearestChannels);

  __device__ __forceinline__ void prefetch(int64_t cluster0, int64_t channel0) {
    const int64_t i = token0 + loaded_token(), first = channel0 + token_channel();
    const int64_t left = i < p.tokens ? p.channels - first : 0;
    const T* row[1] = {left > 0 ? token_row<T>(p, item, i) + first : nullptr};
    load_rows(token, row, 0, left > 8 ? 8 : static_cast<int>(left), aligned);
    const int64_t k = cluster0 + loaded_centroid(), c = channel0 + centroid_channel();
    const float* from = p.centroids + (item * p.clusters + k) * p.channels + c;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      centroid[j] = k < p.clusters && c + j < p.channels ? from[j] : 0.0f;
    }
  }
  __device__ __forceinline__ void store_prefetched() {
#pragma unroll
    for (int j = 0; j < 8; ++j) s.tokens[token_channel() + j][loaded_token()] = token[0][j];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      s.centroids[centroid_channel() + j][loaded_centroid()] = centroid[j];
    }
  }

  __device__ __forceinline__ void multiply(float (&dot)[kRows][kColumns]) {
#pragma unroll 4
    for (int c = 0; c < kNearestChannels; ++c) {
      const float4 low = *reinterpret_cast<const float4*>(&s.tokens[c][row0]);
      const float4 high = *reinterpret_cast<const float4*>(&s.tokens[c][row0 + 4]);
      const float4 right = *reinterpret_cast<const float4*>(&s.centroids[c][column0]);
      const float rows[kRows] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      const float columns[kColumns] = {right.x, right.y, right.z, right.w};
#pragma unroll
      for (int i = 0; i < kRows * kColumns; ++i) {
        float& sum = dot[i / kColumns][i % kColumns];
        sum = fmaf(rows[i / kColumns], columns[i % kColumns], sum);
      }
    }
  }

  __device__ __forceinline__ void update(const float (&dot)[kRows][kColumns], int64_t cluster0) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int64_t k = cluster0 + column0 + j;
      const float offset = k < p.clusters ? p.offset[item * p.clusters + k] : -kInfinity;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float score = dot[i][j] + offset;
        if (score > best[i]) {
          best[i] = score;
          index[i] = static_cast<int>(k);
        }
      }
    }
  }

  // The best of the lanes that share rows; the lowest cluster of equals.
  __device__ __forceinline__ void write() {
    auto& assigned = reinterpret_cast<int (&)[kNearestTokens]>(s);
    __syncthreads();  // the tiles have been read
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int step = kLaneColumns / 2; step > 0; step /= 2) {
        const float other = __shfl_xor_sync(kAllLanes, best[i], step);
        const int other_index = __shfl_xor_sync(kAllLanes, index[i], step);
        if (other > best[i] || (other == best[i] && other_index < index[i])) {
          best[i] = other;
          index[i] = other_index;
        }
      }
      if (column0 == 0) assigned[row0 + i] = best[i] - best[i] == 0.0f ? index[i] : -1;
    }
    __syncthreads();
    if (threadIdx.x < kNearestTokens) {
      const int64_t i = token0 + static_cast<int>(threadIdx.x);
      int cluster = -1;
      if (i < p.tokens && !is_masked(p, item, i)) cluster = assigned[threadIdx.x];
      if (p.owner && i < p.tokens && p.owner[item * p.tokens + i] >= 0) {
        cluster = p.owner[item * p.tokens + i];
      }
      if (i < p.tokens) p.assignment[item * p.tokens + i] = cluster;
      if (p.counts) {
        const unsigned peers = __match_any_sync(kAllLanes, cluster);
        if (cluster >= 0 && lanes_before(peers) == 0) {
          atomicAdd(&p.counts[item * p.clusters + cluster], __popc(peers));
        }
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ void run() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      best[i] = -kInfinity;
      index[i] = -1;
    }
    const int64_t chunks = (p.channels + kNearestChannels - 1) / kNearestChannels;
    for (int64_t cluster0 = 0; cluster0 < p.clusters; cluster0 += kNearestClusters) {
      float dot[kRows][kColumns];
#pragma unroll
      for (int i = 0; i < kRows * kColumns; ++i) dot[i / kColumns][i % kColumns] = 0.0f;
      if (chunks > 0) prefetch(cluster0, 0);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        __syncthreads();  // the tiles may be overwritten
        store_prefetched();
        __syncthreads();
        if (chunk + 1 < chunks) prefetch(cluster0, (chunk + 1) * kNearestChannels);
        multiply(dot);
      }
      update(dot, cluster0);
    }
    write();
  }
};

template <class T>
__global__ void __launch_bounds__(kNearestThreads)
    nearest_kernel(const __grid_constant__ NearestParams p) {
  auto& shared = shared_memory<NearestShared>();
  const int64_t tiles = (p.tokens + kNearestTokens - 1) / kNearestTokens;
  for (int64_t block = blockIdx.x; block < p.batch * tiles; block += gridDim.x) {
    const int64_t item = block / tiles;
    if (p.round && p.round[item] == kDone) continue;
    NearestTile<T>(p, shared, item, block % tiles * kNearestTokens).run();
  }
}

// Sums of sixteen lanes ------------------------------------------------------------------------
//
// As on the CPU: channel c belongs to lane c % 16, whose sum runs over its channels in order; then
// halves are added. So both give the same bits. Only the lower half of the warp is at work.

// f(channel) for each channel of this lane.
template <class F>
__device__ __forceinline__ void each_channel(int64_t channels, F f) {
  if (lane_id() < 16) {
    for (int64_t c = lane_id(); c < channels; c += 16) f(c);
  }
}
// The sum over the lower half of the warp, in all lanes of it.
__device__ __forceinline__ float sum_sixteen(float x) { return warp_sum<16>(x); }

__device__ __forceinline__ float inverse_norm(float squared) {
  const float norm = sqrtf(squared);
  return 1.0f / (norm < kNormEps ? kNormEps : norm);
}
template <class T>
__device__ __forceinline__ float squared_norm(const T* row, int64_t channels) {
  float squared = 0.0f;
  each_channel(channels, [&](int64_t c) {
    const float x = to_float(row[c]);
    squared = fmaf(x, x, squared);
  });
  return __shfl_sync(kAllLanes, sum_sixteen(squared), 0);
}

// Lists the tokens of cluster k in ascending order, by one warp; `members` has room for them.
__device__ __forceinline__ void list_members(const int32_t* assignment, int64_t tokens, int64_t k,
                                             int32_t* members) {
  constexpr int kSteps = 4;
  int64_t found = 0;
  for (int64_t i0 = 0; i0 < tokens; i0 += kSteps * kWarp) {
    int cluster[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int64_t i = i0 + step * kWarp + lane_id();
      cluster[step] = i < tokens ? assignment[i] : -1;
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const unsigned mine = __ballot_sync(kAllLanes, cluster[step] == k);
      if (cluster[step] == k) {
        members[found + lanes_before(mine)] = static_cast<int32_t>(i0 + step * kWarp + lane_id());
      }
      found += __popc(mine);
    }
  }
}

// The tokens of the clusters before k.
__device__ __forceinline__ int64_t members_before(const int32_t* counts, int64_t k) {
  int before = 0;
  for (int64_t j = lane_id(); j < k; j += kWarp) before += counts[j];
  return warp_sum(before);
}

}  // namespace tokred::cuda::clustering
