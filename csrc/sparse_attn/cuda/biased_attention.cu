// biased_attention forward, and block_sparse_attention, the same kernel with a block mask.
// Operations of [B, H, L, D] x N: 4 B H L N D; at B = 8, H = 6, D = 64, L = N = 1370 in bf16, 23
// GFLOP: 0.06 ms at the 400 TFLOP/s that mma.sync can reach of the 790 of an H200. Bytes: q and out
// once, k and v once a block of rows, mostly from L2.
#include "common/cuda/launch.h"
#include "sparse_attn/cuda/biased_attention.cuh"
#include "sparse_attn/cuda/launch.h"

namespace tokred::cuda {
namespace {

using namespace attention;

template <class T, int kDim, bool kSmall>
void launch_forward(const AttentionParams& p, const LaunchPlan& plan, Stream stream) {
  static_assert(sizeof(ForwardShared<ForwardConfig<T, kDim, false, kSmall>>) ==
                forward_shared_bytes(kDim, Operand<T>::kPlanes == 3, kSmall));
  if (is_general(p)) {
    launch(biased_attention_kernel<ForwardConfig<T, kDim, true, kSmall>>, plan, stream, p);
  } else {
    launch(biased_attention_kernel<ForwardConfig<T, kDim, false, kSmall>>, plan, stream, p);
  }
}

template <class T>
void forward(const AttentionParams& p, Stream stream) {
  constexpr bool kFloat = Operand<T>::kPlanes == 3;
  const AttentionShape shape = attention_shape(p);
  const int64_t shared_limit = current_device().shared_limit;
  const LaunchPlan plan = plan_forward(shape, shared_limit);
  visit_forward_head_dim<kFloat>(shape.dim(), [&]<int kDim>() {
    if constexpr (has_small_tiles(kDim, kFloat)) {
      if (takes_small_tiles(shape, shared_limit)) {
        return launch_forward<T, kDim, true>(p, plan, stream);
      }
    }
    launch_forward<T, kDim, false>(p, plan, stream);
  });
}

}  // namespace

void biased_attention(const AttentionParams& p, Stream stream) {
  if (p.batch == 0 || p.heads_q == 0 || p.queries == 0) return;
  if (is_decode_attention(p)) return decode_attention(dense_lists(p), stream);
  const bool wgmma = is_wgmma_attention(p), marked = wgmma || in_one_part(attention_shape(p));
  if (wgmma) {
    wgmma_attention(p, stream);
  } else {
    visit_dtype(p.dtype, [&]<class T>() { forward<T>(p, stream); });
  }
  if (rows_differ(p) || p.key_bias) recompute_rows(dense_lists(p), marked, stream);
}

}  // namespace tokred::cuda
