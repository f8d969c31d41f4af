// attention_rows and attention_columns. Operations: 2 B Hq L N D, half of a forward pass. Columns
// of B = 8, H = 6, L = N = 1370, D = 64 in bf16 are 11.5 GFLOP, 0.03 ms at the 400 TFLOP/s that
// mma.sync can reach on an H200, and 90 M exponentials of some 10 instructions, 0.03 ms. Rows are
// bound by their results, 4 bytes a pair written, read, and with softmax read and written again:
// Hq = 32, L = 32, N = 32768 are 134 MB, 0.11 ms at 4.8 TB/s, less what L2 keeps.
#include "common/cuda/launch.h"
#include "score/cuda/attention_columns.cuh"

namespace tokred::cuda {
namespace {

using namespace scoring;

ScoreShape score_shape(const AttentionParams& p) {
  return {p.batch, p.heads_q, p.heads_kv, p.queries, p.keys, p.head_dim, p.dtype == DType::f32};
}

// f.template operator()<AttentionConfig>() for the dtype and head size.
template <class F>
void visit_config(const AttentionParams& p, F f) {
  visit_dtype(p.dtype, [&]<class T>() {
    switch (score_head_dim(p.head_dim)) {
      case 64: return f.template operator()<AttentionConfig<T, 64>>();
      case 128: return f.template operator()<AttentionConfig<T, 128>>();
      default: return f.template operator()<AttentionConfig<T, 256>>();
    }
  });
}

}  // namespace

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

void attention_columns(const AttentionColumnsParams& p, Stream stream) {
  const ScoreShape shape = score_shape(p.attention);
  visit_config(p.attention, [&]<class C>() {
    static_assert(sizeof(ColumnsShared<C>) ==
                  attention_columns_shared_bytes(C::kDim, C::kTiles.planes == 3));
    launch(attention_columns_kernel<C>, plan_attention_columns(shape), stream, p);
  });
}

}  // namespace tokred::cuda
