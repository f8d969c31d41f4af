// sparse_attention. Few rows a list: decode. Else bytes and operations are those of
// biased_attention with the length of the lists for N, and the reads of k and v, in whole rows,
// come from L2 where lists overlap.
#include "launch.h"
#include "sparse_attn_launch.h"
#include "sparse_attn_lists.cuh"

namespace tokred::cuda {
namespace {

using namespace attention;

template <class T, int kDim>
void launch_lists(SparseAttentionParams p, Stream stream) {
  using Config = ForwardConfig<T, kDim>;
  constexpr bool kFloat = Operand<T>::kPlanes == 3;
  static_assert(sizeof(ListForwardShared<Config>) == list_forward_shared_bytes(kDim, kFloat));
  const ListShape shape = list_shape(p.attention, p.lists);
  p.lists.block_q = shape.block_q;
  launch(list_attention_kernel<Config>, plan_list_forward(shape), stream, p,
         divide_up(shape.rows(), Config::kRows));
}

bool is_decode_list(const SparseAttentionParams& p) {
  return is_decode(list_shape(p.attention, p.lists));
}

}  // namespace

int64_t sparse_attention_workspace(const SparseAttentionParams& p) {
  return is_decode_list(p) ? decode_attention_workspace(p) : 0;
}

void sparse_attention(const SparseAttentionParams& p, Stream stream) {
  const AttentionParams& a = p.attention;
  if (a.batch == 0 || a.heads_q == 0 || a.queries == 0) return;
  if (is_decode_list(p)) return decode_attention(p, stream);
  visit_dtype(a.dtype, [&]<class T>() {
    constexpr bool kFloat = Operand<T>::kPlanes == 3;
    switch (forward_head_dim(attention_shape(a).dim(), kFloat)) {
      case 32:
        if constexpr (!kFloat) return launch_lists<T, 32>(p, stream);
        break;
      case 64: return launch_lists<T, 64>(p, stream);
      case 96:
        if constexpr (!kFloat) return launch_lists<T, 96>(p, stream);
        break;
      case 128: return launch_lists<T, 128>(p, stream);
      default: return launch_lists<T, 256>(p, stream);
    }
  });
}

}  // namespace tokred::cuda
