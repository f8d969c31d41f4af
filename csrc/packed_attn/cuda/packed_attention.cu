// packed_attention: the splits of a decode over packed tokens, then combine_splits_kernel. Bytes:
// codes and params once, and the partial results of the splits, in f32, twice. B = 1, Hkv = 8,
// T = 131072, D = 128 in bf16, 4 bits in groups of 32: 168 MB, 39 us at the 4.3 TB/s that an H200
// reaches; 268 M codes of some four instructions each are 40 us of all multiprocessors. Groups
// along tokens, f32, and values for f16 take about twice as many.
#include "attention/cuda/combine.cuh"
#include "common/cuda/launch.h"
#include "packed_attn/cuda/launch.h"
#include "packed_attn/cuda/packed_attention.cuh"
#include "packed_attn/cuda/plan_codes.h"
#include "packed_attn/cuda/rotate_out.cuh"

namespace tokred::cuda {
namespace {

using namespace attention;

template <class T, int kDim>
void launch_packed(const PackedAttentionParams& params, Stream stream) {
  using Config = PackedConfig<T, kDim>;
  using Shared = PackedShared<Config>;
  constexpr bool kFloat = Operand<T>::kPlanes == 3;
  static_assert(sizeof(Shared) == packed_fixed_bytes(kDim, kFloat));
  static_assert(sizeof(typename Shared::Warp) == packed_warp_bytes(kDim, kFloat));
  static_assert(sizeof(TilePlaces) == kPlacesBytes);
  const AttentionParams& a = params.attention;
  const ListShape shape = list_shape(a, params.lists);
  const PackedCopy copy = packed_copy(params.k.packed.format, params.v.packed.format);
  PackedDecodeParams p{{{a, params.lists, {}},
                        0,
                        divide_up(shape.rows(), kDecodeRows),
                        decode_tile_rows(shape),
                        decode_split_length(shape.length),
                        decode_splits(shape.length),
                        packed_tiles(kDim, kFloat, copy, current_device().shared_limit)},
                       params.k,
                       params.v,
                       params.slots,
                       params.lengths,
                       params.lengths_stride,
                       copy};
  p.decode.sparse.lists.block_q = shape.block_q;
  const int64_t row_tiles = decode_row_tiles(shape), most = decode_launch_tiles(shape);
  const bool fragments =
      takes_fragments(a.dtype, shape, params.k.packed.format, params.v.packed.format);
  for (; p.decode.first_tile_of_launch < row_tiles; p.decode.first_tile_of_launch += most) {
    const int64_t count = min(most, row_tiles - p.decode.first_tile_of_launch);
    if (fragments) {
      launch_code_decode(p, shape, count, stream);
    } else {
      const LaunchPlan plan = plan_packed_decode(shape, count, copy, p.decode.tiles);
      launch(packed_decode_kernel<Config>, plan, stream, p);
    }
    launch(combine_splits_kernel<T>, plan_combine(shape, count), stream, p.decode);
  }
  if (params.v.packed.format.rotated && rotates_later(shape.attention)) {
    launch(rotate_out_kernel, plan_rotate_out(shape.attention), stream, a);
  }
  if (!rows_differ(a)) return;
  PackedAttentionParams bounded = params;
  bounded.lists.block_q = shape.block_q;
  recompute_packed_rows(bounded, stream);
}

}  // namespace

int64_t packed_attention_workspace(const PackedAttentionParams& p) {
  return decode_workspace_bytes(list_shape(p.attention, p.lists));
}

void packed_attention(const PackedAttentionParams& p, Stream stream) {
  if (attention_shape(p.attention).is_wide()) return wide_packed_attention(p, stream);
  visit_dtype(p.attention.dtype, [&]<class T>() {
    visit_head_dim(attention_shape(p.attention).dim(),
                   [&]<int kDim>() { launch_packed<T, kDim>(p, stream); });
  });
}

}  // namespace tokred::cuda
