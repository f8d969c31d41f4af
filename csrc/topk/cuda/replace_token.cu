// replace_token: one launch of a block a head.
#include "common/cuda/launch.h"
#include "topk/cuda/replace_token.cuh"

namespace tokred::cuda {

void replace_token(const ReplaceTokenParams& p, Stream stream) {
  launch(selecting::replace_token_kernel, plan_replace_token(p.batch * p.heads), stream, p);
}

}  // namespace tokred::cuda
