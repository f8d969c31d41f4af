// Tiles and launch plans of attention with few query rows (decode) and over index lists.
#pragma once

#include "attention/cuda/plan.h"
#include "attention/params.h"

namespace tokred::cuda {

inline constexpr int kDecodeRows = 16;  // query rows of a block: a tile of the tensor cores
inline constexpr int kDecodeKeys = 16;  // keys of a tile
inline constexpr int kCombineThreads = 256;
inline constexpr int64_t kMaxDecodeRows = 64;  // that share their keys
inline constexpr int64_t kMaxRowTiles = 1 << 30;  // of a launch
inline constexpr int64_t kMaxPartialBytes = int64_t{64} << 20;

// Which query rows share which keys. The lists of a head follow each other, block_q queries each;
// the heads of a group share one (heads = Hkv) or have one each (heads = Hq). Dense attention is
// one list of all keys.
struct ListShape {
  AttentionShape attention;
  int64_t heads, length, block_q;  // Hkv or Hq, keys of a list, queries of a list

  constexpr int64_t lists() const {
    return block_q > 0 ? divide_up(attention.queries, block_q) : 0;
  }
  constexpr int64_t all_lists() const { return attention.batch * heads * lists(); }
  constexpr int64_t rows() const { return block_q * (attention.heads_q / heads); }  // of a list
};

constexpr ListShape dense_list(const AttentionShape& s) {
  return {s, s.heads_kv, s.keys, s.queries};
}

// Decode: a block for kDecodeRows rows, one split of their keys, and a part of the value columns as
// in forward_value_dim. The warps take the tiles of keys in turn, each with copies of its own.
struct DecodeTiles {
  int warps;
  int stages;  // tiles of a warp under way or at work, at least 2

  constexpr int threads() const { return 32 * warps; }
};
// bytes(tiles) of shared memory: the most warps, then stages, up to `max` that fit; where nothing
// does, the fewest.
template <class Bytes>
constexpr DecodeTiles fitting_tiles(DecodeTiles max, int64_t shared_limit, Bytes bytes) {
  for (int warps = max.warps; warps > 0; warps /= 2) {
    for (int stages = max.stages; stages >= 2; --stages) {
      if (bytes(DecodeTiles{warps, stages}) <= shared_limit) return {warps, stages};
    }
  }
  return {1, 2};
}

constexpr DecodeTiles max_decode_tiles(int dim, bool is_float) {
  if (is_float) return {dim <= 128 ? 4 : dim <= 256 ? 2 : 1, dim <= 64 ? 3 : 2};
  return {dim <= 256 ? 4 : 2, dim <= 64 ? 4 : dim <= 128 ? 3 : 2};
}
// The compiled head size.
constexpr int decode_head_dim(int64_t dim) {
  return dim <= 256 ? padded_head_dim(dim) : static_cast<int>(kMaxWideDim);
}

// Queries, their visibility, and what the warps have summed; then the copies of tiles.
constexpr int64_t decode_fixed_bytes(int dim, bool is_float) {
  const int warps = max_decode_tiles(dim, is_float).warps;
  return tile_bytes(dim, kDecodeRows, is_float ? 3 : 1) + (24 + 8 * warps) * kDecodeRows;
}
constexpr int64_t decode_stage_bytes(int dim, bool is_float) {
  const int value_dim = forward_value_dim(dim, is_float);
  const int64_t tiles =
      is_float ? int64_t{4} * kDecodeKeys * (raw_pitch(dim) + raw_pitch(value_dim))
               : tile_bytes(dim, kDecodeKeys, 1) + tile_bytes(value_dim, kDecodeKeys, 1);
  return tiles + 8 * kDecodeKeys;
}
constexpr int64_t decode_shared_bytes(int dim, bool is_float, const DecodeTiles& t) {
  return decode_fixed_bytes(dim, is_float) +
         int64_t{t.warps} * t.stages * decode_stage_bytes(dim, is_float);
}
constexpr DecodeTiles decode_tiles(int dim, bool is_float, int64_t shared_limit) {
  return fitting_tiles(max_decode_tiles(dim, is_float), shared_limit,
                       [&](const DecodeTiles& t) { return decode_shared_bytes(dim, is_float, t); });
}

// Whether so few rows share their keys that only splits of the keys fill the device. The many lists
// of a head fill it as well, and then a list of more than one tile of rows is not split.
constexpr bool is_decode(const ListShape& s) {
  return s.attention.is_wide() || s.rows() <= (s.lists() == 1 ? kMaxDecodeRows : kDecodeRows);
}

// Splits and their length both grow with the square root of the keys: 16 splits of 128 keys for
// 2048, 128 of 1024 for 131072. They depend on nothing else, so that the result of a row does not
// depend on its batch.
constexpr int64_t decode_split_length(int64_t keys) {
  int64_t length = 128;
  while (length * length / 8 < keys) length *= 2;
  return length;
}
constexpr int64_t decode_splits(int64_t keys) {
  return keys > 0 ? divide_up(keys, decode_split_length(keys)) : 1;
}

// A row tile is up to kDecodeRows rows of one list.
constexpr int64_t decode_tile_rows(const ListShape& s) {
  return s.rows() < kDecodeRows ? s.rows() : kDecodeRows;
}
constexpr int64_t decode_row_tiles(const ListShape& s) {
  return s.all_lists() * divide_up(s.rows(), kDecodeRows);
}
// Bytes that the splits of a row tile leave in the workspace: sums in f32, the largest logit and
// the sum of weights of each row. One split leaves nothing.
constexpr int64_t decode_tile_bytes(const ListShape& s) {
  const int64_t splits = decode_splits(s.length);
  return splits == 1 ? 0 : 4 * splits * decode_tile_rows(s) * (s.attention.value_dim + 2);
}
// Items of one launch, so that a prefill of many short lists needs no large workspace.
constexpr int64_t decode_launch_tiles(const ListShape& s) {
  const int64_t row_tiles = decode_row_tiles(s), bytes = decode_tile_bytes(s);
  int64_t most = kMaxRowTiles;
  if (bytes > 0) most = bytes < kMaxPartialBytes ? kMaxPartialBytes / bytes : 1;
  return row_tiles < most ? row_tiles : most;
}
constexpr int64_t decode_workspace_bytes(const ListShape& s) {
  return decode_launch_tiles(s) * decode_tile_bytes(s);
}

// Example: B = 1, Hq = 32, Hkv = 8, L = 1, N = 131072, D = 128 in bf16: 8 row_tiles of 4 rows and
// 128 splits of 1024 keys, 1024 blocks of 128 threads and 109 KB, of which two fit a
// multiprocessor; the partial results take 2 MB. With lists of 2048 keys: 8 x 16 = 128 blocks.
constexpr LaunchPlan plan_decode(const ListShape& s, int64_t row_tiles, const DecodeTiles& tiles) {
  const AttentionShape& a = s.attention;
  const int dim = decode_head_dim(a.dim());
  const int64_t parts = divide_up(a.value_dim, forward_value_dim(dim, a.is_float));
  return {{row_tiles, decode_splits(s.length), parts},
          tiles.threads(),
          decode_shared_bytes(dim, a.is_float, tiles),
          "decode"};
}

// A block for each row. The example above: 32 blocks of 8 warps that share out the splits.
constexpr int64_t combine_shared_bytes(int64_t dim = 256) {
  return 4 * (kCombineThreads / 32) * (dim + 1);
}
constexpr LaunchPlan plan_combine(const ListShape& s, int64_t row_tiles) {
  return {{decode_splits(s.length) == 1 ? 0 : row_tiles * decode_tile_rows(s), 1, 1},
          kCombineThreads,
          combine_shared_bytes(s.attention.is_wide() ? kMaxWideDim : 256)};
}

// Over lists, more rows than decode takes: a block for tiles.rows() rows of one list and a part of
// the value columns, as in biased_attention. The keys of three tiles are known at a time.
constexpr int64_t list_forward_shared_bytes(int dim, bool is_float, bool small = false) {
  const AttentionTiles t = forward_tiles(dim, is_float, small);
  const int value_dim = forward_value_dim(dim, is_float);
  const int64_t stage =
      tile_bytes(dim, t.columns, t.planes) + tile_bytes(value_dim, t.columns, t.planes);
  return tile_bytes(dim, t.rows(), t.planes) + t.stages * stage + 24 * t.columns + 24 * t.rows();
}
// Example: B = 1, Hq = 32, Hkv = 8, L = 4096, block_q = 64, D = 128 in bf16: 8 x 64 lists of 256
// rows, 64 to a block: 2048 blocks.
constexpr LaunchPlan plan_list_forward(const ListShape& s, int64_t shared_limit) {
  const AttentionShape& a = s.attention;
  const int dim = forward_head_dim(a.dim(), a.is_float);
  const bool small = takes_small_tiles(a, shared_limit);
  const AttentionTiles tiles = forward_tiles(dim, a.is_float, small);
  const int64_t parts = divide_up(a.value_dim, forward_value_dim(dim, a.is_float));
  return {{s.all_lists() * parts * divide_up(s.rows(), tiles.rows()), 1, 1},
          tiles.threads(),
          list_forward_shared_bytes(dim, a.is_float, small),
          "attention over lists"};
}

// Backward over lists. Of the rows of one list:
constexpr int64_t list_grad_query_shared_bytes(int dim, bool is_float) {
  const AttentionTiles t = backward_tiles(dim, is_float);
  return 2 * tile_bytes(dim, t.rows(), t.planes) +
         t.stages * 2 * tile_bytes(dim, t.columns, t.planes) + 24 * t.columns + 40 * t.rows();
}
constexpr int64_t list_grad_query_blocks(const ListShape& s) {
  const int dim = padded_head_dim(s.attention.dim());
  return s.all_lists() * divide_up(s.rows(), backward_tiles(dim, s.attention.is_float).rows());
}
// `blocks` of them in one launch, at most kMaxRowTiles.
constexpr LaunchPlan plan_list_grad_query(const ListShape& s, int64_t blocks) {
  const int dim = padded_head_dim(s.attention.dim());
  return {{blocks < kMaxRowTiles ? blocks : kMaxRowTiles, 1, 1},
          backward_tiles(dim, s.attention.is_float).threads(),
          list_grad_query_shared_bytes(dim, s.attention.is_float),
          "the gradient of queries over lists"};
}
// And of the keys, whose blocks count how often each list of a tile of rows names each of them.
constexpr int64_t list_grad_key_shared_bytes(int dim, bool is_float) {
  const AttentionTiles t = backward_tiles(dim, is_float);
  return 96 + 2 * tile_bytes(dim, t.rows(), t.planes) + 2 * tile_bytes(dim, t.columns, t.planes) +
         40 * t.columns + 8 * t.rows() + 4 * t.columns * (2 * t.rows() + 4);
}
constexpr LaunchPlan plan_list_grad_key(const ListShape& s) {
  LaunchPlan plan = plan_grad_key(s.attention);
  plan.shared_bytes =
      list_grad_key_shared_bytes(padded_head_dim(s.attention.dim()), s.attention.is_float);
  plan.kernel = "the gradient of keys over lists";
  return plan;
}

// A warp for each row of [B, H, L]. Example: B = 1, H = 32, L = 1: 4 blocks.
constexpr LaunchPlan plan_combine_states(int64_t rows) {
  return {{divide_up(rows, kCombineThreads / 32), 1, 1}, kCombineThreads, 0};
}

}  // namespace tokred::cuda
