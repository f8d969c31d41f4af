// knn_reconstruct: a warp a token: distances to 32 centroids at a time, the k nearest in a sorted
// list in registers, two places a lane, then the weighted sum of their rows.
#pragma once

#include "cluster/cuda/plan.h"
#include "cluster/params.h"
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

template <class T, class D>
__global__ void __launch_bounds__(kClusterThreads)
    knn_reconstruct_kernel(const __grid_constant__ KnnReconstructParams p) {
  const int64_t step = int64_t{gridDim.x} * (kClusterThreads / kWarp);
  for (int64_t token = int64_t{blockIdx.x} * (kClusterThreads / kWarp) + warp_id();
       token < p.batch * p.tokens; token += step) {
    const int64_t item = token / p.tokens, i = token % p.tokens;
    const T* x = static_cast<const T*>(p.x) + item * p.stride_batch + i * p.stride_token;
    NearestList list;
    if (p.k > 0) list = nearest_centroids(p, item, x);
    const float least = list.at(0);
    float total = 0.0f;
    int count = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool there = half * kWarp + lane_id() < p.k && list.distance[half] < kInfinity;
      const float w = there ? expf(-p.temperature * (list.distance[half] - least)) : 0.0f;
      list.distance[half] = w;
      total += p.l2 ? w * w : w;
      count += __popc(__ballot_sync(kAllLanes, there));
    }
    total = warp_sum(total);
    const float norm = p.l2 ? sqrtf(total) : total;
    const D* deep = static_cast<const D*>(p.deep) + item * p.deep_stride_batch;
    D* y = static_cast<D*>(p.y) + token * p.deep_channels;
    for (int64_t c0 = 0; c0 < p.deep_channels; c0 += kWarp) {
      const int64_t c = c0 + lane_id();
      float sum = 0.0f;
      for (int j = 0; j < count; ++j) {
        const float w = list.at(j) / norm;
        const int64_t m = list.cluster_at(j);
        if (c < p.deep_channels) {
          sum = fmaf(w, to_float(deep[m * p.deep_stride_cluster + c]), sum);
        }
      }
      if (c < p.deep_channels) y[c] = from_float<D>(sum);
    }
  }
}

}  // namespace tokred::cuda::clustering
