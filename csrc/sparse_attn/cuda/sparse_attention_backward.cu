// sparse_attention backward. grad_q does five products a listed pair where the forward pass has
// two. grad_k and grad_v read every list of a head once a tile of keys, N / 64 times in all, and
// multiply a tile of keys with a tile of rows wherever one names the other: with lists spread over
// all keys that is the cost of dense attention.
#include "common/cuda/launch.h"
#include "sparse_attn/cuda/launch.h"
#include "sparse_attn/cuda/sparse_attention_backward.cuh"

namespace tokred::cuda {
namespace {

using namespace attention;

template <class T, int kDim>
void launch_backward(SparseAttentionBackwardParams p, Stream stream) {
  using Config = BackwardConfig<T, kDim>;
  constexpr bool kFloat = Operand<T>::kPlanes == 3;
  static_assert(sizeof(ListQueryGradShared<Config>) == list_grad_query_shared_bytes(kDim, kFloat));
  static_assert(sizeof(ListKeyGradShared<Config>) == list_grad_key_shared_bytes(kDim, kFloat));
  const ListShape shape = list_shape(p.backward.forward, p.lists);
  p.lists.block_q = max(shape.block_q, int64_t{1});
  launch(attention_delta_kernel<T>, plan_delta(shape.attention), stream, p.backward);
  const int64_t blocks = list_grad_query_blocks(shape);
  for (int64_t first = 0; first < blocks; first += kMaxRowTiles) {
    launch(list_grad_query_kernel<Config>, plan_list_grad_query(shape, blocks - first), stream, p,
           divide_up(shape.rows(), Config::kRows), first);
  }
  const LaunchPlan plan = plan_list_grad_key(shape);
  if constexpr (kDim <= 128) {
    launch(list_grad_key_kernel<Config>, plan, stream, p);
  } else {
    launch(list_grad_key_kernel<BackwardConfig<T, kDim, KeyGrads::value>>, plan, stream, p);
    launch(list_grad_key_kernel<BackwardConfig<T, kDim, KeyGrads::key>>, plan, stream, p);
  }
  recompute_gradients(p.backward, p.lists, stream);
}

}  // namespace

int64_t sparse_attention_backward_workspace(const SparseAttentionBackwardParams&) { return 0; }

void sparse_attention_backward(const SparseAttentionBackwardParams& p, Stream stream) {
  const AttentionParams& f = p.backward.forward;
  if (f.batch == 0 || f.heads_q == 0) return;
  visit_dtype(f.dtype, [&]<class T>() {
    visit_head_dim(attention_shape(f).dim(),
                   [&]<int kDim>() { launch_backward<T, kDim>(p, stream); });
  });
}

}  // namespace tokred::cuda
