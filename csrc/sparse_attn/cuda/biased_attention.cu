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

template <class T, int kDim>
void launch_forward(const AttentionParams& p, Stream stream) {
  constexpr bool kFloat = Operand<T>::kPlanes == 3;
  static_assert(sizeof(ForwardShared<ForwardConfig<T, kDim>>) ==
                forward_shared_bytes(kDim, kFloat));
  const LaunchPlan plan = plan_forward(attention_shape(p));
  if (is_general(p)) {
    launch(biased_attention_kernel<ForwardConfig<T, kDim, true>>, plan, stream, p);
  } else {
    launch(biased_attention_kernel<ForwardConfig<T, kDim>>, plan, stream, p);
  }
}

template <class T>
void forward(const AttentionParams& p, Stream stream) {
  visit_forward_head_dim<Operand<T>::kPlanes == 3>(
      attention_shape(p).dim(), [&]<int kDim>() { launch_forward<T, kDim>(p, stream); });
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
