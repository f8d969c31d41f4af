// block_pool and block_score. block_pool reads x once (twice for the deviation, the second time
// mostly from L1): B = 8, H = 8, N = 32768, D = 128 in bf16 are 537 MB, 0.11 ms at the 4.8 TB/s of
// an H200. block_score at decode reads the pooled blocks once; with L queries it takes
// 2 B Hq L M D operations on the fp32 units (4 of the kind for bounds and deviation): Hq = 32,
// L = M = 512, D = 128 are 2.1 GFLOP, 0.1 ms at a third of the 67 TFLOP/s there are.
#include "common/cuda/launch.h"
#include "score/cuda/block_pool.cuh"
#include "score/cuda/block_score.cuh"

namespace tokred::cuda {
namespace {

using namespace scoring;

template <class T, int kLanes>
void launch_pool(const BlockPoolParams& p, Stream stream) {
  static_assert(sizeof(PoolShared) == plan_block_pool(1, 1, kPoolLong, 1).shared_bytes);
  const LaunchPlan plan = plan_block_pool(p.batch, p.heads, p.tokens, p.blocks);
  if (pool_warps(p.tokens, p.blocks) == 1) {
    launch(block_pool_kernel<T, kLanes, 1>, plan, stream, p);
  } else {
    launch(block_pool_kernel<T, kLanes, kPoolWide>, plan, stream, p);
  }
}

template <BlockRule kRule>
void launch_block_score(const BlockScoreParams& p, float* out, Stream stream) {
  const int lanes = score_lanes(p.head_dim);
  const LaunchPlan plan = plan_block_score(
      p.batch * p.heads_kv, p.queries * (p.heads_q / p.heads_kv), p.blocks, lanes);
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

void block_pool(const BlockPoolParams& params, Stream stream) {
  BlockPoolParams p = params;
  if (p.heads == 0) {  // counts alone: those of a head without channels
    p.heads = 1;
    p.head_dim = 0;
    p.x = {p.counts, 0, 0, 0};
  }
  visit_dtype(p.dtype, [&]<class T>() {
    switch (score_lanes(p.head_dim)) {
      case 8: return launch_pool<T, 8>(p, stream);
      case 16: return launch_pool<T, 16>(p, stream);
      default: return launch_pool<T, 32>(p, stream);
    }
  });
}

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
  const HeadScores all{scores, reinterpret_cast<SoftmaxRow*>(rows_at), p.out, p.batch, p.heads_q,
                       p.heads_kv, p.queries, p.blocks, p.reduction};
  if (p.reduction == HeadReduction::softmax_vote) {
    launch(softmax_rows_kernel<kSoftmaxThreads>, plan_softmax_rows(rows), stream, all);
  }
  launch(reduce_heads_kernel<kScoreThreads>, plan_reduce_heads(all), stream, all);
}

}  // namespace tokred::cuda
