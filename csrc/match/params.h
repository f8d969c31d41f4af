// Parameters of the match kernels. Every pointer carries its shape.
#pragma once

#include "common/types.h"

namespace tokred {

enum class Order : int32_t { tome, position };

// score[b][i] = max_j s(i, j) and index[b][i] = the smallest such j, over the j with mask, with
// |i - j| <= band (band < 0: no limit) and with s > -inf; NaN never wins. (-inf, -1) where no j is
// left or a_i itself is skipped. s(i, j) = weight_a[i] * weight_b[j] * metric(a_i, b_j).
// With k > 1 the k best such j in this order, then (-inf, -1).
struct MatchParams : TokenPairs {
  int64_t band;
  int64_t k;
  float* score;    // f32 [B, a.count, k]
  int32_t* index;  // i32 [B, a.count, k], row number in b
  void* workspace;  // match_workspace(params) bytes
};

// Which sources leave, and where every token goes. Sources are ranked:
//   matched ones by (score descending, row ascending), then masked ones, then unmatched ones;
//   positions out of range, repeated, or that are also destinations or prefix never leave.
// Fixed r: the first r leave, to the slot of their match, or nowhere (-1) where they have none.
// By threshold: matched sources with score > threshold leave, at most r of them; masked tokens map
// to -1. In both, a survivor whose slot would be >= N - r (fixed r) maps to -1.
// Slots, order tome: prefix, tokens on neither side (ascending), surviving sources (in rank order
//   where num_prefix = 0, else in row order), destinations in row order.
// Slots, order position: groups by the position of their first member.
struct BipartiteParams {
  MatchParams match;   // its score and index are scratch of the right size, its workspace has
                       // bipartite_soft_matching_workspace(params) bytes
  int64_t tokens;      // N
  int64_t r;           // already clamped to the limit
  int64_t num_prefix;
  Order order;
  bool by_threshold;
  float threshold;
  int32_t* token_map;  // i32 [B, N]
  int32_t* num_out;    // i32 [B]; null unless by_threshold
};

// Why an item has no assignment: its pairs are then -1 and its duals NaN.
struct AssignmentFailure {
  enum Kind : int32_t { kNone, kInvalid, kInfeasible } kind;
  int32_t row,
      column;  // kInvalid: of a cost that is NaN, or inf of the sign that no pair may have.
               // kInfeasible: a row, or a column (the other is -1), that gets no partner
};

// One to one, min(N, M) pairs (i, j) of the smallest total cost; with `maximize` of the largest,
// which is the smallest of -cost. In terms of c = cost or -cost: c = inf forbids a pair; the duals
// satisfy u_i + v_j <= c_ij, with equality on the pairs (up to the rounding of float64), and are 0
// for the columns (N < M) or rows (N > M) left over, at most 0 for the others of that side. Duals
// are written in the sign of `cost`.
struct LinearAssignmentParams {
  const void* cost;  // [B, N, M], contiguous columns
  int64_t stride_batch, stride_row;
  int64_t batch, rows, columns;
  DType dtype;
  bool maximize;
  int32_t* index;  // i32 [B, N], the column of a row, -1 for none
  double* row_dual;  // f64 [B, N]
  double* column_dual;  // f64 [B, M]
  AssignmentFailure* failure;  // [B] on the host; null where it is not read
  void* workspace;  // linear_assignment_workspace(params) bytes
};

// Entropic optimal transport from sources a = x [B, M, C] to anchors b [B, N, C], in the log
// domain: T_ij = exp(log_u_i + log_v_j - cost_ij / eps), whose rows sum to 1 / M' and columns to 1
// / N' (M' and N' count the rows with mask; the others take no part), and
//   cost_ij = (1 - cos_ij - offset + position_weight |position_i - position_j|)
//             * (1 - exp(-(time_i - time_j)^2 / (2 time_scale^2))),
// parts without their tensors left out. From log_v = 0, a step makes the rows right and then the
// columns; an item stops where mean_i |exp(log_u_i) - (the same a step ago, at first 1)| <
// tolerance.
struct SinkhornParams : TokenPairs {
  const float *position_a, *position_b;  // f32 [B, M, 2] and [B, N, 2], or null
  int64_t position_a_stride[2], position_b_stride[2];  // batch, token
  const float *time_a, *time_b;  // f32 [B, M] and [B, N], or null
  int64_t time_a_stride[2], time_b_stride[2];
  const float* offset;  // f32 [B] or null
  int64_t offset_stride;
  float position_weight, time_scale, eps, tolerance;
  int64_t iterations;  // at most
  float* aggregation;  // f32 [B, N, C] sum_i T_ij x_i
  float* load;  // f32 [B, N] sum_i T_ij
  float* peak;  // f32 [B, M] max_j T_ij / sum_j T_ij; 0 where skipped
  float* log_u;  // f32 [B, M]; -inf where skipped
  float* log_v;  // f32 [B, N]; -inf where skipped
  int32_t* steps;  // i32 [B]
  void* workspace;  // sinkhorn_workspace(params) bytes
};

inline constexpr int64_t kMaxKeptSteps = 1 << 16;  // on a device, which has room for all of them

// The gradients of x and anchors through the steps that were made, with S = -cost / eps and, of the
// step t, log_u_i = log a - logsumexp_j(S_ij + log_v_j of the step before) and log_v_j = log b -
// logsumexp_i(S_ij + log_u_i):
//   W_ij = T_ij (<grad_aggregation_j, x_i> + grad_load_j),
//   dS = W, gu_i = sum_j W_ij, gv_j = sum_i W_ij,
// and back from the last step, Q = exp(S + log_u + log_v) / b and P = exp(S + log_u + log_v of the
// step before) / a:
//   dS_ij -= gv_j Q_ij, gu_i -= sum_j gv_j Q_ij, then
//   dS_ij -= gu_i P_ij, gv_j = -sum_i gu_i P_ij, gu = 0;
// and on through the cost to the cosine and the rows; x_i gets sum_j T_ij grad_aggregation_j too.
// Rows that take no part, or whose norm is below kNormEps, have no gradient through the cosine.
struct SinkhornBackwardParams {
  SinkhornParams forward;  // without its results
  const float* grad_aggregation;  // f32 [B, N, C], channels contiguous
  int64_t aggregation_stride[2];  // batch, anchor
  const float* grad_load;  // f32 [B, N]
  int64_t load_stride[2];
  const int32_t* steps;  // i32 [B] that the items made
  int64_t steps_stride;
  int64_t max_steps;  // steps[b] are taken from 0 to this
  void* grad_x;  // dtype [B, M, C]
  void* grad_anchors;  // dtype [B, N, C]
  void* workspace;  // sinkhorn_backward_workspace(params) bytes
};

}  // namespace tokred
