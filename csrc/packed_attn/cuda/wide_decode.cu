// packed_attention of heads above 256 dimensions, then combine_splits_kernel. A latent of 512 with
// 64 rotary channels and 128 query heads, T = 32768 in 4 bits: 11 MB of codes and params, read by
// eight blocks of rows, but 9.4 GFLOP twice, 170 us at the 60 TFLOP/s of f32 without tensor cores.
#include "packed_attn/cuda/wide_decode.cuh"

#include "attention/cuda/combine.cuh"
#include "packed_attn/cuda/launch.h"

namespace tokred::cuda {

using namespace attention;

void wide_packed_attention(const PackedAttentionParams& params, Stream stream) {
  static_assert(sizeof(WideShared) == kWideSharedBytes);
  static_assert(sizeof(CombineShared<kMaxWideDim>) == combine_shared_bytes(kMaxWideDim));
  const AttentionParams& a = params.attention;
  const ListShape shape = list_shape(a, params.lists);
  PackedDecodeParams p{{{a, params.lists, {}},
                        0,
                        divide_up(shape.rows(), kDecodeRows),
                        decode_tile_rows(shape),
                        decode_split_length(shape.length),
                        decode_splits(shape.length),
                        {}},
                       params.k,
                       params.v,
                       params.slots,
                       params.lengths,
                       params.lengths_stride,
                       {}};
  p.decode.sparse.lists.block_q = shape.block_q;
  const int64_t row_tiles = decode_row_tiles(shape), most = decode_launch_tiles(shape);
  visit_dtype(a.dtype, [&]<class T>() {
    for (; p.decode.first_tile_of_launch < row_tiles; p.decode.first_tile_of_launch += most) {
      const int64_t count = min(most, row_tiles - p.decode.first_tile_of_launch);
      launch(wide_decode_kernel<T>, plan_wide_decode(shape, count), stream, p);
      launch(combine_splits_kernel<T, kMaxWideDim>, plan_combine(shape, count), stream, p.decode);
    }
  });
}

}  // namespace tokred::cuda
