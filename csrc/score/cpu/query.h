// The query rows that keys are scored with.
#pragma once

#include "score/cpu/heads.h"

namespace tokred::TOKRED_ISA {

// How the query heads become rows to score: the mean of a group's scores is that of its mean query.
struct QueryPlan {
  int64_t heads;      // of a row
  int64_t rows;       // a kv head
  int64_t stride;     // floats of a row, a multiple of 16

  explicit QueryPlan(const QkScoreParams& p)
      : heads(is_mean(p.reduction) ? p.heads_q / p.heads_kv : 1),
        rows(p.heads_q / p.heads_kv / heads), stride(divide_up(p.head_dim, kLanes) * kLanes) {}
  int64_t bytes(const QkScoreParams& p) const {
    return aligned(4 * p.batch * p.heads_kv * rows * stride) + kAlign;
  }
  float* row(const QkScoreParams& p, int64_t item, int64_t kv_head, int64_t r) const {
    auto* memory = reinterpret_cast<float*>(aligned(p.workspace));
    return memory + ((item * p.heads_kv + kv_head) * rows + r) * stride;
  }
  void* rest(const QkScoreParams& p) const {
    return static_cast<char*>(p.workspace) + bytes(p);
  }
};

// Calls visit(d) for the dimensions that a head looks at.
template <class Visit>
TOKRED_INLINE void each_dim(const QkScoreParams& p, int64_t head, const Visit& visit) {
  for (int64_t i = 0; i < p.num_dims; ++i) {
    const int32_t d = p.dims[head * p.num_dims + i];
    if (d >= 0 && d < p.head_dim) visit(d);
  }
}

// The mean over the queries, and over the heads of the result, times the scale; 0 in the dimensions
// that a head does not look at.
template <class T>
void pack_query(const QkScoreParams& p, const QueryPlan& plan, int64_t item, int64_t kv_head,
                int64_t r) {
  const int64_t first = (kv_head * plan.rows + r) * plan.heads;
  int64_t mean_over = p.queries;
  if (p.reduction == HeadReduction::group_mean) mean_over *= plan.heads;
  if (p.reduction == HeadReduction::head_mean) mean_over *= p.heads_q;
  float* row = plan.row(p, item, kv_head, r);
  for (int64_t d = 0; d < plan.stride; ++d) row[d] = 0;
  for (int64_t head = first; head < first + plan.heads; ++head) {
    const T* q =
        static_cast<const T*>(p.q.data) + item * p.q.stride_batch + head * p.q.stride_head;
    alignas(64) float total[kMaxHeadDim];
    for (int64_t d = 0; d < p.head_dim; d += kLanes) {
      f32x16 part = splat(0.0f);
      for (int64_t i = 0; i < p.queries; ++i) {
        part = part + load_row(q + i * p.q.stride_token + d, p.head_dim - d);
      }
      store(total + d, part * splat(p.scale) / splat(static_cast<float>(mean_over)));
    }
    if (p.dims) {
      each_dim(p, head, [&](int32_t d) { row[d] += total[d]; });
    } else {
      for (int64_t d = 0; d < p.head_dim; ++d) row[d] += total[d];
    }
  }
}

}  // namespace tokred::TOKRED_ISA
