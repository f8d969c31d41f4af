// Tiles and launch plans of attention and scores on packed keys and values.
#pragma once

#include "attention/cuda/plan_decode.h"
#include "attention/cuda/plan_scores.h"
#include "kv_pack/params.h"

namespace tokred::cuda {

// The copies of a tile's packed rows that a warp makes before it unpacks them: the pitch of each
// part and the bytes of all. Params of groups along tokens are read in place.
struct PackedCopy {
  int k_codes, k_params, v_codes, v_params;  // pitches
  constexpr int bytes() const { return kDecodeKeys * (k_codes + k_params + v_codes + v_params); }
};
constexpr int code_copy_pitch(const PackFormat& f) {
  return static_cast<int>(round_up(code_bytes(f.head_dim, f.bits), 16));
}
constexpr int param_copy_pitch(const PackFormat& f) {
  return f.axis == GroupAxis::token ? 0 : static_cast<int>(round_up(2 * params_per_row(f), 16));
}
constexpr PackedCopy packed_copy(const PackFormat& k, const PackFormat& v) {
  return {code_copy_pitch(k), param_copy_pitch(k), code_copy_pitch(v), param_copy_pitch(v)};
}

// As in decode a block has kDecodeRows rows, one split of their keys and a part of the value
// columns, and its warps take tiles of kDecodeKeys keys in turn; a warp unpacks keys and values to
// the same tile.
constexpr DecodeTiles max_packed_tiles(int dim, bool is_float) {
  return {is_float && dim > 128 ? 2 : 4, 3};
}
// 16-bit keys and queries are two planes, which keep what unpacking and rotation give.
constexpr int packed_query_planes(bool is_float) { return is_float ? 3 : 2; }

constexpr int64_t packed_tile_bytes(int dim, bool is_float) {
  return is_float ? int64_t{4} * kDecodeKeys * raw_pitch(dim) : tile_bytes(dim, kDecodeKeys, 2);
}
// Scale and offset of each group of a tile's tokens.
constexpr int64_t packed_scales_bytes(int dim) { return int64_t{8} * kDecodeKeys * (dim / 16 + 1); }
// Of the block; of each of its warps, and of each of their stages beside the copies.
constexpr int64_t packed_fixed_bytes(int dim, bool is_float) {
  return tile_bytes(dim, kDecodeRows, packed_query_planes(is_float)) +
         (24 + 8 * max_packed_tiles(dim, is_float).warps) * kDecodeRows + 2 * dim +
         4 * kDecodeRows * dim / 16;
}
constexpr int64_t packed_warp_bytes(int dim, bool is_float) {
  return packed_tile_bytes(dim, is_float) + packed_scales_bytes(dim);
}
inline constexpr int64_t kPlacesBytes = int64_t{16} * kDecodeKeys;
constexpr int64_t packed_shared_bytes(int dim, bool is_float, const PackedCopy& copy,
                                      const DecodeTiles& t) {
  const int64_t stages = t.stages * (kPlacesBytes + copy.bytes());
  return packed_fixed_bytes(dim, is_float) + t.warps * (packed_warp_bytes(dim, is_float) + stages);
}
constexpr DecodeTiles packed_tiles(int dim, bool is_float, const PackedCopy& copy,
                                   int64_t shared_limit) {
  return fitting_tiles(max_packed_tiles(dim, is_float), shared_limit, [&](const DecodeTiles& t) {
    return packed_shared_bytes(dim, is_float, copy, t);
  });
}

// Example: B = 1, Hq = 32, Hkv = 8, L = 1, T = 131072, D = 128 in bf16, 4 bits in groups of 32
// channels: 8 row_tiles and 128 splits, 1024 blocks of 128 threads and 82 KB, of which two fit a
// multiprocessor.
constexpr LaunchPlan plan_packed_decode(const ListShape& s, int64_t row_tiles,
                                        const PackedCopy& copy, const DecodeTiles& tiles) {
  const int dim = padded_head_dim(s.attention.dim());
  const bool is_float = s.attention.is_float;
  const int64_t parts = divide_up(s.attention.value_dim, forward_value_dim(dim, is_float));
  return {{row_tiles, decode_splits(s.length), parts},
          tiles.threads(),
          packed_shared_bytes(dim, is_float, copy, tiles),
          "attention on packed tokens"};
}

// Heads above 256 dimensions: a block for kDecodeRows rows and one split of their keys. Example:
// B = 1, Hq = 128, Hkv = 1, L = 1, T = 32768: 8 row tiles and 64 splits, 512 blocks of 256 threads
// and 37 KB.
inline constexpr int kWideThreads = 256;
inline constexpr int64_t kWideSharedBytes =
    kDecodeKeys * 4 * kMaxWideDim + 2 * kMaxWideDim + kPlacesBytes;
constexpr LaunchPlan plan_wide_decode(const ListShape& s, int64_t row_tiles) {
  return {{row_tiles, decode_splits(s.length), 1},
          kWideThreads,
          kWideSharedBytes,
          "attention on packed tokens of wide heads"};
}

// Whether rotated values span more columns than a block has: they are rotated back afterwards, a
// warp a row.
constexpr bool rotates_later(const AttentionShape& s) {
  return hadamard_size(s.value_dim) > forward_value_dim(padded_head_dim(s.dim()), s.is_float);
}
constexpr LaunchPlan plan_rotate_out(const AttentionShape& s) {
  return {
      {divide_up(s.batch * s.heads_q * s.queries, kCombineThreads / 32), 1, 1}, kCombineThreads, 0};
}

// Query rows that packed_qk_score scores at once: as many as unpacking leaves registers for.
inline constexpr int kPackedScoreRows = 2;

// The queries of packed_qk_score where keys are rotated, eight channels a thread. Example: B = 8,
// Hq = 32, D = 128: 256 rows of 16 lanes, 16 blocks.
constexpr LaunchPlan plan_rotate_queries(int64_t rows, int lanes) {
  return {{divide_up(rows * lanes, kScoreThreads), 1, 1}, kScoreThreads, 0};
}

}  // namespace tokred::cuda
