// qk_score: its floor at decode, B = 8, Hkv = 8, N = 32768, D = 128 in
// bf16: 537 MB of keys and 34 MB of scores for 32 query heads, 0.12 ms at the 4.8 TB/s of an H200;
// 1.1 G multiply-adds and some 60 M warp instructions in all, 0.07 ms. A vote reads and writes the
// scores once more.
#include "attention/cuda/score_launch.h"
#include "score/cuda/qk_score.cuh"

namespace tokred::cuda {
namespace {

using namespace scoring;

template <class T, int kLanes, int kRows, bool kListed>
void launch_score(QkScoreArgs& a, Stream stream) {
  const int64_t heads = a.p.batch * (a.p.heads_kv / a.summed);
  a.chunk = qk_score_chunk(heads, a.p.keys, kLanes);
  launch(qk_score_kernel<T, kLanes, kRows, kListed>, plan_qk_score(heads, a.p.keys, kLanes), stream,
         a);
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

int64_t qk_score_workspace(const QkScoreParams& p) { return score_workspace(p, stores_queries(p)); }

void qk_score(const QkScoreParams& p, Stream stream) {
  score_and_reduce(p, stores_queries(p), stream, [&]<class T>(QkScoreArgs& a) {
    return a.rows == 1 ? launch_rows<T, 1>(a, stream) : launch_rows<T, kScoreRows>(a, stream);
  });
}

}  // namespace tokred::cuda
