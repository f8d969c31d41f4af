// sparse_attention. Few rows a list: decode. Else bytes and operations are those of
// biased_attention with the length of the lists for N, and the reads of k and v, in whole rows,
// come from L2 where lists overlap.
#include "common/cuda/launch.h"
#include "sparse_attn/cuda/launch.h"
#include "sparse_attn/cuda/sparse_attention.cuh"

namespace tokred::cuda {
namespace {

using namespace attention;

template <class Config>
void launch_lists(SparseAttentionParams p, Stream stream) {
  constexpr bool kFloat = Operand<typename Config::Key>::kPlanes > 1;
  static_assert(
      fits<typename Config::Key>(sizeof(ListForwardShared<Config>),
                                 list_forward_shared_bytes(Config::kDim, kFloat, Config::kSmall)));
  const ListShape shape = list_shape(p);
  p.lists.block_q = shape.block_q;
  launch(list_attention_kernel<Config>, plan_list_forward(shape, current_device().shared_limit),
         stream, p, divide_up(shape.rows(), Config::kRows));
  if (rows_differ(p.attention)) recompute_rows(p, in_one_part(shape.attention), stream);
}

// Tiles of more rows have no registers left for a float mask.
bool is_decode_list(const SparseAttentionParams& p) {
  return p.attention.pair_bias.data || is_decode(list_shape(p));
}

template <class T>
void attend_lists(const SparseAttentionParams& p, Stream stream) {
  constexpr bool kFloat = Operand<T>::kPlanes == 3;
  const AttentionShape shape = attention_shape(p.attention);
  visit_forward_head_dim<kFloat>(shape.dim(), [&]<int kDim>() {
    if constexpr (has_small_tiles(kDim, kFloat)) {
      if (takes_small_tiles(shape, current_device().shared_limit)) {
        return launch_lists<ForwardConfig<T, kDim, false, true>>(p, stream);
      }
    }
    launch_lists<ForwardConfig<T, kDim>>(p, stream);
  });
}

template <class T>
void attend_rotated(const SparseAttentionParams& p, Stream stream) {
  visit_head_dim(attention_shape(p.attention).dim(),
                 [&]<int kDim>() { launch_lists<RotatedForwardConfig<T, kDim>>(p, stream); });
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
    if constexpr (sizeof(T) == 2) {
      if (p.rotation.cos) return attend_rotated<T>(p, stream);
    }
    attend_lists<T>(p, stream);
  });
}

}  // namespace tokred::cuda
