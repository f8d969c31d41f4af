// Attention of few query rows by splits of their keys (Flash-Decoding), for biased_attention and
// sparse_attention. Bytes: k and v once, and the partial results of the splits, in f32,
// twice; the operations (4 B Hq L N D) hide behind them up to 16 rows. B = 1, Hkv = 8, N = 131072,
// D = 128 in bf16: 537 MB, 125 us at the 4.3 TB/s that an H200 reaches; over lists of 2048 keys
// 8.4 MB, 2 us, which two launches outweigh.
#include "attention/cuda/combine.cuh"
#include "common/cuda/launch.h"
#include "sparse_attn/cuda/launch.h"

namespace tokred::cuda {
namespace {

using namespace attention;

template <class Config>
void launch_decode(const SparseAttentionParams& sparse, Stream stream) {
  using T = typename Config::T;
  constexpr bool kFloat = Operand<typename Config::Key>::kPlanes > 1;
  using Shared = DecodeShared<Config>;
  static_assert(
      fits<typename Config::Key>(sizeof(Shared), decode_fixed_bytes(Config::kDim, kFloat)));
  static_assert(fits<typename Config::Key>(sizeof(typename Shared::Stage),
                                           decode_stage_bytes(Config::kDim, kFloat)));
  constexpr int kCombineDim = Config::kDim > 256 ? kMaxWideDim : 256;
  static_assert(sizeof(CombineShared<kCombineDim>) == combine_shared_bytes(kCombineDim));
  const ListShape shape = list_shape(sparse);
  const int64_t shared_limit = current_device().shared_limit;
  DecodeParams p{sparse,
                 0,
                 divide_up(shape.rows(), kDecodeRows),
                 decode_tile_rows(shape),
                 decode_split_length(shape.length),
                 decode_splits(shape.length),
                 decode_tiles(Config::kDim, kFloat, shared_limit)};
  p.sparse.lists.block_q = shape.block_q;
  const int64_t row_tiles = decode_row_tiles(shape), most = decode_launch_tiles(shape);
  for (; p.first_tile_of_launch < row_tiles; p.first_tile_of_launch += most) {
    const int64_t count = min(most, row_tiles - p.first_tile_of_launch);
    launch(decode_kernel<Config>, plan_decode(shape, count, p.tiles), stream, p);
    launch(combine_splits_kernel<T, kCombineDim>, plan_combine(shape, count), stream, p);
  }
  if (rows_differ(p.sparse.attention)) recompute_rows(p.sparse, false, stream);
}

template <class T, int kDim>
void decode(const SparseAttentionParams& p, Stream stream) {
  if constexpr (sizeof(T) == 2 && kDim <= 256) {
    if (p.rotation.cos) return launch_decode<RotatedDecodeConfig<T, kDim>>(p, stream);
  }
  launch_decode<DecodeConfig<T, kDim>>(p, stream);
}

}  // namespace

bool is_decode_attention(const AttentionParams& p) {
  return !p.blocks.mask.data && is_decode(dense_list(attention_shape(p)));
}

void decode_attention(const SparseAttentionParams& p, Stream stream) {
  const AttentionShape shape = attention_shape(p.attention);
  visit_dtype(p.attention.dtype, [&]<class T>() {
    if (shape.is_wide()) return decode<T, kMaxWideDim>(p, stream);
    visit_head_dim(shape.dim(), [&]<int kDim>() { decode<T, kDim>(p, stream); });
  });
}

int64_t decode_attention_workspace(const SparseAttentionParams& p) {
  return decode_workspace_bytes(list_shape(p));
}

int64_t biased_attention_workspace(const AttentionParams& p) {
  return is_decode_attention(p) ? decode_attention_workspace(dense_lists(p)) : 0;
}

}  // namespace tokred::cuda
