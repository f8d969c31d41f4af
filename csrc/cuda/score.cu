// qk_score and transition_stats. Floor of qk_score at decode, B = 8, Hkv = 8, N = 32768, D = 128 in
// bf16: 537 MB of keys and 34 MB of scores for 32 query heads, 0.12 ms at the 4.8 TB/s of an H200;
// 1.1 G multiply-adds and some 60 M warp instructions in all, 0.07 ms. A vote reads and writes the
// scores once more. transition_stats reads its two inputs once.
#include "launch.h"
#include "score.cuh"

namespace tokred::cuda {
namespace {

using namespace scoring;

bool is_mean(HeadReduction reduction) {
  return reduction == HeadReduction::group_mean || reduction == HeadReduction::head_mean;
}

// The dot product is linear, so a mean over heads is the score of the mean query; unless every head
// has dimensions of its own.
bool averages_queries(const QkScoreParams& p) { return is_mean(p.reduction) && !p.dims; }
bool stores_queries(const QkScoreParams& p) { return averages_queries(p) || p.queries != 1; }

int64_t stored_query_bytes(const QkScoreParams& p) {
  return stores_queries(p) ? round_up(4 * p.batch * p.heads_q * p.head_dim, 16) : 0;
}

template <class T>
QkScoreArgs score_args(const QkScoreParams& p, Stream stream) {
  const int64_t group = p.heads_q / p.heads_kv;
  QkScoreArgs a{p, p.q, p.dtype, is_mean(p.reduction) ? 1 : group, 1, 1, 0, p.scale, p.out};
  if (p.reduction == HeadReduction::head_mean) a.summed = p.heads_kv;
  if (stores_queries(p)) {
    const int64_t heads = averages_queries(p) ? group : 1, rows = p.heads_q / heads;
    auto* mean = static_cast<float*>(p.workspace);
    launch(mean_query_kernel<T>, plan_score_elements(p.batch * rows * p.head_dim), stream, p,
           heads, mean);
    a.query = {mean, rows * p.head_dim, p.head_dim, 0};
    a.query_dtype = DType::f32;
  }
  if (is_mean(p.reduction) && p.dims) a.terms = group;
  a.scale /= static_cast<float>(a.terms * a.summed);
  return a;
}

template <class T, int kLanes, int kRows, bool kListed>
void launch_score(QkScoreArgs& a, Stream stream) {
  const int64_t heads = a.p.batch * (a.p.heads_kv / a.summed);
  a.chunk = qk_score_chunk(heads, a.p.keys, kLanes);
  launch(qk_score_kernel<T, kLanes, kRows, kListed>, plan_qk_score(heads, a.p.keys, kLanes),
         stream, a);
}

template <class T, int kRows>
void launch_rows(QkScoreArgs& a, Stream stream) {
  if (a.p.dims) return launch_score<T, kGatherLanes, kRows, true>(a, stream);
  switch (score_lanes(a.p.head_dim)) {
    case 8: return launch_score<T, 8, kRows, false>(a, stream);
    case 16: return launch_score<T, 16, kRows, false>(a, stream);
    default: return launch_score<T, 32, kRows, false>(a, stream);
  }
}

}  // namespace

int64_t qk_score_workspace(const QkScoreParams& p) {
  const bool votes = p.reduction == HeadReduction::softmax_vote;
  return stored_query_bytes(p) + (votes ? head_scores_bytes(p.batch * p.heads_q, p.keys) : 0);
}

void qk_score(const QkScoreParams& p, Stream stream) {
  const int64_t rows = p.batch * p.heads_q;
  HeadScores votes{nullptr, nullptr, p.out, p.batch, p.heads_q, p.heads_kv, 1, p.keys,
                   p.reduction};
  if (rows == 0) {  // no heads: sums over nothing
    if (p.reduction == HeadReduction::none) return;
    return launch(reduce_heads_kernel<kScoreThreads>, plan_reduce_heads(votes), stream, votes);
  }
  visit_dtype(p.dtype, [&]<class T>() {
    QkScoreArgs a = score_args<T>(p, stream);
    if (p.reduction == HeadReduction::softmax_vote) {
      auto* base = static_cast<char*>(p.workspace) + stored_query_bytes(p);
      a.out = reinterpret_cast<float*>(base);
      votes.scores = a.out;
      votes.rows = reinterpret_cast<SoftmaxRow*>(base + round_up(4 * rows * p.keys, 16));
    }
    return a.rows == 1 ? launch_rows<T, 1>(a, stream) : launch_rows<T, kScoreRows>(a, stream);
  });
  if (p.reduction != HeadReduction::softmax_vote) return;
  launch(softmax_rows_kernel<kSoftmaxThreads>, plan_softmax_rows(rows), stream, votes);
  launch(reduce_heads_kernel<kScoreThreads>, plan_reduce_heads(votes), stream, votes);
}

void transition_stats(const TransitionParams& p, Stream stream) {
  const LaunchPlan plan = plan_transition(p.batch * p.tokens);
  visit_dtype(p.dtype, [&]<class T>() {
    const auto address =
        reinterpret_cast<uintptr_t>(p.before) | reinterpret_cast<uintptr_t>(p.after);
    const int64_t steps = p.before_stride_batch | p.before_stride_token | p.after_stride_batch |
                          p.after_stride_token | p.channels;
    if ((address | static_cast<uintptr_t>(steps) * sizeof(T)) % 16 == 0) {
      launch(transition_kernel<T, 16 / sizeof(T)>, plan, stream, p);
    } else {
      launch(transition_kernel<T, 1>, plan, stream, p);
    }
  });
}

}  // namespace tokred::cuda
