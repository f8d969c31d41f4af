// transition_stats: the ratio of the norms of two rows and their cosine, a warp a row.
#pragma once

#include "common/cuda/row_io.cuh"
#include "score/cuda/plan.h"
#include "score/params.h"

namespace tokred::cuda::scoring {

template <class T, int kWidth>
__global__ void __launch_bounds__(kScoreThreads)
    transition_kernel(const __grid_constant__ TransitionParams p) {
  using RowPart = Part<T, kWidth, 2>;
  const int64_t row = int64_t{blockIdx.x} * (kScoreThreads / kWarp) + warp_id();
  if (row >= p.batch * p.tokens) return;
  const int64_t item = row / p.tokens, token = row % p.tokens;
  const T* x = static_cast<const T*>(p.before) + item * p.before_stride_batch +
               token * p.before_stride_token;
  const T* y =
      static_cast<const T*>(p.after) + item * p.after_stride_batch + token * p.after_stride_token;
  float before = 0.0f, after = 0.0f, dot = 0.0f;
  for (int64_t c = 0; c < p.channels; c += RowPart::kChannels) {
    RowPart left, right;
    left.load(x, c, p.channels);
    right.load(y, c, p.channels);
    RowPart::each(c, p.channels, [&](int n, int64_t) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float u = left.piece[n].get(i), v = right.piece[n].get(i);
        before = fmaf(u, u, before);
        after = fmaf(v, v, after);
        dot = fmaf(u, v, dot);
      }
    });
  }
  before = sqrtf(warp_sum(before));
  after = sqrtf(warp_sum(after));
  dot = warp_sum(dot);
  if (lane_id() != 0) return;
  // fmaxf would turn NaN into the bound.
  const auto clamped = [](float norm) { return norm < kNormEps ? kNormEps : norm; };
  p.ratio[row] = after / clamped(before);
  p.cosine[row] = dot / clamped(before) / clamped(after);
}

}  // namespace tokred::cuda::scoring
