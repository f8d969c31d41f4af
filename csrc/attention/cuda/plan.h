// Tiles of the attention kernels, and their launch plans.
#pragma once

#include "common/cuda/plan.h"

namespace tokred::cuda {

// A block owns `rows` of one side and streams the other side through tiles of `columns`.
struct AttentionTiles {
  int warps;       // of 32 threads; each has 16 * row_tiles rows
  int row_tiles;
  int columns;
  int stages;      // tiles in flight
  int planes;      // bf16 numbers an element is split into; 1 for 16-bit storage

  constexpr int threads() const { return 32 * warps; }
  constexpr int rows() const { return 16 * row_tiles * warps; }
};

// Forward: the fewer registers a row of the output takes, the more rows share a key tile. `small`:
// what fits 99 KB, where has_small_tiles(); all others do.
constexpr AttentionTiles forward_tiles(int dim, bool is_float, bool small = false) {
  if (is_float) return {dim <= 128 ? 4 : 2, 1, dim <= 64 ? 32 : 16, 1, 3};
  return {4, dim <= 64 ? 2 : 1, dim <= 128 ? 64 : small ? 16 : 32, 2, 1};
}
constexpr bool has_small_tiles(int dim, bool is_float) { return dim > 128 && !is_float; }

// Backward: two tiles owned, two streamed. All fit 99 KB but those of f32 above 128 dimensions.
constexpr AttentionTiles backward_tiles(int dim, bool is_float) {
  if (is_float) return {dim <= 64 ? 4 : 2, 1, 16, 1, 3};
  if (dim > 128) return {4, 1, 16, 1, 1};
  return {4, 1, dim <= 64 ? 64 : 32, 2, 1};
}

// The compiled head size that covers `dim` (the maximum of D and Dv), at most kMaxHeadDim = 256.
constexpr int forward_head_dim(int64_t dim, bool is_float) {
  if (dim <= 32 && !is_float) return 32;
  if (dim <= 64) return 64;
  if (dim <= 96 && !is_float) return 96;
  return dim <= 128 ? 128 : 256;
}
// The value columns that one block sums; a larger Dv is shared out, where registers are short.
constexpr int forward_value_dim(int dim, bool is_float) {
  if (is_float) return dim > 128 ? 128 : dim;
  return dim > 256 ? 256 : dim;
}
// The compiled head size of all kernels but the dense forward ones.
constexpr int padded_head_dim(int64_t dim) { return dim <= 64 ? 64 : dim <= 128 ? 128 : 256; }

// f.template operator()<kDim>() for the compiled head size that covers `dim`.
template <class F>
void visit_head_dim(int64_t dim, F f) {
  switch (padded_head_dim(dim)) {
    case 64: return f.template operator()<64>();
    case 128: return f.template operator()<128>();
    default: return f.template operator()<256>();
  }
}
template <bool kFloat, class F>
void visit_forward_head_dim(int64_t dim, F f) {
  if constexpr (!kFloat) {
    if (forward_head_dim(dim, kFloat) == 32) return f.template operator()<32>();
    if (forward_head_dim(dim, kFloat) == 96) return f.template operator()<96>();
  }
  visit_head_dim(dim, f);
}

// Forward by wgmma: warpgroups of 64 rows, and a third that fetches the keys for both.
constexpr AttentionTiles wgmma_tiles(int dim) { return {8, 1, 128, dim <= 64 ? 4 : 2, 1}; }
inline constexpr int kWgmmaProducers = 128;
inline constexpr int kWgmmaAlignment = 1024;  // of the tiles: a period of the swizzle

// Shared memory of a block, in bytes; the structs that use it are checked against these.
// Last comes a byte a thread, for what it found out about a tile.
constexpr int64_t forward_shared_bytes(int dim, bool is_float, bool small = false) {
  const AttentionTiles t = forward_tiles(dim, is_float, small);
  const int value_dim = forward_value_dim(dim, is_float);
  const int64_t stage = tile_bytes(dim, t.columns, t.planes) +
                        tile_bytes(value_dim, t.columns, t.planes) + 4 * t.columns;
  return tile_bytes(dim, t.rows(), t.planes) + t.stages * stage + 12 * t.rows() + t.threads();
}
constexpr int64_t wgmma_shared_bytes(int dim) {
  const AttentionTiles t = wgmma_tiles(dim);
  const int64_t stage = 4 * dim * t.columns + 4 * t.columns + 4 + 4 * 8;
  return 2 * dim * t.rows() + t.stages * stage + 12 * t.rows() + 8;
}
constexpr int64_t grad_query_shared_bytes(int dim, bool is_float) {
  const AttentionTiles t = backward_tiles(dim, is_float);
  const int64_t stage = 2 * tile_bytes(dim, t.columns, t.planes) + 4 * t.columns;
  return 2 * tile_bytes(dim, t.rows(), t.planes) + t.stages * stage + 24 * t.rows() + t.threads();
}
constexpr int64_t grad_key_shared_bytes(int dim, bool is_float) {
  const AttentionTiles t = backward_tiles(dim, is_float);
  const int64_t stage = 2 * tile_bytes(dim, t.columns, t.planes) + 24 * t.columns;
  return 2 * tile_bytes(dim, t.rows(), t.planes) + t.stages * stage + 4 * t.rows() + t.threads();
}

// The shapes that the plans depend on.
struct AttentionShape {
  int64_t batch, heads_q, heads_kv, queries, keys, head_dim, value_dim;
  bool is_float;
  bool by_head = false;  // query heads have blocks of rows of their own: rows do not interleave

  constexpr int64_t dim() const { return head_dim > value_dim ? head_dim : value_dim; }
  // Wide heads have a kernel for a few rows only, which takes all rows that many at a time.
  constexpr bool is_wide() const { return dim() > 256; }
  // Of a key head.
  constexpr int64_t row_blocks(int rows) const {
    const int64_t group = heads_q / heads_kv;
    return by_head ? group * divide_up(queries, rows) : divide_up(queries * group, rows);
  }
};

constexpr bool takes_small_tiles(const AttentionShape& s, int64_t shared_limit) {
  const int dim = forward_head_dim(s.dim(), s.is_float);
  return has_small_tiles(dim, s.is_float) && forward_shared_bytes(dim, s.is_float) > shared_limit;
}

// A block for tiles.rows() query rows of one key head and one part of the value columns. Example:
// B = 8, Hq = 9, Hkv = 3, L = 1000, D = Dv = 64 in bf16: a key head has 3 * 1000 rows (its query
// heads share blocks), 128 to a block, so 8 * 3 * 24 = 576 blocks of 128 threads and 56 KB.
constexpr LaunchPlan plan_forward(const AttentionShape& s, int64_t shared_limit) {
  const int dim = forward_head_dim(s.dim(), s.is_float);
  const bool small = takes_small_tiles(s, shared_limit);
  const AttentionTiles tiles = forward_tiles(dim, s.is_float, small);
  const int64_t parts = divide_up(s.value_dim, forward_value_dim(dim, s.is_float));
  return {{s.batch * s.heads_kv * parts * s.row_blocks(tiles.rows()), 1, 1},
          tiles.threads(),
          forward_shared_bytes(dim, s.is_float, small),
          "attention"};
}

// Whether a block of the forward kernel has all value columns of its rows.
constexpr bool in_one_part(const AttentionShape& s) {
  return s.value_dim <= forward_value_dim(forward_head_dim(s.dim(), s.is_float), s.is_float);
}

// Whether the wgmma kernel can take a call: `aligned` says that every row of q, k, v and out starts
// at a multiple of 16 bytes. Code for compute capability 9.0a (`capability` 90) runs on no other.
constexpr bool takes_wgmma(const AttentionShape& s, bool aligned, int capability) {
  return capability == 90 && aligned && !s.is_float && s.head_dim == s.value_dim &&
         (s.head_dim == 64 || s.head_dim == 128);
}

// A block for 128 rows. The example above: 24 * 24 = 576 blocks of 384 threads and 148 KB.
constexpr LaunchPlan plan_wgmma(const AttentionShape& s) {
  const int dim = static_cast<int>(s.head_dim);
  const AttentionTiles tiles = wgmma_tiles(dim);
  return {{s.batch * s.heads_kv * s.row_blocks(tiles.rows()), 1, 1},
          tiles.threads() + kWgmmaProducers,
          wgmma_shared_bytes(dim) + kWgmmaAlignment - 16,
          "attention by wgmma"};
}

// A block for tiles.rows() query rows. The example above: 24 * 47 = 1128 blocks.
constexpr LaunchPlan plan_grad_query(const AttentionShape& s) {
  const int dim = padded_head_dim(s.dim());
  const AttentionTiles tiles = backward_tiles(dim, s.is_float);
  return {{s.batch * s.heads_kv * s.row_blocks(tiles.rows()), 1, 1},
          tiles.threads(),
          grad_query_shared_bytes(dim, s.is_float),
          "the gradient of queries"};
}

// A block for tiles.rows() keys. The example above with N = 1000: 24 * 16 = 384 blocks.
constexpr LaunchPlan plan_grad_key(const AttentionShape& s) {
  const int dim = padded_head_dim(s.dim());
  const AttentionTiles tiles = backward_tiles(dim, s.is_float);
  return {{s.batch * s.heads_kv * divide_up(s.keys, tiles.rows()), 1, 1},
          tiles.threads(),
          grad_key_shared_bytes(dim, s.is_float),
          "the gradient of keys"};
}

// The gradient of a float mask [B', H', L', N]: a block for tiles.rows() queries of a head of the
// mask, or, where queries share a row of it, for so many tiles of keys. The example above with a
// mask [1, 9, 1000, 1000]: 9 * 16 = 144 blocks.
inline constexpr int kMaskKeyTiles = 4;
constexpr int64_t grad_mask_shared_bytes(int dim, bool is_float) {
  const AttentionTiles t = backward_tiles(dim, is_float);
  return divide_up(grad_query_shared_bytes(dim, is_float), 16) * 16 + 4 * t.warps * t.columns;
}
constexpr LaunchPlan plan_grad_mask(const AttentionShape& s, int64_t heads, bool shares_row) {
  const int dim = padded_head_dim(s.dim());
  const AttentionTiles tiles = backward_tiles(dim, s.is_float);
  const int64_t parts = shares_row ? divide_up(s.keys, kMaskKeyTiles * tiles.columns)
                                   : divide_up(s.queries, tiles.rows());
  return {{heads * parts, 1, 1},
          tiles.threads(),
          grad_mask_shared_bytes(dim, s.is_float),
          "the gradient of a mask"};
}

// A warp for each row of [B, Hq, L], eight to a block. The example above: 9000 blocks.
constexpr LaunchPlan plan_delta(const AttentionShape& s) {
  return {{divide_up(s.batch * s.heads_q * s.queries, 8), 1, 1}, 256, 0};
}
// A warp for each key.
constexpr LaunchPlan plan_recompute_keys(const AttentionShape& s) {
  return {{divide_up(s.batch * s.heads_kv * s.keys, 8), 1, 1}, 256, 0};
}

}  // namespace tokred::cuda
