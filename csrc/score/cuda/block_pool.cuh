// block_pool: one warp or eight read the tokens of a block, part of a warp a token, and combine
// what they have in a fixed order.
#pragma once

#include "common/cuda/block.cuh"
#include "common/cuda/row_io.cuh"
#include "score/cuda/plan.h"
#include "score/params.h"

namespace tokred::cuda::scoring {

// Partial results of the warps that share a block.
struct PoolShared {
  float partial[2][kPoolWide][256];
  int count[kPoolWide];
};

// Which tokens a block holds.
struct TokenRange {
  int64_t first, last;

  __device__ TokenRange(const BlockPoolParams& p, int64_t batch, int64_t block) {
    if (p.boundaries) {
      const int32_t* edges = p.boundaries + batch * p.boundaries_stride_batch + block;
      first = max(int64_t{edges[0]}, int64_t{0});
      last = min(int64_t{edges[1]}, p.tokens);
    } else {
      first = block * p.block_size;
      last = min(p.tokens - first, p.block_size) + first;
    }
    if (p.lengths) last = min(last, int64_t{p.lengths[batch * p.lengths_stride]});
  }
};

// The tokens of one block, as a part of a warp of kLanes lanes sees them; of kWarps warps.
template <class T, int kLanes, int kWarps>
struct Pool {
  static constexpr int kParts = kWarp / kLanes * kWarps;  // that share the tokens
  const BlockPoolParams& p;
  PoolShared& shared;
  const int64_t batch, head;
  const TokenRange range;
  const int lane, part;
  const bool aligned;

  __device__ Pool(const BlockPoolParams& p, PoolShared& shared, int64_t item)
      : p(p), shared(shared), batch(item / p.blocks / p.heads), head(item / p.blocks % p.heads),
        range(p, batch, item % p.blocks), lane(lane_id() % kLanes),
        part(warp_id() % kWarps * (kWarp / kLanes) + lane_id() / kLanes),
        aligned(is_aligned(p.x, p.dtype)) {}

  __device__ __forceinline__ bool visible(int64_t token) const {
    return token < range.last &&
           (!p.mask || p.mask[batch * p.mask_stride_batch + token * p.mask_stride_token]);
  }

  // f(eight elements) for the visible tokens of this part, in order; returns how many there are.
  template <class F>
  __device__ __forceinline__ int each_token(F f) const {
    const T* base =
        static_cast<const T*>(p.x.data) + batch * p.x.stride_batch + head * p.x.stride_head;
    int count = 0;
    for (int64_t first = range.first + part; first < range.last; first += 4 * kParts) {
      float x[4][8];
      const T* row[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t token = first + i * kParts;
        row[i] = visible(token) ? base + token * p.x.stride_token : nullptr;
      }
      load_rows(x, row, 8 * lane, static_cast<int>(p.head_dim), aligned);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!row[i]) continue;
        ++count;
        f(x[i]);
      }
    }
    return count;
  }

  // combine(x, y) over the parts of all warps, for each of the eight columns of a lane. Every lane
  // that has those columns gets the result. `which` is a place that has not been used yet.
  template <class F>
  __device__ __forceinline__ void combine(float (&x)[8], int which, F join) const {
#pragma unroll
    for (int c = 0; c < 8; ++c) {
#pragma unroll
      for (int step = kLanes; step < kWarp; step *= 2) {
        x[c] = join(x[c], __shfl_xor_sync(kAllLanes, x[c], step));
      }
    }
    if constexpr (kWarps > 1) {
      float (&partial)[kPoolWide][256] = shared.partial[which];
      if (lane_id() < kLanes) {
#pragma unroll
        for (int c = 0; c < 8; ++c) partial[warp_id()][8 * lane + c] = x[c];
      }
      __syncthreads();
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        x[c] = partial[0][8 * lane + c];
        for (int warp = 1; warp < kWarps; ++warp) x[c] = join(x[c], partial[warp][8 * lane + c]);
      }
    }
  }

  __device__ __forceinline__ int combine_counts(int count) const {
#pragma unroll
    for (int step = kLanes; step < kWarp; step *= 2) {
      count += __shfl_xor_sync(kAllLanes, count, step);
    }
    if constexpr (kWarps > 1) {
      if (lane_id() == 0) shared.count[warp_id()] = count;
      __syncthreads();
      count = 0;
      for (int warp = 0; warp < kWarps; ++warp) count += shared.count[warp];
    }
    return count;
  }

  // Statistic `which` of a block; zeros where it has no visible token.
  __device__ __forceinline__ void store(const float (&x)[8], int64_t item, int which,
                                        int count) const {
    if (part != 0) return;
    float* out = p.pooled + (item * statistic_count(p.statistic) + which) * p.head_dim;
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      if (8 * lane + c < p.head_dim) out[8 * lane + c] = count > 0 ? x[c] : 0.0f;
    }
  }

  __device__ __forceinline__ int pool_bounds(int64_t item) const {
    float smallest[8], most[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      smallest[c] = kInfinity;
      most[c] = -kInfinity;
    }
    const int count = combine_counts(each_token([&](const float (&x)[8]) {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        smallest[c] = min_or_nan(smallest[c], x[c]);
        most[c] = max_or_nan(most[c], x[c]);
      }
    }));
    combine(smallest, 0, [](float x, float y) { return min_or_nan(x, y); });
    combine(most, 1, [](float x, float y) { return max_or_nan(x, y); });
    store(smallest, item, 0, count);
    store(most, item, 1, count);
    return count;
  }

  // The means; and the mean distances from them, which takes a second pass over the tokens.
  __device__ __forceinline__ int pool_means(int64_t item) const {
    const auto add = [](float x, float y) { return x + y; };
    float mean[8] = {};
    const int count = combine_counts(each_token([&](const float (&x)[8]) {
#pragma unroll
      for (int c = 0; c < 8; ++c) mean[c] += x[c];
    }));
    combine(mean, 0, add);
    const auto divisor = static_cast<float>(max(count, 1));
    const float factor = p.statistic == BlockStatistic::sqrt_mean ? sqrtf(divisor) : 1.0f;
#pragma unroll
    for (int c = 0; c < 8; ++c) mean[c] = mean[c] / divisor * factor;
    store(mean, item, 0, count);
    if (p.statistic != BlockStatistic::mean_deviation) return count;
    float distance[8] = {};
    each_token([&](const float (&x)[8]) {
#pragma unroll
      for (int c = 0; c < 8; ++c) distance[c] += fabsf(x[c] - mean[c]);
    });
    combine(distance, 1, add);
#pragma unroll
    for (int c = 0; c < 8; ++c) distance[c] /= divisor;
    store(distance, item, 1, count);
    return count;
  }
};

template <class T, int kLanes, int kWarps>
__global__ void __launch_bounds__(kScoreThreads)
    block_pool_kernel(const __grid_constant__ BlockPoolParams p) {
  const int64_t item = int64_t{blockIdx.x} * (kPoolWide / kWarps) + warp_id() / kWarps;
  if (item >= p.batch * p.heads * p.blocks) return;
  const Pool<T, kLanes, kWarps> pool(p, shared_memory<PoolShared>(), item);
  const int count =
      p.statistic == BlockStatistic::min_max ? pool.pool_bounds(item) : pool.pool_means(item);
  if (pool.head == 0 && pool.part == 0 && pool.lane == 0) {
    p.counts[pool.batch * p.blocks + item % p.blocks] = count;
  }
}

}  // namespace tokred::cuda::scoring
