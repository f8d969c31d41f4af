// Launches of attention/cuda/recompute.cuh and recompute_gradients.cuh. They read one number of
// every row, or the results once; only rows with a NaN cost more.
#include "attention/cuda/recompute.cuh"
#include "common/cuda/launch.h"
#include "sparse_attn/cuda/launch.h"
#include "sparse_attn/cuda/recompute_gradients.cuh"

namespace tokred::cuda {

using namespace attention;

void recompute_rows(const SparseAttentionParams& p, bool marked, Stream stream) {
  const AttentionParams& a = p.attention;
  const LaunchPlan plan = plan_delta(attention_shape(a));
  visit_dtype(a.dtype, [&]<class T>() {
    if (attention_shape(a).is_wide()) {
      launch(recompute_rows_kernel<T, PlainKeys<T, 3>, SparseAttentionParams>, plan, stream, p, a,
             marked);
    } else {
      launch(recompute_rows_kernel<T, PlainKeys<T>, SparseAttentionParams>, plan, stream, p, a,
             marked);
    }
  });
}

void recompute_gradients(const AttentionBackwardParams& b, const KeyLists& lists, Stream stream) {
  const AttentionParams& f = b.forward;
  visit_dtype(f.dtype, [&]<class T>() {
    launch(recompute_grad_query_kernel<T>, plan_delta(attention_shape(f)), stream, b, lists);
    launch(recompute_grad_key_kernel<T>, plan_recompute_keys(attention_shape(f)), stream, b, lists);
  });
}

}  // namespace tokred::cuda
