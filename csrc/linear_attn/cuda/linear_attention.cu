// linear_attention. B = 1, 32 heads, N = 256k, D = Dv = 128: 0.9 TFLOP with the state and within
// the chunks, 15 ms at the 60 TFLOP/s of f32 on an H200; blocks are B * H * Dv / 32. One row: the
// state is read and written once.
#include "common/cuda/launch.h"
#include "linear_attn/cuda/linear_attention.cuh"

namespace tokred::cuda {

using namespace linear;

int64_t linear_attention_workspace(const LinearAttentionParams&) { return 0; }

void linear_attention(const LinearAttentionParams& p, Stream stream) {
  const int64_t heads = p.batch * p.heads;
  visit_dtype(p.dtype, [&]<class T>() {
    if (p.tokens == 1 && !p.reverse && !p.mask && p.state_out && p.state_stride_column <= 1) {
      return launch(linear_step_kernel<T>, plan_linear_step(heads, p.value_dim), stream, p);
    }
    const LaunchPlan plan = plan_linear_attention(heads, p.head_dim, p.value_dim);
    if (linear_rows(p.head_dim) == 32) {
      launch(linear_attention_kernel<T, 32>, plan, stream, p);
    } else {
      launch(linear_attention_kernel<T, 16>, plan, stream, p);
    }
  });
}

}  // namespace tokred::cuda
