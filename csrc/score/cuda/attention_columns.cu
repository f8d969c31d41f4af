// attention_columns: 2 B Hq L N D operations, half of a forward pass. B = 8, H = 6, L = N = 1370,
// D = 64 in bf16 are 11.5 GFLOP, 0.03 ms at the 400 TFLOP/s that mma.sync can reach on an H200, and
// 90 M exponentials of some 10 instructions, 0.03 ms.
#include "score/cuda/attention_columns.cuh"
#include "score/cuda/attention_launch.h"

namespace tokred::cuda {

using namespace scoring;

void attention_columns(const AttentionColumnsParams& p, Stream stream) {
  const ScoreShape shape = score_shape(p.attention);
  visit_config(p.attention, [&]<class C>() {
    static_assert(sizeof(ColumnsShared<C>) ==
                  attention_columns_shared_bytes(C::kDim, C::kTiles.planes == 3));
    launch(attention_columns_kernel<C>, plan_attention_columns(shape), stream, p);
  });
}

}  // namespace tokred::cuda
