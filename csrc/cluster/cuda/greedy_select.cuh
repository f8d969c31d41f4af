// greedy_select: at every step all tokens of an item are compared with the one that was picked
// last, eight lanes a token, and the block keeps the best score. For facility, tokens keep bounds
// of their gains, and a block sums a gain again where its bound is the best (lazy greedy).
#pragma once

#include "cluster/cuda/plan.h"
#include "cluster/params.h"
#include "common/cuda/block.cuh"
#include "common/cuda/row_io.cuh"

namespace tokred::cuda::greedy {

// A score and its token; -1 for none.
struct Best {
  float score = -kInfinity;
  int token = -1;

  __device__ __forceinline__ void meet(float other, int other_token) {
    // As an unsigned number, -1 is the largest token. NaN is never better.
    if (other > score ||
        (other == score && static_cast<unsigned>(other_token) < static_cast<unsigned>(token))) {
      score = other;
      token = other_token;
    }
  }
  // A score of -inf is none.
  __device__ __forceinline__ void offer(float other, int other_token) {
    if (other > -kInfinity) meet(other, other_token);
  }
};

struct BestScratch {
  float score[kWarp];
  int token[kWarp];
};

// Arrays of all items. `scale` is NaN where a token does not take part.
struct Scratch {
  float* scale;  // f32 [B, N]: what makes rows of unit length (cosine), else 1
  float* value;  // f32 [B, N]: the minimum or the sum of the distances, NaN where picked; for
                 //   facility, the maximum similarity with a picked token
  float* score;  // f32 [B, N]: as a first pick; of facility, the gain at an earlier step
  int32_t* seen;  // i32 [B, N]: that step
  Best* best;  // [2][B, parts]
  int64_t parts;
};

// The best over the block, in every thread.
__device__ __forceinline__ Best block_best(Best best, BestScratch& scratch) {
  const auto over_warp = [](Best some) {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const float score = __shfl_xor_sync(kAllLanes, some.score, step);
      some.meet(score, __shfl_xor_sync(kAllLanes, some.token, step));
    }
    return some;
  };
  best = over_warp(best);
  if (lane_id() == 0) {
    scratch.score[warp_id()] = best.score;
    scratch.token[warp_id()] = best.token;
  }
  __syncthreads();
  best = Best{};
  if (lane_id() < kGreedyThreads / kWarp) {
    best.score = scratch.score[lane_id()];
    best.token = scratch.token[lane_id()];
  }
  __syncthreads();
  return over_warp(best);
}

template <class T, int kWidth>
struct Rows {
  const GreedySelectParams& p;
  const Scratch& s;
  int64_t item;

  __device__ __forceinline__ const T* row(int64_t token) const {
    return static_cast<const T*>(p.x.data) + item * p.x.stride_batch + token * p.x.stride_token;
  }
  __device__ __forceinline__ int64_t at(int64_t token) const { return item * p.x.tokens + token; }
  __device__ __forceinline__ float weight(int64_t token) const {
    return p.x.weight ? p.x.weight[item * p.x.weight_stride_batch + token * p.x.weight_stride_token]
                      : 1.0f;
  }
  __device__ __forceinline__ bool takes_part(int64_t token) const {
    return s.scale[at(token)] == s.scale[at(token)];
  }
  // Calls f(a, b) for the channels of two rows that are this lane's.
  template <class F>
  __device__ __forceinline__ void both(int64_t i, int64_t j, F f) const {
    const T *a = row(i), *b = row(j);
    const int64_t lane = lane_id() % kGreedyLanes;
#pragma unroll(8 / kWidth)
    for (int64_t c = lane * kWidth; c < p.channels; c += kGreedyLanes * kWidth) {
      Piece<T, kWidth> left, right;
      left.load(a + c, p.channels - c);
      right.load(b + c, p.channels - c);
#pragma unroll
      for (int n = 0; n < kWidth; ++n) f(left.get(n), right.get(n));
    }
  }
  // Results of a pair are in every lane of the group.
  __device__ __forceinline__ float dot(int64_t i, int64_t j) const {
    float total = 0.0f;
    both(i, j, [&](float a, float b) { total = fmaf(a, b, total); });
    return warp_sum<kGreedyLanes>(total);
  }
  __device__ __forceinline__ float similarity(int64_t i, int64_t j) const {
    return dot(i, j) * s.scale[at(i)] * s.scale[at(j)];
  }
  // Of cosine half the square between unit rows, so that equal rows have the distance 0, but 1 -
  // cos beside rows with norms below kNormEps, which are shorter.
  __device__ __forceinline__ float distance(int64_t i, int64_t j) const {
    if (p.metric == Metric::dot) return -dot(i, j);
    const float scale_i = s.scale[at(i)], scale_j = s.scale[at(j)];
    float apart = 0.0f, dot = 0.0f;
    both(i, j, [&](float a, float b) {
      const float u = a * scale_i, v = b * scale_j;
      apart = fmaf(u - v, u - v, apart);
      dot = fmaf(u, v, dot);
    });
    apart = warp_sum<kGreedyLanes>(apart);
    if (p.metric == Metric::l2) return sqrtf(apart);
    dot = warp_sum<kGreedyLanes>(dot);
    constexpr float kLongest = 1.0f / kNormEps;
    return scale_i >= kLongest || scale_j >= kLongest ? 1.0f - dot : 0.5f * apart;
  }
  // f(token) for the tokens first, first + step, .. below last, in whole warps: `here` is false for
  // groups that have no token left, which get the last one.
  template <class F>
  __device__ __forceinline__ void each(int64_t first, int64_t last, F f) const {
    const int64_t group = threadIdx.x / kGreedyLanes;
    for (int64_t token0 = first; token0 < last; token0 += kGreedyGroups) {
      const int64_t token = token0 + group;
      f(min(token, last - 1), token < last);
    }
  }
};

// Squared norms, and scores as first picks.
template <class T, int kWidth>
__global__ void __launch_bounds__(kGreedyThreads, 1)
    greedy_prepare_kernel(const __grid_constant__ GreedySelectParams p,
                          const __grid_constant__ Scratch s) {
  const int64_t tokens = p.batch * p.x.tokens, group = threadIdx.x / kGreedyLanes;
  const int64_t stride = int64_t{gridDim.x} * kGreedyGroups;
  for (int64_t first = int64_t{blockIdx.x} * kGreedyGroups; first < tokens; first += stride) {
    const int64_t at = min(first + group, tokens - 1), token = at % p.x.tokens;
    const Rows<T, kWidth> rows{p, s, at / p.x.tokens};
    const float squared = rows.dot(token, token);
    if (lane_id() % kGreedyLanes != 0 || first + group >= tokens) continue;
    const bool is_masked =
        p.x.mask && !p.x.mask[rows.item * p.x.mask_stride_batch + token * p.x.mask_stride_token];
    const bool is_out = is_masked || !(squared < kInfinity);
    const float norm = sqrtf(squared);
    const float scale =
        p.metric == Metric::cosine ? 1.0f / (norm < kNormEps ? kNormEps : norm) : 1.0f;
    const bool from_zero = p.rule == GreedyRule::maxsum || p.rule == GreedyRule::facility;
    s.scale[at] = is_out ? kNaN : scale;
    s.value[at] = is_out ? kNaN : from_zero ? 0.0f : kInfinity;
    s.score[at] = is_out ? -kInfinity : p.first == FirstPick::norm ? squared : rows.weight(token);
    s.seen[at] = 0;
  }
}

// Scores as first picks by the distance to the nearest other token, a block a token.
template <class T, int kWidth>
__global__ void __launch_bounds__(kGreedyThreads, 1)
    greedy_isolated_kernel(const __grid_constant__ GreedySelectParams p,
                           const __grid_constant__ Scratch s) {
  auto& scratch = shared_memory<BestScratch>();
  for (int64_t at = blockIdx.x; at < p.batch * p.x.tokens; at += gridDim.x) {
    const Rows<T, kWidth> rows{p, s, at / p.x.tokens};
    const int64_t token = at % p.x.tokens;
    if (!rows.takes_part(token)) continue;
    Best nearest;
    rows.each(0, p.x.tokens, [&](int64_t other, bool here) {
      const float distance = rows.distance(other, token);
      if (here && other != token && rows.takes_part(other)) {
        nearest.meet(-distance, static_cast<int>(other));
      }
    });
    nearest = block_best(nearest, scratch);
    if (threadIdx.x == 0) {
      s.score[at] = rows.weight(token) * (nearest.token < 0 ? 0.0f : -nearest.score);
    }
  }
}

// The token that an item starts with, or -1.
__device__ __forceinline__ int start_of(const GreedySelectParams& p, const Scratch& s,
                                        int64_t item) {
  const int token = p.start ? p.start[item * p.start_stride] : -1;
  if (token < 0 || token >= p.x.tokens) return -1;
  const float scale = s.scale[item * p.x.tokens + token];
  return scale == scale ? token : -1;
}

// Step 0 ranks the first picks; step i > 0 picks token i - 1, the best of all parts, and ranks what
// is left. Blocks have an item each for all of the steps, or a part of one for one step.
template <class T, int kWidth>
__global__ void __launch_bounds__(kGreedyThreads, 1)
    greedy_select_kernel(const __grid_constant__ GreedySelectParams p,
                         const __grid_constant__ Scratch s, int64_t first_step, int64_t steps) {
  auto& scratch = shared_memory<BestScratch>();
  const int thread = static_cast<int>(threadIdx.x);
  const bool is_mmr = p.rule == GreedyRule::mmr;
  for (int64_t block = blockIdx.x; block < p.batch * s.parts; block += gridDim.x) {
    const int64_t item = block / s.parts, part = block % s.parts;
    const Rows<T, kWidth> rows{p, s, item};
    const int64_t length = (p.x.tokens + s.parts - 1) / s.parts;
    const int64_t begin = min(part * length, p.x.tokens);
    const int64_t end = min(begin + length, p.x.tokens);
    for (int64_t step = first_step; step < first_step + steps; ++step) {
      Best picked;
      if (step > 0) {
        const Best* best = s.best + (step - 1) % 2 * p.batch * s.parts + item * s.parts;
        for (int64_t i = thread; i < s.parts; i += kGreedyThreads) {
          picked.meet(best[i].score, best[i].token);
        }
        picked = block_best(picked, scratch);
        if (step == 1 && start_of(p, s, item) >= 0) picked.token = start_of(p, s, item);
        if (part == 0 && thread == 0) p.indices[item * p.k + step - 1] = picked.token;
        if (step == p.k) break;
      }
      Best best;
      if (step == 0) {
        for (int64_t token = begin + thread; token < end; token += kGreedyThreads) {
          best.offer(s.score[rows.at(token)], static_cast<int>(token));
        }
      } else if (picked.token >= 0) {
        rows.each(begin, end, [&](int64_t token, bool here) {
          const float distance = rows.distance(token, picked.token);
          const int64_t at = rows.at(token);
          float value = s.value[at];
          if (!here || lane_id() % kGreedyLanes != 0 || value != value) return;
          value = p.rule == GreedyRule::maxsum ? value + distance : fminf(value, distance);
          s.value[at] = token == picked.token ? kNaN : value;
          const float weight = rows.weight(token);
          const float score =
              is_mmr ? fmaf(1.0f - p.trade_off, value, p.trade_off * weight) : weight * value;
          if (token != picked.token) best.offer(score, static_cast<int>(token));
        });
      }
      best = block_best(best, scratch);
      if (thread == 0) s.best[step % 2 * p.batch * s.parts + block] = best;
      __syncthreads();
    }
  }
}

// The facility gain of a token, in every thread. Terms and sums only fall as tokens are picked, in
// floating point too, so an old gain is a bound.
template <class T, int kWidth>
__device__ __forceinline__ float sum_gain(const Rows<T, kWidth>& rows, int64_t token,
                                          BlockScratch<float>& scratch) {
  float gain = 0.0f;
  rows.each(0, rows.p.x.tokens, [&](int64_t other, bool here) {
    const float beyond = rows.similarity(other, token) - rows.s.value[rows.at(other)];
    if (here && lane_id() % kGreedyLanes == 0 && beyond > 0) gain += beyond;
  });
  return block_sum<kGreedyThreads>(gain, scratch);
}

template <class T, int kWidth>
__device__ __forceinline__ void cover(const Rows<T, kWidth>& rows, int64_t token) {
  rows.each(0, rows.p.x.tokens, [&](int64_t other, bool here) {
    const float similarity = rows.similarity(other, token);
    float& value = rows.s.value[rows.at(other)];
    if (here && lane_id() % kGreedyLanes == 0 && similarity > value) value = similarity;
  });
}

// Whether the first pick is the one of the largest gain.
__device__ __forceinline__ bool starts_by_gain(const GreedySelectParams& p, const Scratch& s,
                                               int64_t item) {
  return p.first == FirstPick::rule && start_of(p, s, item) < 0;
}

// The first pick of every item that is not chosen by gain.
template <class T, int kWidth>
__global__ void __launch_bounds__(kGreedyThreads, 1)
    facility_start_kernel(const __grid_constant__ GreedySelectParams p,
                          const __grid_constant__ Scratch s) {
  auto& scratch = shared_memory<BestScratch>();
  for (int64_t item = blockIdx.x; item < p.batch; item += gridDim.x) {
    const Rows<T, kWidth> rows{p, s, item};
    if (starts_by_gain(p, s, item)) continue;
    Best best;
    for (int64_t token = threadIdx.x; token < p.x.tokens; token += kGreedyThreads) {
      best.offer(s.score[rows.at(token)], static_cast<int>(token));
    }
    best = block_best(best, scratch);
    const int start = start_of(p, s, item);
    const int token = start >= 0 ? start : best.token;
    if (threadIdx.x == 0) p.indices[item * p.k] = token;
    if (token >= 0) cover(rows, token);
  }
}

// The gains of all tokens, a block a token.
template <class T, int kWidth>
__global__ void __launch_bounds__(kGreedyThreads, 1)
    facility_gains_kernel(const __grid_constant__ GreedySelectParams p,
                          const __grid_constant__ Scratch s) {
  auto& scratch = shared_memory<BlockScratch<float>>();
  for (int64_t at = blockIdx.x; at < p.batch * p.x.tokens; at += gridDim.x) {
    const Rows<T, kWidth> rows{p, s, at / p.x.tokens};
    const int64_t token = at % p.x.tokens;
    const bool by_gain = starts_by_gain(p, s, rows.item);
    const bool is_left = rows.takes_part(token) && (by_gain || p.indices[rows.item * p.k] != token);
    const float gain = sum_gain(rows, token, scratch);
    if (threadIdx.x != 0) continue;
    s.score[at] = is_left ? rows.weight(token) * gain : -kInfinity;
    s.seen[at] = by_gain ? 0 : 1;
  }
}

// All other picks of an item, by one block.
template <class T, int kWidth>
__global__ void __launch_bounds__(kGreedyThreads, 1)
    facility_select_kernel(const __grid_constant__ GreedySelectParams p,
                           const __grid_constant__ Scratch s) {
  auto& scratch = shared_memory<BestScratch>();
  auto& sums = shared_memory<BlockScratch<float>>();
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t item = blockIdx.x; item < p.batch; item += gridDim.x) {
    const Rows<T, kWidth> rows{p, s, item};
    int32_t* indices = p.indices + item * p.k;
    const bool by_gain = starts_by_gain(p, s, item);
    int64_t count = by_gain ? 0 : 1;
    const bool is_over = !by_gain && indices[0] < 0;
    while (count < p.k && !is_over) {
      Best best;
      for (int64_t token = thread; token < p.x.tokens; token += kGreedyThreads) {
        const int64_t at = rows.at(token);
        float score = s.score[at];
        // A negative weight makes a falling gain a rising score.
        if (s.seen[at] < count && score > -kInfinity && rows.weight(token) < 0) score = kInfinity;
        best.offer(score, static_cast<int>(token));
      }
      best = block_best(best, scratch);
      if (best.token < 0) break;
      const int64_t at = rows.at(best.token);
      const bool is_known = s.seen[at] == count;
      __syncthreads();
      if (is_known) {
        cover(rows, best.token);
        if (thread == 0) {
          indices[count] = best.token;
          s.score[at] = -kInfinity;
        }
        ++count;
      } else {
        const float gain = sum_gain(rows, best.token, sums);
        if (thread == 0) {
          const float score = rows.weight(best.token) * gain;
          s.score[at] = score > -kInfinity ? score : -kInfinity;
          s.seen[at] = static_cast<int32_t>(count);
        }
      }
      __syncthreads();
    }
    for (int64_t i = count + thread; i < p.k; i += kGreedyThreads) indices[i] = -1;
  }
}

}  // namespace tokred::cuda::greedy
