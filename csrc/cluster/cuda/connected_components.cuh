// connected_components: a warp finds the edges of a token; a block unites the trees of an item
// under their smallest positions with atomics, whose order never shows, and numbers the roots by a
// scan.
#pragma once

#include "cluster/cuda/plan.h"
#include "cluster/params.h"
#include "common/cuda/block.cuh"
#include "common/cuda/row_io.cuh"

namespace tokred::cuda::clustering {

inline constexpr uint8_t kRight = 1, kBelow = 2;  // joined to the neighbour there

__device__ __forceinline__ bool is_masked(const ConnectedComponentsParams& p, int64_t item,
                                          int64_t token) {
  return p.mask && !p.mask[item * p.mask_stride_batch + token * p.mask_stride_token];
}

// Whether two rows are nearer than the threshold, in every lane.
template <class T, int kWidth>
__device__ __forceinline__ bool is_near(const ConnectedComponentsParams& p, const T* x,
                                        const T* y) {
  using RowPart = Part<T, kWidth, 2>;
  float first = 0.0f, second = 0.0f, dot = 0.0f, apart = 0.0f;
  for (int64_t c = 0; c < p.channels; c += RowPart::kChannels) {
    RowPart left, right;
    left.load(x, c, p.channels);
    right.load(y, c, p.channels);
    RowPart::each(c, p.channels, [&](int n, int64_t) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float u = left.piece[n].get(i), v = right.piece[n].get(i);
        first = fmaf(u, u, first);
        second = fmaf(v, v, second);
        dot = fmaf(u, v, dot);
        apart = fmaf(u - v, u - v, apart);
      }
    });
  }
  if (p.metric == Metric::l2) return sqrtf(warp_sum(apart)) < p.threshold;
  // fmaxf would turn NaN into the bound.
  const auto inverse = [](float squared) {
    const float norm = sqrtf(squared);
    return 1.0f / (norm < kNormEps ? kNormEps : norm);
  };
  const float cosine = warp_sum(dot) * inverse(warp_sum(first)) * inverse(warp_sum(second));
  return 1.0f - cosine < p.threshold;
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kEdgeThreads)
    grid_edges_kernel(const __grid_constant__ ConnectedComponentsParams p, uint8_t* edges) {
  constexpr int64_t kWarps = kEdgeThreads / kWarp;
  const int64_t tokens = p.height * p.width;
  for (int64_t at = blockIdx.x * kWarps + warp_id(); at < p.batch * tokens;
       at += gridDim.x * kWarps) {
    const int64_t item = at / tokens, token = at % tokens;
    const int64_t row = token / p.width, column = token % p.width;
    const T* x = static_cast<const T*>(p.x) + item * p.stride_batch + row * p.stride_row +
                 column * p.stride_column;
    uint8_t edge = 0;
    if (!is_masked(p, item, token)) {
      if (column + 1 < p.width && !is_masked(p, item, token + 1) &&
          is_near<T, kWidth>(p, x, x + p.stride_column)) {
        edge |= kRight;
      }
      if (row + 1 < p.height && !is_masked(p, item, token + p.width) &&
          is_near<T, kWidth>(p, x, x + p.stride_row)) {
        edge |= kBelow;
      }
    }
    if (lane_id() == 0) edges[at] = edge;
  }
}

// Parents only ever get smaller, so that a root stays the smallest position of its tree.
__device__ __forceinline__ int root_of(const volatile int32_t* parent, int token) {
  for (int up = parent[token]; up != token; up = parent[token]) token = up;
  return token;
}
__device__ __forceinline__ void join(int32_t* parent, int a, int b) {
  for (;;) {
    a = root_of(parent, a);
    b = root_of(parent, b);
    if (a == b) return;
    const int low = min(a, b), high = max(a, b);
    // If `high` had got a parent meanwhile, that tree and this one are joined next.
    const int before = atomicMin(&parent[high], low);
    if (before == high) return;
    a = before;
    b = low;
  }
}

__global__ void __launch_bounds__(kLabelThreads)
    grid_labels_kernel(const __grid_constant__ ConnectedComponentsParams p, const uint8_t* edges,
                       int32_t* numbers) {
  auto& scratch = shared_memory<BlockScratch<int>>();
  const int tokens = static_cast<int>(p.height * p.width), width = static_cast<int>(p.width);
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t item = blockIdx.x; item < p.batch; item += gridDim.x) {
    int32_t* parent = p.labels + item * tokens;
    int32_t* number = numbers + item * tokens;
    const uint8_t* edge = edges + item * tokens;
    for (int64_t t = thread; t < tokens; t += kLabelThreads) parent[t] = static_cast<int32_t>(t);
    __syncthreads();
    for (int64_t t = thread; t < tokens; t += kLabelThreads) {
      const int token = static_cast<int>(t);
      if (edge[t] & kRight) join(parent, token, token + 1);
      if (edge[t] & kBelow) join(parent, token, token + width);
    }
    __syncthreads();
    int count = 0;
    for (int64_t tile = 0; tile < tokens; tile += kLabelThreads) {
      const int64_t t = tile + thread;
      const bool is_root = t < tokens && parent[t] == t && !is_masked(p, item, t);
      int total;
      const int before = block_exclusive_sum<kLabelThreads>(is_root, scratch, total);
      if (is_root) number[t] = count + before;
      count += total;
    }
    if (thread == 0) p.counts[item] = count;
    __syncthreads();
    // A path may lead over a token that has its label already, so roots are found first.
    for (int64_t t = thread; t < tokens; t += kLabelThreads) {
      const int root = root_of(parent, static_cast<int>(t));
      if (root != t) number[t] = number[root];
    }
    __syncthreads();
    for (int64_t t = thread; t < tokens; t += kLabelThreads) {
      parent[t] = is_masked(p, item, t) ? -1 : number[t];
    }
    __syncthreads();
  }
}

}  // namespace tokred::cuda::clustering
