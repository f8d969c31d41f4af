// knn_reconstruct: a warp a token: distances to 32 centroids at a time, the k nearest in a sorted
// list in registers, two places a lane, then the weighted sum of their rows. Its gradient writes
// the lists down; then a block a centroid looks through the lists of its item for its own tokens,
// which it finds in order, and sums their rows, four channels a thread.
#pragma once

#include "cluster/cuda/plan.h"
#include "cluster/params.h"
#include "common/cuda/block.cuh"
#include "common/cuda/row_io.cuh"

namespace tokred::cuda::clustering {

// Up to 64 centroids by ascending distance; a lane has the places lane and lane + 32.
struct NearestList {
  float distance[2] = {kInfinity, kInfinity};
  int cluster[2] = {-1, -1};

  __device__ __forceinline__ float at(int place) const {
    const float low = __shfl_sync(kAllLanes, distance[0], place % kWarp);
    const float high = __shfl_sync(kAllLanes, distance[1], place % kWarp);
    return place < kWarp ? low : high;
  }
  __device__ __forceinline__ int cluster_at(int place) const {
    const int low = __shfl_sync(kAllLanes, cluster[0], place % kWarp);
    const int high = __shfl_sync(kAllLanes, cluster[1], place % kWarp);
    return place < kWarp ? low : high;
  }

  // Behind those that are as near.
  __device__ __forceinline__ void insert(float value, int which) {
    int place = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      place += __popc(__ballot_sync(kAllLanes, distance[half] <= value));
    }
    const float last = __shfl_sync(kAllLanes, distance[0], kWarp - 1);
    const int last_cluster = __shfl_sync(kAllLanes, cluster[0], kWarp - 1);
#pragma unroll
    for (int half = 1; half >= 0; --half) {
      float before = __shfl_up_sync(kAllLanes, distance[half], 1);
      int cluster_before = __shfl_up_sync(kAllLanes, cluster[half], 1);
      if (half == 1 && lane_id() == 0) {
        before = last;
        cluster_before = last_cluster;
      }
      const int here = half * kWarp + lane_id();
      if (here > place) {
        distance[half] = before;
        cluster[half] = cluster_before;
      } else if (here == place) {
        distance[half] = value;
        cluster[half] = which;
      }
    }
  }
};

template <class T>
__device__ __forceinline__ NearestList nearest_centroids(const KnnReconstructParams& p,
                                                         int64_t item, const T* x) {
  NearestList list;
  const int last = static_cast<int>(p.k) - 1;
  for (int64_t m0 = 0; m0 < p.clusters; m0 += kWarp) {
    float mine = kInfinity;
    const int count = static_cast<int>(min(p.clusters - m0, int64_t{kWarp}));
    for (int m = 0; m < count; ++m) {
      const float* centroid =
          p.centroids + item * p.centroid_stride_batch + (m0 + m) * p.centroid_stride_cluster;
      float squared = 0.0f;
      for (int64_t c = lane_id(); c < p.channels; c += kWarp) {
        const float difference = to_float(x[c]) - centroid[c];
        squared = fmaf(difference, difference, squared);
      }
      squared = warp_sum(squared);
      if (lane_id() == m && squared < kInfinity) mine = squared;
    }
    // Those that are nearer than the last of the list, by ascending numbers.
    for (;;) {
      const unsigned nearer = __ballot_sync(kAllLanes, mine < list.at(last));
      if (nearer == 0) break;
      const int first = __ffs(static_cast<int>(nearer)) - 1;
      list.insert(__shfl_sync(kAllLanes, mine, first), static_cast<int>(m0) + first);
      if (lane_id() == first) mine = kInfinity;
    }
  }
  return list;
}

// The nearest centroids of a token: `count` of them, with their weights in the place of distances.
struct WeightedList : NearestList {
  int count = 0;

  template <class T>
  __device__ WeightedList(const KnnReconstructParams& p, int64_t item, const T* x) {
    if (p.k > 0) static_cast<NearestList&>(*this) = nearest_centroids(p, item, x);
    const float smallest = at(0);
    float total = 0.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool there = half * kWarp + lane_id() < p.k && distance[half] < kInfinity;
      const float w = there ? expf(-p.temperature * (distance[half] - smallest)) : 0.0f;
      distance[half] = w;
      total += p.l2 ? w * w : w;
      count += __popc(__ballot_sync(kAllLanes, there));
    }
    total = warp_sum(total);
    const float norm = p.l2 ? sqrtf(total) : total;
#pragma unroll
    for (int half = 0; half < 2; ++half) distance[half] /= norm;
  }
};

// use(token of all items, its list), a warp a token.
template <class T, class Use>
__device__ __forceinline__ void each_token(const KnnReconstructParams& p, Use use) {
  const int64_t step = int64_t{gridDim.x} * (kClusterThreads / kWarp);
  for (int64_t token = int64_t{blockIdx.x} * (kClusterThreads / kWarp) + warp_id();
       token < p.batch * p.tokens; token += step) {
    const int64_t item = token / p.tokens, i = token % p.tokens;
    const T* x = static_cast<const T*>(p.x) + item * p.stride_batch + i * p.stride_token;
    use(token, WeightedList(p, item, x));
  }
}

template <class T, class D>
__global__ void __launch_bounds__(kClusterThreads)
    knn_reconstruct_kernel(const __grid_constant__ KnnReconstructParams p) {
  each_token<T>(p, [&](int64_t token, const WeightedList& list) {
    const D* deep = static_cast<const D*>(p.deep) + token / p.tokens * p.deep_stride_batch;
    D* y = static_cast<D*>(p.y) + token * p.deep_channels;
    for (int64_t c0 = 0; c0 < p.deep_channels; c0 += kWarp) {
      const int64_t c = c0 + lane_id();
      float sum = 0.0f;
      for (int j = 0; j < list.count; ++j) {
        const float w = list.at(j);
        const int64_t m = list.cluster_at(j);
        if (c < p.deep_channels) {
          sum = fmaf(w, to_float(deep[m * p.deep_stride_cluster + c]), sum);
        }
      }
      if (c < p.deep_channels) y[c] = from_float<D>(sum);
    }
  });
}

// Gradient ---------------------------------------------------------------------------------------

// The lists of all tokens in the workspace.
struct Neighbours {
  int32_t* cluster;  // [B, N, k], -1 for none
  float* weight;     // [B, N, k]

  __device__ explicit Neighbours(const KnnReconstructBackwardParams& p)
      : cluster(static_cast<int32_t*>(p.workspace)),
        weight(
            reinterpret_cast<float*>(cluster + p.forward.batch * p.forward.tokens * p.forward.k)) {}
};

template <class T>
__global__ void __launch_bounds__(kClusterThreads)
    knn_neighbours_kernel(const __grid_constant__ KnnReconstructBackwardParams p) {
  const Neighbours to(p);
  const int64_t k = p.forward.k;
  each_token<T>(p.forward, [&](int64_t token, const WeightedList& list) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int place = half * kWarp + lane_id();
      if (place >= k) continue;
      to.cluster[token * k + place] = place < list.count ? list.cluster[half] : -1;
      to.weight[token * k + place] = list.distance[half];
    }
  });
}

struct MembersShared {
  int32_t token[kMemberEntries];
  float weight[kMemberEntries];
  BlockScratch<int> scratch;
};

template <class D>
__global__ void __launch_bounds__(kClusterThreads)
    knn_reconstruct_backward_kernel(const __grid_constant__ KnnReconstructBackwardParams p) {
  auto& s = shared_memory<MembersShared>();
  const KnnReconstructParams& f = p.forward;
  constexpr int kEach = kMemberEntries / kClusterThreads;
  const int64_t slabs = (f.deep_channels + kMemberChannels - 1) / kMemberChannels;
  const int64_t entries = f.tokens * f.k;
  for (int64_t block = blockIdx.x; block < f.batch * f.clusters * slabs; block += gridDim.x) {
    const int64_t row = block / slabs, item = row / f.clusters, cluster = row % f.clusters;
    const int64_t c0 = block % slabs * kMemberChannels + threadIdx.x;
    const Neighbours all(p);
    const int32_t* clusters = all.cluster + item * entries;
    const float* weights = all.weight + item * entries;
    const D* grad = static_cast<const D*>(p.grad_y) + item * p.grad_stride_batch;
    float sum[4] = {};
    for (int64_t base = 0; base < entries; base += kMemberEntries) {
      const int64_t first = base + int64_t{threadIdx.x} * kEach;
      int mine = 0, members;
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        mine += first + e < entries && clusters[first + e] == cluster;
      }
      int place = block_exclusive_sum<kClusterThreads>(mine, s.scratch, members);
      if (mine > 0) {
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
          if (first + e >= entries || clusters[first + e] != cluster) continue;
          s.token[place] = static_cast<int32_t>((first + e) / f.k);
          s.weight[place++] = weights[first + e];
        }
      }
      __syncthreads();
      for (int m = 0; m < members; ++m) {
        const D* from = grad + s.token[m] * p.grad_stride_token;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int64_t c = c0 + n * kClusterThreads;
          if (c < f.deep_channels) sum[n] = fmaf(s.weight[m], to_float(from[c]), sum[n]);
        }
      }
      __syncthreads();
    }
    D* to = static_cast<D*>(p.grad_deep) + row * f.deep_channels;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int64_t c = c0 + n * kClusterThreads;
      if (c < f.deep_channels) to[c] = from_float<D>(sum[n]);
    }
  }
}

}  // namespace tokred::cuda::clustering
