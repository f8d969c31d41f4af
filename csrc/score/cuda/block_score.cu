// block_score: at decode it reads the pooled blocks once; with L queries it takes 2 B Hq L M D
// operations on the fp32 units (4 of the kind for bounds and deviation): Hq = 32, L = M = 512,
// D = 128 are 2.1 GFLOP, 0.1 ms at a third of the 67 TFLOP/s of an H200.
#include "common/cuda/launch.h"
#include "score/cuda/block_score.cuh"

namespace tokred::cuda {
namespace {

using namespace scoring;

template <BlockRule kRule>
void launch_block_score(const BlockScoreParams& p, float* out, Stream stream) {
  const int lanes = score_lanes(p.head_dim);
  const LaunchPlan plan =
      plan_block_score(p.batch * p.heads_kv, p.queries * (p.heads_q / p.heads_kv), p.blocks, lanes);
  switch (lanes) {
    case 8: return launch(block_score_kernel<kRule, 8>, plan, stream, p, out);
    case 16: return launch(block_score_kernel<kRule, 16>, plan, stream, p, out);
    default: return launch(block_score_kernel<kRule, 32>, plan, stream, p, out);
  }
}

void score_blocks(const BlockScoreParams& p, float* out, Stream stream) {
  switch (p.rule) {
    case BlockRule::dot: return launch_block_score<BlockRule::dot>(p, out, stream);
    case BlockRule::bounds: return launch_block_score<BlockRule::bounds>(p, out, stream);
    case BlockRule::deviation: return launch_block_score<BlockRule::deviation>(p, out, stream);
  }
}

}  // namespace

int64_t block_score_workspace(const BlockScoreParams& p) {
  if (p.reduction == HeadReduction::none) return 0;
  return head_scores_bytes(p.batch * p.heads_q * p.queries, p.blocks);
}

void block_score(const BlockScoreParams& p, Stream stream) {
  if (p.reduction == HeadReduction::none) return score_blocks(p, p.out, stream);
  const int64_t rows = p.batch * p.heads_q * p.queries;
  auto* scores = static_cast<float*>(p.workspace);
  auto* rows_at = static_cast<char*>(p.workspace) + round_up(4 * rows * p.blocks, 16);
  score_blocks(p, scores, stream);
  const HeadScores all{scores,     reinterpret_cast<SoftmaxRow*>(rows_at),
                       p.out,      p.batch,
                       p.heads_q,  p.heads_kv,
                       p.queries,  p.blocks,
                       p.reduction};
  if (p.reduction == HeadReduction::softmax_vote) {
    launch(softmax_rows_kernel<kSoftmaxThreads>, plan_softmax_rows(rows), stream, all);
  }
  launch(reduce_heads_kernel<kScoreThreads>, plan_reduce_heads(all), stream, all);
}

}  // namespace tokred::cuda
