// kmedoids: rounds of six kernels: which items go on, the medoids as centroids, the nearest one of
// every token, the members of every cluster, the sums of their distances, the members of minimum
// sum. Sums are those of the CPU, bit by bit; nothing waits for the host.
//
// The sums of N = 588, K = 49, C = 512: 64 by 64 members a block, four by four in the registers of
// a thread; 3 C flops a pair.
#pragma once

#include "cluster/cuda/nearest.cuh"

namespace tokred::cuda::clustering {

// The workspace.
struct KmedoidsMemory {
  float* centroids;  // f32 [B, K, C] the medoids, of length 1 for cosine
  float* offset;     // f32 [B, K]
  float* scale;      // f32 [B, N] 1 / |x| (cosine)
  float* cost;       // f32 [B, N] by place in order
  int32_t* medoid;   // i32 [B, K], -1: no cluster
  int32_t* begin;    // i32 [B, K] where the members begin in order
  int32_t* number;   // i32 [B, K] places in the result
  int32_t* counts;   // i32 [B, K]
  int32_t* owner;    // i32 [B, N] by token: the cluster whose medoid it is, or -1
  int32_t* order;    // i32 [B, N] tokens by cluster, each ascending
  int32_t* moved;    // i32 [B] whether a medoid has changed
  int32_t* round;    // i32 [B] a Round
};

// f(row, item, k) with a warp for each of the rows [B, K].
template <class F>
__device__ __forceinline__ void each_cluster(const ClusterTokens& t, F f) {
  const int64_t step = int64_t{gridDim.x} * (kClusterThreads / kWarp);
  for (int64_t row = int64_t{blockIdx.x} * (kClusterThreads / kWarp) + warp_id();
       row < t.batch * t.clusters; row += step) {
    f(row, row / t.clusters, row % t.clusters);
  }
}

template <class T>
__global__ void __launch_bounds__(kClusterThreads)
    kmedoids_start_kernel(const __grid_constant__ KmedoidsParams p,
                          const __grid_constant__ KmedoidsMemory memory) {
  each_cluster(p, [&](int64_t row, int64_t item, int64_t k) {
    const int32_t* start = p.start + item * p.start_stride_batch;
    const int64_t token = start[k * p.start_stride_cluster];
    bool usable = token >= 0 && token < p.tokens && !is_masked(p, item, token);
    if (usable) {
      bool again = false;
      for (int64_t j = lane_id(); j < k; j += kWarp) {
        again = again || start[j * p.start_stride_cluster] == token;
      }
      const float squared = squared_norm(token_row<T>(p, item, token), p.channels);
      usable = !__any_sync(kAllLanes, again) && squared - squared == 0.0f;
    }
    if (lane_id() == 0) memory.medoid[row] = usable ? static_cast<int32_t>(token) : -1;
  });
}

// No token is a medoid yet; 1 / |x| of every token.
template <class T>
__global__ void __launch_bounds__(kClusterThreads)
    kmedoids_tokens_kernel(const __grid_constant__ KmedoidsParams p,
                           const __grid_constant__ KmedoidsMemory memory) {
  const int64_t step = int64_t{gridDim.x} * (kClusterThreads / kWarp);
  for (int64_t row = int64_t{blockIdx.x} * (kClusterThreads / kWarp) + warp_id();
       row < p.batch * p.tokens; row += step) {
    float scale = 1.0f;
    if (p.metric == Metric::cosine) {
      const T* x = token_row<T>(p, row / p.tokens, row % p.tokens);
      scale = inverse_norm(squared_norm(x, p.channels));
    }
    if (lane_id() == 0) {
      memory.owner[row] = -1;
      if (p.metric == Metric::cosine) memory.scale[row] = scale;
    }
  }
}

// Before round `round`: whether an item moves on, and no tokens counted yet.
__global__ void __launch_bounds__(kRoundThreads)
    kmedoids_round_kernel(const __grid_constant__ KmedoidsParams p,
                          const __grid_constant__ KmedoidsMemory memory, int64_t round) {
  for (int64_t item = blockIdx.x; item < p.batch; item += gridDim.x) {
    int next = round < p.iterations ? kMoving : kLastAssignment;
    if (round > 0 && !(memory.round[item] == kMoving && memory.moved[item])) next = kDone;
    __syncthreads();  // everyone has read
    if (threadIdx.x == 0) {
      memory.round[item] = next;
      memory.moved[item] = 0;
    }
    for (int64_t k = threadIdx.x; k < p.clusters; k += kRoundThreads) {
      memory.counts[item * p.clusters + k] = 0;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kClusterThreads)
    kmedoids_pack_kernel(const __grid_constant__ KmedoidsParams p,
                         const __grid_constant__ KmedoidsMemory memory) {
  each_cluster(p, [&](int64_t row, int64_t item, int64_t k) {
    if (memory.round[item] == kDone) return;
    const int64_t token = memory.medoid[row];
    float* centroid = memory.centroids + row * p.channels;
    const float scale =
        token >= 0 && p.metric == Metric::cosine ? memory.scale[item * p.tokens + token] : 1.0f;
    each_channel(p.channels, [&](int64_t c) {
      centroid[c] = token >= 0 ? to_float(token_row<T>(p, item, token)[c]) * scale : 0.0f;
    });
    __syncwarp();
    float offset = 0.0f;
    if (p.metric == Metric::l2) offset = -0.5f * squared_norm(centroid, p.channels);
    if (lane_id() != 0) return;
    memory.offset[row] = token >= 0 ? offset : -kInfinity;
    if (token >= 0) memory.owner[item * p.tokens + token] = static_cast<int32_t>(k);
  });
}

__global__ void __launch_bounds__(kClusterThreads)
    kmedoids_members_kernel(const __grid_constant__ KmedoidsParams p,
                            const __grid_constant__ KmedoidsMemory memory) {
  each_cluster(p, [&](int64_t row, int64_t item, int64_t k) {
    if (memory.round[item] != kMoving) return;
    const int64_t begin = members_before(memory.counts + item * p.clusters, k);
    if (lane_id() == 0) memory.begin[row] = static_cast<int32_t>(begin);
    list_members(p.assignment + item * p.tokens, p.tokens, k,
                 memory.order + item * p.tokens + begin);
  });
}

// Sums of distances -------------------------------------------------------------------------------

struct DistanceShared {
  float rows[kDistanceChannels][raw_pitch(kDistanceMembers)];
  float columns[kDistanceChannels][raw_pitch(kDistanceMembers)];
};
static_assert(sizeof(DistanceShared) == kDistanceBytes);

// The members [first, last) of a cluster, at most 64, against all of them, [begin, end) of the
// order of an item.
template <class T>
struct DistanceTile {
  static constexpr int kEach = 4;  // rows and columns of a thread
  static constexpr int kLaneColumns = kDistanceMembers / kEach;

  const KmedoidsParams& p;
  const KmedoidsMemory& memory;
  DistanceShared& s;
  int64_t item, begin, end, first, last;
  int row0, column0;  // of this thread in the tile; its columns are sixteen apart

  __device__ DistanceTile(const KmedoidsParams& p, const KmedoidsMemory& memory, DistanceShared& s,
                          int64_t item)
      : p(p), memory(memory), s(s), item(item),
        row0(static_cast<int>(threadIdx.x) / kLaneColumns * kEach),
        column0(static_cast<int>(threadIdx.x) % kLaneColumns) {}

  // Four channels of a member, of 0 beyond the ends.
  __device__ __forceinline__ void load(float (&to)[kDistanceChannels][raw_pitch(kDistanceMembers)],
                                       int64_t place, int64_t past, int64_t channel0) {
    const int slot = static_cast<int>(threadIdx.x) % kDistanceMembers;
    const int channel = static_cast<int>(threadIdx.x) / kDistanceMembers * kEach;
    const bool there = place + slot < past;
    const int64_t token = there ? memory.order[item * p.tokens + place + slot] : 0;
    const float scale =
        there && p.metric == Metric::cosine ? memory.scale[item * p.tokens + token] : 1.0f;
    const T* x = token_row<T>(p, item, token);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64_t c = channel0 + channel + i;
      to[channel + i][slot] = there && c < p.channels ? to_float(x[c]) * scale : 0.0f;
    }
  }
  static_assert(kDistanceThreads / kDistanceMembers * kEach == kDistanceChannels);

  __device__ __forceinline__ void add_squares(float (&squared)[kEach][kEach]) {
#pragma unroll 4
    for (int c = 0; c < kDistanceChannels; ++c) {
      const float4 low = *reinterpret_cast<const float4*>(&s.rows[c][row0]);
      const float row[kEach] = {low.x, low.y, low.z, low.w};
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const float column = s.columns[c][column0 + j * kLaneColumns];
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const float difference = row[i] - column;
          squared[i][j] = fmaf(difference, difference, squared[i][j]);
        }
      }
    }
  }

  __device__ __forceinline__ void run() {
    float sum[kEach] = {};
    for (int64_t place = begin; place < end; place += kDistanceMembers) {
      float squared[kEach][kEach] = {};
      for (int64_t c = 0; c < p.channels; c += kDistanceChannels) {
        __syncthreads();  // the tiles may be overwritten
        load(s.rows, first, last, c);
        load(s.columns, place, end, c);
        __syncthreads();
        add_squares(squared);
      }
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        if (place + column0 + j * kLaneColumns >= end) continue;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          sum[i] +=
              p.metric == Metric::cosine ? __fmul_rn(squared[i][j], 0.5f) : sqrtf(squared[i][j]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const float total = warp_sum<kLaneColumns>(sum[i]);
      if (column0 == 0 && first + row0 + i < last) {
        memory.cost[item * p.tokens + first + row0 + i] = total;
      }
    }
  }
};

// A block for each 64 places of an item's order, cluster by cluster.
template <class T>
__global__ void __launch_bounds__(kDistanceThreads)
    distance_sums_kernel(const __grid_constant__ KmedoidsParams p,
                         const __grid_constant__ KmedoidsMemory memory) {
  auto& shared = shared_memory<DistanceShared>();
  const int64_t chunks = (p.tokens + kDistanceMembers - 1) / kDistanceMembers;
  for (int64_t block = blockIdx.x; block < p.batch * chunks; block += gridDim.x) {
    const int64_t item = block / chunks, all = item * p.clusters;
    if (p.clusters == 0 || memory.round[item] != kMoving) continue;
    const int64_t members =
        int64_t{memory.begin[all + p.clusters - 1]} + memory.counts[all + p.clusters - 1];
    int64_t place = block % chunks * kDistanceMembers;
    const int64_t last = min(place + kDistanceMembers, members);
    if (place >= last) continue;
    int64_t k = p.assignment[item * p.tokens + memory.order[item * p.tokens + place]];
    DistanceTile<T> tile(p, memory, shared, item);
    for (; place < last; ++k) {
      tile.begin = memory.begin[all + k];
      tile.end = tile.begin + memory.counts[all + k];
      tile.first = place;
      tile.last = min(last, tile.end);
      if (tile.first < tile.last) tile.run();
      place = max(place, tile.last);
    }
  }
}

// The member of minimum cost, the lowest of equals; the old medoid where all costs are NaN.
__global__ void __launch_bounds__(kClusterThreads)
    kmedoids_choose_kernel(const __grid_constant__ KmedoidsParams p,
                           const __grid_constant__ KmedoidsMemory memory) {
  each_cluster(p, [&](int64_t row, int64_t item, int64_t) {
    if (memory.round[item] != kMoving || memory.medoid[row] < 0) return;
    const int64_t first = item * p.tokens + memory.begin[row];
    float smallest = kInfinity;
    int best = -1;
    for (int64_t m = lane_id(); m < memory.counts[row]; m += kWarp) {
      const float cost = memory.cost[first + m];
      if (!(cost < smallest)) continue;
      smallest = cost;
      best = memory.order[first + m];
    }
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(kAllLanes, smallest, step);
      const int token = __shfl_xor_sync(kAllLanes, best, step);
      // As an unsigned number, -1 is the largest token.
      if (other < smallest ||
          (other == smallest && static_cast<unsigned>(token) < static_cast<unsigned>(best))) {
        smallest = other;
        best = token;
      }
    }
    const int before = memory.medoid[row];
    if (lane_id() != 0 || best < 0 || best == before) return;
    memory.owner[item * p.tokens + before] = -1;
    memory.medoid[row] = best;
    atomicMax(&memory.moved[item], 1);
  });
}

// Numbers the clusters by ascending medoids; those that are none follow.
__global__ void __launch_bounds__(kClusterThreads)
    kmedoids_number_kernel(const __grid_constant__ KmedoidsParams p,
                           const __grid_constant__ KmedoidsMemory memory) {
  each_cluster(p, [&](int64_t row, int64_t item, int64_t k) {
    const int32_t* medoid = memory.medoid + item * p.clusters;
    const auto before = [&](int64_t j) {  // whether j comes before k
      if (medoid[k] < 0) return medoid[j] >= 0 || j < k;
      return medoid[j] >= 0 && medoid[j] < medoid[k];
    };
    int number = 0;
    for (int64_t j = lane_id(); j < p.clusters; j += kWarp) number += before(j);
    number = warp_sum(number);
    if (lane_id() != 0) return;
    memory.number[row] = number;
    p.medoids[item * p.clusters + number] = medoid[k];
  });
}

__global__ void __launch_bounds__(kClusterThreads)
    kmedoids_renumber_kernel(const __grid_constant__ KmedoidsParams p,
                             const __grid_constant__ KmedoidsMemory memory) {
  const int64_t step = int64_t{gridDim.x} * kClusterThreads;
  for (int64_t i = int64_t{blockIdx.x} * kClusterThreads + threadIdx.x; i < p.batch * p.tokens;
       i += step) {
    const int cluster = p.assignment[i];
    if (cluster >= 0) p.assignment[i] = memory.number[i / p.tokens * p.clusters + cluster];
  }
}

}  // namespace tokred::cuda::clustering
