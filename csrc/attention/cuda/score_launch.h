// Launches that qk_score and packed_qk_score share: mean queries before the scores, the reduction
// of heads after them.
#pragma once

#include "attention/cuda/qk_score.cuh"
#include "common/cuda/launch.h"

namespace tokred::cuda::scoring {

inline bool is_mean(HeadReduction reduction) {
  return reduction == HeadReduction::group_mean || reduction == HeadReduction::head_mean;
}

// The dot product is linear, so a mean over heads is the score of the mean query; unless every head
// has dimensions of its own.
inline bool averages_queries(const QkScoreParams& p) { return is_mean(p.reduction) && !p.dims; }
// Whether the workspace begins with queries in f32.
inline bool stores_queries(const QkScoreParams& p) { return averages_queries(p) || p.queries != 1; }

inline int64_t stored_query_bytes(const QkScoreParams& p, bool stores) {
  return stores ? round_up(4 * p.batch * p.heads_q * p.head_dim, 16) : 0;
}
inline int64_t score_workspace(const QkScoreParams& p, bool stores) {
  const bool votes = p.reduction == HeadReduction::softmax_vote;
  return stored_query_bytes(p, stores) +
         (votes ? head_scores_bytes(p.batch * p.heads_q, p.keys) : 0);
}

template <class T>
QkScoreArgs score_args(const QkScoreParams& p, bool stores, Stream stream) {
  const int64_t group = p.heads_q / p.heads_kv;
  QkScoreArgs a{p, p.q, p.dtype, is_mean(p.reduction) ? 1 : group, 1, 1, 0, p.scale, p.out};
  if (p.reduction == HeadReduction::head_mean) a.summed = p.heads_kv;
  if (stores) {
    const int64_t heads = averages_queries(p) ? group : 1, rows = p.heads_q / heads;
    auto* mean = static_cast<float*>(p.workspace);
    launch(mean_query_kernel<T>, plan_score_elements(p.batch * rows * p.head_dim), stream, p, heads,
           mean);
    a.query = {mean, rows * p.head_dim, p.head_dim, 0};
    a.query_dtype = DType::f32;
  }
  if (is_mean(p.reduction) && p.dims) a.terms = group;
  a.scale /= static_cast<float>(a.terms * a.summed);
  return a;
}

// launch_scores.operator()<T>(args) launches the scores of the heads; then heads vote.
template <class F>
void score_and_reduce(const QkScoreParams& p, bool stores, Stream stream, F&& launch_scores) {
  const int64_t rows = p.batch * p.heads_q;
  HeadScores votes{nullptr, nullptr, p.out, p.batch, p.heads_q, p.heads_kv, 1, p.keys, p.reduction};
  if (rows == 0) {  // no heads: sums over nothing
    if (p.reduction == HeadReduction::none) return;
    return launch(reduce_heads_kernel<kScoreThreads>, plan_reduce_heads(votes), stream, votes);
  }
  visit_dtype(p.dtype, [&]<class T>() {
    QkScoreArgs a = score_args<T>(p, stores, stream);
    if (p.reduction == HeadReduction::softmax_vote) {
      auto* base = static_cast<char*>(p.workspace) + stored_query_bytes(p, stores);
      a.out = reinterpret_cast<float*>(base);
      votes.scores = a.out;
      votes.rows = reinterpret_cast<SoftmaxRow*>(base + round_up(4 * rows * p.keys, 16));
    }
    launch_scores.template operator()<T>(a);
  });
  if (p.reduction != HeadReduction::softmax_vote) return;
  launch(softmax_rows_kernel<kSoftmaxThreads>, plan_softmax_rows(rows), stream, votes);
  launch(reduce_heads_kernel<kScoreThreads>, plan_reduce_heads(votes), stream, votes);
}

}  // namespace tokred::cuda::scoring
