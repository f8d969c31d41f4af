// The softmax of rows of scores in global memory, and the reduction of the scores of several heads.
#pragma once

#include "attention/cuda/plan_scores.h"
#include "attention/score_params.h"
#include "common/cuda/block.cuh"
#include "common/cuda/row_io.cuh"

namespace tokred::cuda::scoring {

// exp(x), 0 where it would be subnormal, as on the CPU.
__device__ __forceinline__ float exp_or_zero(float x) { return x < -87.3365f ? 0.0f : expf(x); }

// A row's largest score, and 1 / sum exp(score - top); 0 where there is nothing above -inf.
struct SoftmaxRow {
  float top, inverse;

  __device__ __forceinline__ float weight(float score) const {
    return score == -kInfinity || inverse == 0.0f ? 0.0f : exp_or_zero(score - top) * inverse;
  }
};

template <int kThreads>
__device__ __forceinline__ float block_max(float x, BlockScratch<float>& scratch) {
  x = warp_max(x);
  if (lane_id() == 0) scratch.partial[warp_id()] = x;
  __syncthreads();
  x = lane_id() < kThreads / kWarp ? scratch.partial[lane_id()] : -kInfinity;
  __syncthreads();
  return warp_max(x);
}

// Four numbers of a row that lie kThreads apart, from `at` on; -inf from `last` on.
template <int kThreads>
__device__ __forceinline__ void load_four(float (&x)[4], const float* row, int64_t at,
                                          int64_t last) {
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = at + i * kThreads < last ? row[at + i * kThreads] : -kInfinity;
}

// Of row[first .. last), by the whole block, after a barrier behind the writes of the row. One
// pass: every thread has a largest score and a sum of its own (the recurrence of
// arXiv 1805.02867).
template <int kThreads>
__device__ __forceinline__ SoftmaxRow softmax_row(const float* row, int64_t first, int64_t last,
                                                  BlockScratch<float>& scratch) {
  const auto base_of = [](float top) { return top == -kInfinity ? 0.0f : top; };
  float top = -kInfinity, sum = 0.0f;
  for (int64_t at = first + threadIdx.x; at < last; at += 4 * kThreads) {
    float x[4];
    load_four<kThreads>(x, row, at, last);
    const float next = fmaxf(top, fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])));
    sum *= exp_or_zero(top - base_of(next));
    top = next;
#pragma unroll
    for (float score : x) sum += exp_or_zero(score - base_of(top));
  }
  const float max_score = block_max<kThreads>(top, scratch);
  sum = block_sum<kThreads>(sum * exp_or_zero(top - base_of(max_score)), scratch);
  return {max_score, sum == 0.0f ? 0.0f : 1.0f / sum};
}

// Scores f32 [B, Hq, R, N] to out f32 [B, H', R, N]. For a vote, rows [B, Hq, R] is scratch.
struct HeadScores {
  const float* scores;
  SoftmaxRow* rows;
  float* out;
  int64_t batch, heads_q, heads_kv, row_count, columns;
  HeadReduction reduction;
};

template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    softmax_rows_kernel(const __grid_constant__ HeadScores p) {
  auto& scratch = shared_memory<BlockScratch<float>>();
  const int64_t rows = p.batch * p.heads_q * p.row_count;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const SoftmaxRow result =
        softmax_row<kThreads>(p.scores + row * p.columns, 0, p.columns, scratch);
    if (threadIdx.x == 0) p.rows[row] = result;
  }
}

// The heads of a reduction's results.
__device__ __host__ inline int64_t reduced_heads(const HeadScores& p) {
  const bool by_group =
      p.reduction == HeadReduction::group_mean || p.reduction == HeadReduction::group_max;
  return by_group ? p.heads_kv : 1;
}

// A thread for each result, over the heads in order.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    reduce_heads_kernel(const __grid_constant__ HeadScores p) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t outputs = reduced_heads(p), heads = p.heads_q / outputs;
  const int64_t plane = p.row_count * p.columns;
  if (at >= p.batch * outputs * plane) return;
  const int64_t first_head = at / plane * heads, inside = at % plane;
  const bool is_max = p.reduction == HeadReduction::group_max;
  float result = is_max ? -kInfinity : 0.0f;
  for (int64_t head = first_head; head < first_head + heads; ++head) {
    float x = p.scores[head * plane + inside];
    if (p.reduction == HeadReduction::softmax_vote) {
      x = p.rows[head * p.row_count + inside / p.columns].weight(x);
    }
    result = is_max ? max_or_nan(result, x) : result + x;
  }
  const bool is_mean =
      p.reduction == HeadReduction::group_mean || p.reduction == HeadReduction::head_mean;
  p.out[at] = is_mean ? result / static_cast<float>(heads) : result;
}

inline LaunchPlan plan_reduce_heads(const HeadScores& p) {
  return plan_score_elements(p.batch * reduced_heads(p) * p.row_count * p.columns);
}

// Bytes of scores and of their SoftmaxRows.
inline int64_t head_scores_bytes(int64_t rows, int64_t columns) {
  return round_up(4 * rows * columns, 16) + static_cast<int64_t>(sizeof(SoftmaxRow)) * rows;
}

}  // namespace tokred::cuda::scoring
