// packed_qk_score: codes and params once, and the scores. B = 8, Hkv = 8, T = 32768, D = 128 in 4
// bits and groups of 32: 168 MB and 34 MB of scores for 32 query heads, 47 us at the 4.3 TB/s that
// an H200 reaches; 268 M codes of some ten instructions each, four of them multiply-adds, are 95 us
// of all multiprocessors. Where fragments can be made from codes, code_score.cuh takes a quarter of
// it.
#include "attention/cuda/score_launch.h"
#include "packed_attn/cuda/launch.h"
#include "packed_attn/cuda/packed_qk_score.cuh"
#include "packed_attn/cuda/plan_codes.h"

namespace tokred::cuda {
namespace {

using namespace scoring;

template <class T, int kLanes, int kRows>
void launch_score(PackedScoreArgs a, Stream stream) {
  QkScoreArgs& score = a.score;
  const QkScoreParams& p = score.p;
  if (a.k.packed.format.rotated) {
    const int64_t rows = p.batch * (score.query.stride_batch / p.head_dim);
    launch(rotate_queries_kernel<kLanes>, plan_rotate_queries(rows, kLanes), stream,
           static_cast<float*>(const_cast<void*>(score.query.data)), rows, p.head_dim);
  }
  if (std::is_same_v<T, bf16> && score.rows <= kCodeRows && score.summed == 1 &&
      makes_fragments(a.k.packed.format)) {
    return launch_code_score(score, a.k, a.slots, stream);
  }
  const int64_t heads = p.batch * (p.heads_kv / score.summed);
  score.chunk = qk_score_chunk(heads, p.keys, kLanes);
  launch(packed_score_kernel<T, kLanes, kRows>, plan_qk_score(heads, p.keys, kLanes), stream, a);
}

template <class T, int kRows>
void launch_rows(const PackedScoreArgs& a, Stream stream) {
  switch (score_lanes(a.score.p.head_dim)) {
    case 8: return launch_score<T, 8, kRows>(a, stream);
    case 16: return launch_score<T, 16, kRows>(a, stream);
    default: return launch_score<T, 32, kRows>(a, stream);
  }
}

// Queries are rotated in the workspace.
bool stores_queries(const PackedScoreParams& p) {
  return scoring::stores_queries(p.score) || p.k.packed.format.rotated;
}

}  // namespace

int64_t packed_qk_score_workspace(const PackedScoreParams& p) {
  return score_workspace(p.score, stores_queries(p));
}

void packed_qk_score(const PackedScoreParams& p, Stream stream) {
  score_and_reduce(p.score, stores_queries(p), stream, [&]<class T>(QkScoreArgs& score) {
    const PackedScoreArgs a{score, p.k, p.slots};
    return a.score.rows == 1 ? launch_rows<T, 1>(a, stream)
                             : launch_rows<T, kPackedScoreRows>(a, stream);
  });
}

}  // namespace tokred::cuda
