// biased_attention backward: seven products of B H L N D multiply-adds where the forward pass has
// two, because both kernels recompute the probabilities and their gradients.
#include "common/cuda/launch.h"
#include "sparse_attn/cuda/biased_attention_backward_query.cuh"
#include "sparse_attn/cuda/launch.h"

namespace tokred::cuda {
namespace {

using namespace attention;

// grad_k and grad_v in a launch each. There are kernels from 128 dimensions on.
template <class T, int kDim, bool kSparse>
void launch_key_and_value(const AttentionBackwardParams& p, AttentionShape shape, Stream stream) {
  shape.head_dim = max(shape.head_dim, int64_t{kDim});
  const LaunchPlan plan = plan_grad_key(shape);
  launch(attention_grad_key_kernel<BackwardConfig<T, kDim, KeyGrads::value, kSparse>>, plan, stream,
         p);
  launch(attention_grad_key_kernel<BackwardConfig<T, kDim, KeyGrads::key, kSparse>>, plan, stream,
         p);
}

template <class T, int kDim, bool kSparse>
void launch_gradients(const AttentionBackwardParams& p, const AttentionShape& shape,
                      Stream stream) {
  using Config = BackwardConfig<T, kDim, KeyGrads::all, kSparse>;
  constexpr bool kFloat = Operand<T>::kPlanes == 3;
  static_assert(sizeof(QueryGradShared<Config>) == grad_query_shared_bytes(kDim, kFloat));
  static_assert(sizeof(KeyGradShared<Config>) == grad_key_shared_bytes(kDim, kFloat));
  launch(attention_grad_query_kernel<Config>, plan_grad_query(shape), stream, p);
  if constexpr (kDim <= 128) {
    // Whether the owners of keys have no registers for all their gradients at once.
    const AttentionParams& f = p.forward;
    const bool apart = kSparse && (f.pair_bias.data || (kDim > 64 && f.softcap > 0));
    if (!apart) return launch(attention_grad_key_kernel<Config>, plan_grad_key(shape), stream, p);
  }
  if constexpr (kSparse || kDim > 128) {
    launch_key_and_value<T, (kDim < 128 ? 128 : kDim), kSparse>(p, shape, stream);
  }
}

template <class T, int kDim>
void launch_backward(const AttentionBackwardParams& p, Stream stream) {
  const AttentionShape shape = attention_shape(p.forward);
  launch(attention_delta_kernel<T>, plan_delta(shape), stream, p);
  if (is_general(p.forward)) {
    launch_gradients<T, kDim, true>(p, shape, stream);
  } else {
    launch_gradients<T, kDim, false>(p, shape, stream);
  }
  if (rows_differ(p.forward) || p.forward.key_bias) {
    recompute_gradients(p, dense_lists(p.forward).lists, stream);
  }
}

}  // namespace

void biased_attention_backward(const AttentionBackwardParams& p, Stream stream) {
  const AttentionParams& f = p.forward;
  if (f.batch == 0 || f.heads_q == 0) return;
  visit_dtype(f.dtype, [&]<class T>() {
    visit_head_dim(attention_shape(f).dim(),
                   [&]<int kDim>() { launch_backward<T, kDim>(p, stream); });
  });
}

}  // namespace tokred::cuda
