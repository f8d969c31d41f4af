// attention_rows: 2 B Hq L N D operations, half of a forward pass, but bound by the results, 4
// bytes a pair written, read, and with softmax read and written again: Hq = 32, L = 32, N = 32768
// are 134 MB, 0.11 ms at the 4.8 TB/s of an H200, less what L2 keeps.
#include "score/cuda/attention_launch.h"
#include "score/cuda/attention_rows.cuh"

namespace tokred::cuda {

using namespace scoring;

void attention_rows(const AttentionRowsParams& p, Stream stream) {
  const AttentionParams& a = p.attention;
  const ScoreShape shape = score_shape(a);
  visit_config(a, [&]<class C>() {
    static_assert(sizeof(RowsShared<C>) ==
                  attention_rows_shared_bytes(C::kDim, C::kTiles.planes == 3));
    launch(attention_rows_kernel<C>, plan_attention_rows(shape), stream, p);
  });
  if (!p.softmax) return;
  launch(softmax_in_place_kernel<kSoftmaxThreads>,
         plan_softmax_rows(a.batch * a.heads_q * a.queries), stream, p);
}

}  // namespace tokred::cuda
