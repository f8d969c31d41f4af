// adjacent_runs: a warp for every cosine, then a block for every item, which cuts it into runs by
// scans over kRunThreads tokens at a time.
#pragma once

#include "common/cuda/block.cuh"
#include "common/cuda/row_io.cuh"
#include "merge/cuda/plan.h"
#include "merge/params.h"

namespace tokred::cuda::merging {

__device__ __forceinline__ bool is_live(const AdjacentRunsParams& p, int64_t item, int64_t token) {
  return !p.mask || p.mask[item * p.mask_stride_batch + token * p.mask_stride_token];
}

__device__ __forceinline__ float inverse_norm(float squared) {
  const float norm = sqrtf(squared);
  return 1.0f / (norm < kNormEps ? kNormEps : norm);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kMergeThreads)
    adjacent_cosine_kernel(const __grid_constant__ AdjacentRunsParams p) {
  using RowPart = Part<T, kWidth, 2>;
  const int64_t row = int64_t{blockIdx.x} * (kMergeThreads / kWarp) + warp_id();
  if (row >= p.batch * p.tokens) return;
  const int64_t item = row / p.tokens, token = row % p.tokens;
  if (token == 0 || !is_live(p, item, token) || !is_live(p, item, token - 1)) {
    if (lane_id() == 0) p.cosine[row] = 0.0f;
    return;
  }
  const T* x =
      static_cast<const T*>(p.x) + item * p.x_stride_batch + (token - 1) * p.x_stride_token;
  const T* y = static_cast<const T*>(p.y) + item * p.y_stride_batch + token * p.y_stride_token;
  float dot = 0.0f, xx = 0.0f, yy = 0.0f;
  for (int64_t c = 0; c < p.channels; c += RowPart::kChannels) {
    RowPart left, right;
    left.load(x, c, p.channels);
    right.load(y, c, p.channels);
    RowPart::each(c, p.channels, [&](int n, int64_t) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float a = left.piece[n].get(i), b = right.piece[n].get(i);
        dot = fmaf(a, b, dot);
        xx = fmaf(a, a, xx);
        yy = fmaf(b, b, yy);
      }
    });
  }
  dot = warp_sum(dot) * inverse_norm(warp_sum(xx)) * inverse_norm(warp_sum(yy));
  if (lane_id() == 0) p.cosine[row] = dot;
}

struct RunShared {
  BlockScratch<int> scratch;
};

// The last token up to this thread's for which `set` holds, or `before`, the last of the chunks
// before this one; `before` becomes that of the whole chunk.
template <int kThreads>
__device__ __forceinline__ int last_set(bool set, int first, int& before,
                                        BlockScratch<int>& scratch) {
  const unsigned ballot = __ballot_sync(kAllLanes, set);
  const int warp_first = first + warp_id() * kWarp;
  const auto highest = [&](unsigned bits) { return bits ? warp_first + 31 - __clz(bits) : -1; };
  if (lane_id() == 0) scratch.partial[warp_id()] = highest(ballot);
  __syncthreads();
  const int partial = lane_id() < kThreads / kWarp ? scratch.partial[lane_id()] : -1;
  __syncthreads();
  const int earlier = warp_max(lane_id() < warp_id() ? partial : before);
  const int mine = highest(ballot & (kAllLanes >> (kWarp - 1 - lane_id())));
  before = warp_max(max(partial, before));
  return max(mine, earlier);
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    adjacent_runs_kernel(const __grid_constant__ AdjacentRunsParams p) {
  auto& scratch = shared_memory<RunShared>().scratch;
  const int64_t item = blockIdx.x;
  const int tokens = static_cast<int>(p.tokens), thread = static_cast<int>(threadIdx.x);
  int32_t* ids = p.ids + item * p.tokens;
  int32_t* start = p.start + item * p.tokens;
  int32_t* length = p.length + item * p.tokens;

  int live_tokens = 0;
  for (int t = thread; t < tokens; t += kThreads) live_tokens += is_live(p, item, t);
  block_exclusive_sum<kThreads>(live_tokens, scratch, live_tokens);
  const int first_local = live_tokens - static_cast<int>(p.num_locals);
  const auto is_free = [&](int rank) { return rank >= p.num_sinks && rank < first_local; };

  int rank_before = 0, runs = 0, break_before = -1;
  for (int first = 0; first < tokens; first += kThreads) {
    const int t = first + thread;
    const bool live = t < tokens && is_live(p, item, t);
    int total = 0;
    const int rank = rank_before + block_exclusive_sum<kThreads>(live, scratch, total);
    rank_before += total;
    const bool joins = live && t > 0 && is_live(p, item, t - 1) && is_free(rank) &&
                       is_free(rank - 1) && p.cosine[item * p.tokens + t] >= p.threshold;
    const int broken = last_set<kThreads>(live && !joins, first, break_before, scratch);
    const bool starts = live && (t - broken) % p.max_length == 0;
    const int run = runs + block_exclusive_sum<kThreads>(starts, scratch, total) + starts - 1;
    runs += total;
    if (t < tokens) ids[t] = live ? run : -1;
    if (starts) start[run] = t;
  }
  if (thread == 0) p.count[item] = runs;
  __syncthreads();  // ids and starts are written
  for (int t = thread; t < tokens; t += kThreads) {
    const int run = ids[t];
    if (run >= 0 && (t + 1 == tokens || ids[t + 1] != run)) length[run] = t + 1 - start[run];
    if (t >= runs) start[t] = length[t] = -1;
  }
}

}  // namespace tokred::cuda::merging
