// sinkhorn: entropic optimal transport in the log domain, in three launches: costs by tiles of A
// B^T on the tensor cores; the steps of an item by one block, over its costs in the L2 cache; and
// the aggregation, which makes tiles of the plan as it multiplies them.
//
// B = 32, M = 603, N = 126: 9.7 MB of costs. A step of a block reads its 0.3 MB twice and takes two
// exponentials an entry: about 10 us.
#pragma once

#include "common/cuda/similarity_tile.cuh"
#include "match/cuda/plan.h"
#include "match/params.h"

namespace tokred::cuda::matching {

// -cost / eps of every pair, -inf for skipped anchors: [B, M, N] in the workspace.
__host__ __device__ __forceinline__ float* sinkhorn_scores(const SinkhornParams& p) {
  return static_cast<float*>(p.workspace);
}

// How far a source and an anchor stand apart.
__device__ __forceinline__ float apart_in_space(const SinkhornParams& p, int64_t item, int64_t i,
                                                int64_t j) {
  const float* from = p.position_a + item * p.position_a_stride[0] + i * p.position_a_stride[1];
  const float* to = p.position_b + item * p.position_b_stride[0] + j * p.position_b_stride[1];
  const float dx = from[0] - to[0], dy = from[1] - to[1];
  return sqrtf(fmaf(dx, dx, dy * dy));
}
// 1 - exp(-(time difference)^2 / (2 time_scale^2))
__device__ __forceinline__ float apart_in_time(const SinkhornParams& p, int64_t item, int64_t i,
                                               int64_t j) {
  const float from = p.time_a[item * p.time_a_stride[0] + i * p.time_a_stride[1]];
  const float to = p.time_b[item * p.time_b_stride[0] + j * p.time_b_stride[1]];
  const float apart = (from - to) / p.time_scale;
  return 1.0f - expf(-0.5f * apart * apart);
}

template <class Config>
struct CostRows : SimilarityRows<Config> {
  using Base = SimilarityRows<Config>;
  using Base::a, Base::b, Base::s, Base::row0, Base::row_of;
  using Base::kRowTiles;
  using typename Base::Dots;
  const SinkhornParams& p;

  __device__ CostRows(const SinkhornParams& p, SimilarityShared<Config>& s, int64_t item,
                      int64_t row0)
      : Base(p, s, item, row0), p(p) {}

  __device__ __forceinline__ float score(float cosine, int64_t i, int64_t j) const {
    float cost = 1.0f - cosine;
    if (p.offset) cost -= p.offset[a.item * p.offset_stride];
    if (p.position_a) {
      cost = fmaf(p.position_weight, apart_in_space(p, a.item, i, j), cost);
    }
    if (p.time_a) cost *= apart_in_time(p, a.item, i, j);
    return -cost / p.eps;
  }

  __device__ __forceinline__ void run() {
    this->sweep(0, p.b.count, [&](const Dots& dots, int64_t column0) {
#pragma unroll
      for (int n = 0; n < kRowTiles * (kSimilarityColumns / 8) * 4; ++n) {
        const int tile = n / (kSimilarityColumns / 2), j = n / 4 % (kSimilarityColumns / 8),
                  half = n / 2 % 2, e = n % 2;
        const int row = row_of(tile, half), column = 8 * j + lane_id() % 4 * 2 + e;
        const int64_t i = row0 + row, at = column0 + column;
        if (i >= p.a.count || at >= p.b.count) continue;
        const float dot = this->repaired(dots[tile][j][2 * half + e], row, column, column0);
        const float cosine = dot * s.rows.scale[row] * s.columns.scale[column];
        sinkhorn_scores(p)[(a.item * p.a.count + i) * p.b.count + at] =
            b.masked(at) ? -kInfinity : score(cosine, i, at);
      }
    });
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    sinkhorn_cost_kernel(const __grid_constant__ SinkhornParams p) {
  auto& s = shared_memory<SimilarityShared<Config>>();
  const int64_t tiles = (p.a.count + Config::kRows - 1) / Config::kRows;
  for (int64_t block = blockIdx.x; block < p.batch * tiles; block += gridDim.x) {
    CostRows<Config>(p, s, block / tiles, block % tiles * Config::kRows).run();
  }
}

// Steps ------------------------------------------------------------------------------------------

inline constexpr int kSinkhornWarps = kSinkhornThreads / kWarp;

struct SinkhornShared {
  BlockScratch<float> scratch;
  BlockScratch<int> counts;
  float top[kSinkhornWarps][kWarp], total[kSinkhornWarps][kWarp];
};

// The logarithm of a sum of exponentials: top + log(total).
struct LogSum {
  float top = -kInfinity, total = 0.0f;

  __device__ __forceinline__ void add(float x) { add(x, 1.0f); }
  __device__ __forceinline__ void add(float other_top, float other_total) {
    const float most = other_top > top ? other_top : top;
    if (most == -kInfinity) return;
    total = total * expf(top - most) + other_total * expf(other_top - most);
    top = most;
  }
};

struct SinkhornItem {
  const SinkhornParams& p;
  SinkhornShared& s;
  int64_t item;
  TokenRows a, b;
  const float* scores;
  float *log_u, *log_v;

  __device__ SinkhornItem(const SinkhornParams& p, SinkhornShared& s, int64_t item)
      : p(p), s(s), item(item), a{p.a, item}, b{p.b, item},
        scores(sinkhorn_scores(p) + item * p.a.count * p.b.count),
        log_u(p.log_u + item * p.a.count), log_v(p.log_v + item * p.b.count) {}

  __device__ int count(const TokenRows& rows) {
    int some = 0;
    for (int64_t t = threadIdx.x; t < rows.set.count; t += kSinkhornThreads) {
      some += !rows.masked(t);
    }
    int total;
    block_exclusive_sum<kSinkhornThreads>(some, s.counts, total);
    return total;
  }

  // f(i) for every source that takes part, by a warp.
  template <class F>
  __device__ __forceinline__ void each_source(F f) const {
    for (int64_t i = warp_id(); i < p.a.count; i += kSinkhornWarps) {
      if (!a.masked(i)) f(i);
    }
  }

  // combine(j, sum): the sum over the sources of exp(scores + log_u) of every anchor that takes
  // part. A warp has 32 neighbouring anchors and every kSinkhornWarps-th source.
  template <class F>
  __device__ __forceinline__ void each_anchor(F combine) {
    for (int64_t j0 = 0; j0 < p.b.count; j0 += kWarp) {
      const int64_t j = j0 + lane_id();
      LogSum sum;
      if (j < p.b.count)
        each_source([&](int64_t i) { sum.add(scores[i * p.b.count + j] + log_u[i]); });
      s.top[warp_id()][lane_id()] = sum.top;
      s.total[warp_id()][lane_id()] = sum.total;
      __syncthreads();
      if (warp_id() == 0 && j < p.b.count && !b.masked(j)) {
        for (int w = 1; w < kSinkhornWarps; ++w) {
          sum.add(s.top[w][lane_id()], s.total[w][lane_id()]);
        }
        combine(j, sum);
      }
      __syncthreads();
    }
  }

  __device__ void clear() {
    for (int64_t i = threadIdx.x; i < p.a.count; i += kSinkhornThreads) {
      log_u[i] = -kInfinity;
      p.peak[item * p.a.count + i] = 0.0f;
    }
    for (int64_t j = threadIdx.x; j < p.b.count; j += kSinkhornThreads) {
      log_v[j] = b.masked(j) ? -kInfinity : 0.0f;
      p.load[item * p.b.count + j] = 0.0f;
    }
    __syncthreads();
  }

  __device__ void run() {
    const int sources = count(a), anchors = count(b);
    clear();
    int64_t step = 0;
    if (sources == 0 || anchors == 0) {
      for (int64_t j = threadIdx.x; j < p.b.count; j += kSinkhornThreads) log_v[j] = -kInfinity;
    } else {
      const float log_a = -logf(static_cast<float>(sources));
      const float log_b = -logf(static_cast<float>(anchors));
      for (bool converged = false; step < p.iterations && !converged; ++step) {
        const float moved = scale_rows(log_a, step == 0);
        __syncthreads();
        each_anchor(
            [&](int64_t j, const LogSum& sum) { log_v[j] = log_b - sum.top - logf(sum.total); });
        const float change = block_sum<kSinkhornThreads>(moved, s.scratch);
        converged = change / static_cast<float>(sources) < p.tolerance;
      }
      finish();
    }
    if (threadIdx.x == 0)
      p.steps[item] = static_cast<int32_t>(step < 0x7fffffff ? step : 0x7fffffff);
    __syncthreads();
  }

  // Makes the sums of the rows right; the first lanes get how much exp(log_u) moved.
  __device__ float scale_rows(float log_a, bool first) {
    float moved = 0.0f;
    each_source([&](int64_t i) {
      const float* row = scores + i * p.b.count;
      float top = -kInfinity, total = 0.0f;
      for (int64_t j = lane_id(); j < p.b.count; j += kWarp) top = fmaxf(top, row[j] + log_v[j]);
      top = warp_max(top);
      for (int64_t j = lane_id(); j < p.b.count; j += kWarp) total += expf(row[j] + log_v[j] - top);
      const float scaled = log_a - top - logf(warp_sum(total));
      if (lane_id() == 0) {
        moved += fabsf(expf(scaled) - (first ? 1.0f : expf(log_u[i])));
        log_u[i] = scaled;
      }
    });
    return moved;
  }

  // The loads of the anchors and the peaks of the sources.
  __device__ void finish() {
    each_source([&](int64_t i) {
      const float* row = scores + i * p.b.count;
      float most = 0.0f, total = 0.0f;
      for (int64_t j = lane_id(); j < p.b.count; j += kWarp) {
        const float t = expf(row[j] + log_v[j] + log_u[i]);
        most = fmaxf(most, t);
        total += t;
      }
      most = warp_max(most);
      total = warp_sum(total);
      if (lane_id() == 0) p.peak[item * p.a.count + i] = most / total;
    });
    each_anchor([&](int64_t j, const LogSum& sum) {
      p.load[item * p.b.count + j] = expf(sum.top + log_v[j]) * sum.total;
    });
  }
};

__global__ void __launch_bounds__(kSinkhornThreads, 4)
    sinkhorn_kernel(const __grid_constant__ SinkhornParams p) {
  auto& s = shared_memory<SinkhornShared>();
  for (int64_t item = blockIdx.x; item < p.batch; item += gridDim.x) {
    SinkhornItem(p, s, item).run();
  }
}

// Aggregation ------------------------------------------------------------------------------------

struct AggregationShared {
  float plan[kAggregationSources][kAggregationAnchors];
  float x[kAggregationSources][kAggregationChannels];
};

// A tile of anchors by channels a block; a thread has two anchors by four channels.
template <class T>
__global__ void __launch_bounds__(kSinkhornThreads, 2)
    sinkhorn_aggregation_kernel(const __grid_constant__ SinkhornParams p) {
  auto& s = shared_memory<AggregationShared>();
  constexpr int kWide = kAggregationChannels / 4;
  static_assert(kSinkhornThreads == kWide * kAggregationAnchors / 2);
  const int64_t anchor_tiles = (p.b.count + kAggregationAnchors - 1) / kAggregationAnchors;
  const int64_t channel_tiles = (p.channels + kAggregationChannels - 1) / kAggregationChannels;
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t block = blockIdx.x; block < p.batch * anchor_tiles * channel_tiles;
       block += gridDim.x) {
    const int64_t c0 = block % channel_tiles * kAggregationChannels;
    const int64_t j0 = block / channel_tiles % anchor_tiles * kAggregationAnchors;
    const int64_t item = block / channel_tiles / anchor_tiles;
    const TokenRows a{p.a, item};
    const float* scores = sinkhorn_scores(p) + item * p.a.count * p.b.count;
    float sum[2][4] = {};
    for (int64_t i0 = 0; i0 < p.a.count; i0 += kAggregationSources) {
      for (int at = thread; at < kAggregationSources * kAggregationAnchors;
           at += kSinkhornThreads) {
        const int64_t i = i0 + at / kAggregationAnchors, j = j0 + at % kAggregationAnchors;
        const bool there = i < p.a.count && j < p.b.count && !a.masked(i);
        s.plan[at / kAggregationAnchors][at % kAggregationAnchors] =
            there ? expf(scores[i * p.b.count + j] + p.log_v[item * p.b.count + j] +
                         p.log_u[item * p.a.count + i])
                  : 0.0f;
      }
      for (int at = thread; at < kAggregationSources * kAggregationChannels;
           at += kSinkhornThreads) {
        const int64_t i = i0 + at / kAggregationChannels, c = c0 + at % kAggregationChannels;
        const bool there = i < p.a.count && c < p.channels && !a.masked(i);
        s.x[at / kAggregationChannels][at % kAggregationChannels] =
            there ? to_float(a.row<T>(i)[c]) : 0.0f;
      }
      __syncthreads();
#pragma unroll 8
      for (int i = 0; i < kAggregationSources; ++i) {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          sum[n / 4][n % 4] = fmaf(s.plan[i][thread / kWide * 2 + n / 4],
                                   s.x[i][thread % kWide + n % 4 * kWide], sum[n / 4][n % 4]);
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int64_t j = j0 + thread / kWide * 2 + n / 4, c = c0 + thread % kWide + n % 4 * kWide;
      if (j >= p.b.count || c >= p.channels) continue;
      p.aggregation[(item * p.b.count + j) * p.channels + c] = sum[n / 4][n % 4];
    }
  }
}

}  // namespace tokred::cuda::matching
