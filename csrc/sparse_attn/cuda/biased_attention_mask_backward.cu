// biased_attention_mask_backward: two products of B Hq L N D multiply-adds, and eight bytes a pair
// for the sums of masks that are broadcast.
#include "common/cuda/launch.h"
#include "sparse_attn/cuda/biased_attention_mask_backward.cuh"

namespace tokred::cuda {

using namespace attention;

void biased_attention_mask_backward(const AttentionMaskBackwardParams& m, Stream stream) {
  const AttentionParams& f = m.backward.forward;
  const AttentionShape shape = attention_shape(f);
  const bool shares_row = m.queries != f.queries;
  const LaunchPlan plan = plan_grad_mask(shape, m.batch * m.heads, shares_row);
  if (f.keys == 0 || plan.grid[0] == 0) return;
  visit_dtype(f.dtype, [&]<class T>() {
    if (f.batch * f.queries > 0) {
      launch(attention_delta_kernel<T>, plan_delta(shape), stream, m.backward);
    }
    visit_head_dim(shape.dim(), [&]<int kDim>() {
      using Config = BackwardConfig<T, kDim, KeyGrads::all, true>;
      constexpr bool kFloat = Operand<T>::kPlanes == 3;
      static_assert(sizeof(MaskGradShared<Config>) == grad_mask_shared_bytes(kDim, kFloat));
      if (shares_row) return launch(attention_grad_mask_kernel<Config, true>, plan, stream, m);
      launch(attention_grad_mask_kernel<Config, false>, plan, stream, m);
    });
  });
}

}  // namespace tokred::cuda
