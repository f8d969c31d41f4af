// qk_score: the scores of keys that lie in memory as they are.
#pragma once

#include "attention/cuda/qk_score.cuh"

namespace tokred::cuda::scoring {

template <class T, int kLanes, int kRows, bool kListed>
__global__ void __launch_bounds__(kScoreThreads, 2)
    qk_score_kernel(const __grid_constant__ QkScoreArgs a) {
  const ScoreChunk chunk(a);
  score_chunk<kListed, kLanes, kRows>(a, QkScorer<T, kLanes, kRows>(a, chunk.batch, chunk.group),
                                      chunk);
}

}  // namespace tokred::cuda::scoring
