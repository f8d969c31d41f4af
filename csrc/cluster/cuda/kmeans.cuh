// kmeans: rounds of three kernels: which items go on, the nearest centroid of every token, and a
// warp a centroid that moves it to the mean of its tokens. Owner computes, tokens ascend, so sums
// have one order; an item that is done costs empty blocks, and nothing waits for the host.
#pragma once

#include "cluster/cuda/nearest.cuh"

namespace tokred::cuda::clustering {

// The workspace.
struct KmeansMemory {
  float* sums;  // f32 [B, K, C]
  float* scale;  // f32 [B, N] 1 / |x| (cosine)
  float* offset;  // f32 [B, K]
  int32_t* members;  // i32 [B, N] tokens by cluster
  float* shift;  // f32 [B] the largest squared move of a centroid
  int32_t* round;  // i32 [B] a Round
};

// The token of rank `rank` among those that are not masked, by one warp.
__device__ __forceinline__ int64_t usable_token(const ClusterTokens& t, int64_t item,
                                                int64_t rank) {
  for (int64_t i0 = 0; i0 < t.tokens; i0 += kWarp) {
    const int64_t i = i0 + lane_id();
    const unsigned usable = __ballot_sync(kAllLanes, i < t.tokens && !is_masked(t, item, i));
    const int count = __popc(usable);
    if (rank < count) {
      const bool here = (usable >> lane_id() & 1) && lanes_before(usable) == rank;
      return i0 + __ffs(static_cast<int>(__ballot_sync(kAllLanes, here))) - 1;
    }
    rank -= count;
  }
  return -1;
}

__device__ __forceinline__ int64_t count_usable(const ClusterTokens& t, int64_t item) {
  if (!t.mask) return t.tokens;
  int64_t count = 0;
  for (int64_t i0 = 0; i0 < t.tokens; i0 += kWarp) {
    const int64_t i = i0 + lane_id();
    count += __popc(__ballot_sync(kAllLanes, i < t.tokens && !is_masked(t, item, i)));
  }
  return count;
}

// Where centroid k starts, or -1.
__device__ __forceinline__ int64_t start_token(const KmeansParams& p, int64_t item, int64_t k) {
  if (p.start_token) {
    const int64_t token = p.start_token[item * p.start_stride_batch + k * p.start_stride_cluster];
    return token >= 0 && token < p.tokens && !is_masked(p, item, token) ? token : -1;
  }
  const int64_t usable = count_usable(p, item);
  if (usable == 0) return -1;
  const int64_t rank = (2 * k + 1) * usable / (2 * p.clusters);
  return p.mask ? usable_token(p, item, rank) : rank;
}

// Of one centroid: what its products are added to.
__device__ __forceinline__ void write_offset(const KmeansParams& p, const KmeansMemory& memory,
                                             int64_t row, bool usable) {
  float offset = 0.0f;
  if (p.metric == Metric::l2) {
    offset = -0.5f * squared_norm(p.centroids + row * p.channels, p.channels);
  }
  if (lane_id() == 0) memory.offset[row] = usable ? offset : -kInfinity;
}

template <class T>
__global__ void __launch_bounds__(kClusterThreads)
    kmeans_start_kernel(const __grid_constant__ KmeansParams p,
                        const __grid_constant__ KmeansMemory memory) {
  const int64_t step = int64_t{gridDim.x} * (kClusterThreads / kWarp);
  for (int64_t row = int64_t{blockIdx.x} * (kClusterThreads / kWarp) + warp_id();
       row < p.batch * p.clusters; row += step) {
    const int64_t item = row / p.clusters, k = row % p.clusters;
    const int64_t token = p.start ? 0 : start_token(p, item, k);
    float* centroid = p.centroids + row * p.channels;
    const float* given =
        p.start ? p.start + item * p.start_stride_batch + k * p.start_stride_cluster : nullptr;
    each_channel(p.channels, [&](int64_t c) {
      centroid[c] = given        ? given[c]
                    : token >= 0 ? to_float(token_row<T>(p, item, token)[c])
                                 : 0.0f;
    });
    __syncwarp();
    if (p.metric == Metric::cosine) {
      const float factor = inverse_norm(squared_norm(centroid, p.channels));
      each_channel(p.channels, [&](int64_t c) { centroid[c] *= factor; });
      __syncwarp();
    }
    write_offset(p, memory, row, token >= 0);
  }
}

// 1 / |x| of every token.
template <class T>
__global__ void __launch_bounds__(kClusterThreads)
    token_scale_kernel(const __grid_constant__ KmeansParams p,
                       const __grid_constant__ KmeansMemory memory) {
  const int64_t step = int64_t{gridDim.x} * (kClusterThreads / kWarp);
  for (int64_t row = int64_t{blockIdx.x} * (kClusterThreads / kWarp) + warp_id();
       row < p.batch * p.tokens; row += step) {
    const T* x = token_row<T>(p, row / p.tokens, row % p.tokens);
    const float scale = inverse_norm(squared_norm(x, p.channels));
    if (lane_id() == 0) memory.scale[row] = scale;
  }
}

// Before round `round`: whether an item moves on, and no tokens counted yet.
__global__ void __launch_bounds__(kRoundThreads)
    kmeans_round_kernel(const __grid_constant__ KmeansParams p,
                        const __grid_constant__ KmeansMemory memory, int64_t round) {
  for (int64_t item = blockIdx.x; item < p.batch; item += gridDim.x) {
    int next = kMoving;
    if (round > 0) {
      const float shift = memory.shift[item];
      const bool moves = memory.round[item] == kMoving && shift != 0.0f;
      next = !moves ? kDone : shift <= p.tolerance * p.tolerance ? kLastAssignment : kMoving;
    }
    if (next == kMoving && round >= p.iterations) next = kLastAssignment;
    __syncthreads();  // everyone has read
    if (threadIdx.x == 0) {
      memory.round[item] = next;
      memory.shift[item] = 0.0f;
    }
    if (next == kDone) continue;
    for (int64_t k = threadIdx.x; k < p.clusters; k += kRoundThreads) {
      p.counts[item * p.clusters + k] = 0;
    }
  }
}

// sums[c] = the sum over the members of scale * x[c], for all channels, by one warp: members ascend
// within a block of tokens, then the blocks ascend.
template <class T>
__device__ __forceinline__ void sum_members(const KmeansParams& p, int64_t item,
                                            const int32_t* members, int64_t count,
                                            const float* scale, float* sums) {
  constexpr int kBatch = 8, kEach = 4;  // members and channels a lane in flight
  const int64_t block = kmeans_block(p.clusters);
  for (int64_t c0 = 0; c0 < p.channels; c0 += kEach * kWarp) {
    float total[kEach] = {}, sum[kEach] = {};
    int64_t current = 0;  // the block that sum belongs to
    for (int64_t m0 = 0; m0 < count; m0 += kBatch) {
      T x[kBatch][kEach];
#pragma unroll
      for (int m = 0; m < kBatch; ++m) {
        const T* row = m0 + m < count ? token_row<T>(p, item, members[m0 + m]) : nullptr;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const int64_t c = c0 + i * kWarp + lane_id();
          x[m][i] = row && c < p.channels ? row[c] : T{};
        }
      }
#pragma unroll
      for (int m = 0; m < kBatch; ++m) {
        if (m0 + m >= count) break;
        const int64_t token = members[m0 + m];
        const bool next = token / block != current;
        const float factor = scale ? scale[token] : 1.0f;
        current = token / block;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          if (next) {
            total[i] += sum[i];
            sum[i] = 0.0f;
          }
          sum[i] = fmaf(to_float(x[m][i]), factor, sum[i]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64_t c = c0 + i * kWarp + lane_id();
      if (c < p.channels) sums[c] = total[i] + sum[i];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kClusterThreads)
    kmeans_move_kernel(const __grid_constant__ KmeansParams p,
                       const __grid_constant__ KmeansMemory memory) {
  const int64_t step = int64_t{gridDim.x} * (kClusterThreads / kWarp);
  for (int64_t row = int64_t{blockIdx.x} * (kClusterThreads / kWarp) + warp_id();
       row < p.batch * p.clusters; row += step) {
    const int64_t item = row / p.clusters, k = row % p.clusters;
    const int64_t count = p.counts[row];
    if (memory.round[item] != kMoving || count == 0) continue;
    int32_t* members =
        memory.members + item * p.tokens + members_before(p.counts + item * p.clusters, k);
    list_members(p.assignment + item * p.tokens, p.tokens, k, members);
    __syncwarp();
    float* sums = memory.sums + row * p.channels;
    const bool cosine = p.metric == Metric::cosine;
    sum_members<T>(p, item, members, count, cosine ? memory.scale + item * p.tokens : nullptr,
                   sums);
    __syncwarp();
    const float factor = cosine ? inverse_norm(squared_norm(sums, p.channels)) : 1.0f;
    float* centroid = p.centroids + row * p.channels;
    float way = 0.0f;
    each_channel(p.channels, [&](int64_t c) {
      const float next = cosine ? __fmul_rn(sums[c], factor) : sums[c] / static_cast<float>(count);
      const float move = next - centroid[c];
      way = fmaf(move, move, way);
      centroid[c] = next;
    });
    way = sum_sixteen(way);
    // Bits of floats that are not negative ascend as the floats do; NaN counts as infinite.
    const float distance = way == way ? way : kInfinity;
    if (lane_id() == 0) {
      atomicMax(reinterpret_cast<int*>(&memory.shift[item]), __float_as_int(distance));
    }
    __syncwarp();
    write_offset(p, memory, row, true);
  }
}

}  // namespace tokred::cuda::clustering
