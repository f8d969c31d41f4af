// Tiles and launch plans of packed_attention and packed_qk_score on codes as they are.
#pragma once

#include "packed_attn/cuda/plan.h"

namespace tokred::cuda {

inline constexpr int kCodeKeys = 32;   // of a tile: one a lane, where tokens are looked up
inline constexpr int kCodeRows = 8;    // query rows of a block: columns of a product
inline constexpr int kCodeWarps = 4;
inline constexpr int kCodeLanes = 4;   // that copy a row of codes
inline constexpr int kCodeStages = 2;  // one under way, one at work
inline constexpr int kCodeDim = 128;   // the largest head

// Rows of codes or of params on their way to shared memory: their bytes, how many of them are
// copied at once (16, 4 or 1, as addresses allow), and the pitch of the copies. `whole`: the lanes
// of a row copy it at once, sixteen bytes each.
struct RowCopy {
  int bytes, unit, pitch;
  bool whole;
};
// `together`: what the address and the strides in bytes of all rows have in common, or-ed.
constexpr RowCopy row_copy(int64_t bytes, uint64_t together, int64_t pitch, int lanes) {
  const uint64_t all = together | static_cast<uint64_t>(bytes);
  const int unit = all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : 1;
  return {static_cast<int>(bytes), unit, static_cast<int>(pitch),
          unit == 16 && bytes <= 16 * lanes};
}

// A side of a tile: rows of codes, of which eight lie in different banks, then rows of params.
struct SideCopy {
  RowCopy codes, params;
  constexpr int bytes() const { return kCodeKeys * (codes.pitch + params.pitch); }
};
constexpr SideCopy side_copy(const PackFormat& f, uint64_t codes, uint64_t params) {
  const int64_t row = code_bytes(f.head_dim, f.bits), of_params = 2 * params_per_row(f);
  return {row_copy(row, codes, row % 32 == 0 ? row + 16 : row, kCodeLanes),
          row_copy(of_params, params, round_up(of_params, 16), 1)};
}

inline SideCopy side_copy(const PackedRows& rows) {
  const auto together = [](const void* data, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(data) | static_cast<uint64_t>(bytes);
  };
  return side_copy(rows.format,
                   together(rows.codes, rows.codes_stride_batch | rows.codes_stride_head |
                                            rows.codes_stride_token),
                   together(rows.params, 2 * (rows.params_stride_batch | rows.params_stride_head |
                                              rows.params_stride_row)));
}

// The copies of a tile's packed rows that a warp makes.
struct CodeCopy {
  SideCopy k, v;
  int v_first, bytes;
};
constexpr CodeCopy code_copy(const SideCopy& k, const SideCopy& v) {
  return {k, v, k.bytes(), k.bytes() + v.bytes()};
}

// Whether fragments can be made from the codes of a side: groups along channels, codes that are
// numbers, and runs of sixteen bytes, which all hold as many channels.
constexpr bool makes_fragments(const PackFormat& f) {
  return f.axis == GroupAxis::channel && f.scheme <= PackScheme::symmetric &&
         (f.bits == 1 || f.bits == 2 || f.bits == 4) && f.head_dim <= kCodeDim &&
         code_bytes(f.head_dim, f.bits) % 16 == 0;
}

constexpr bool takes_fragments(DType dtype, const ListShape& s, const PackFormat& k,
                               const PackFormat& v) {
  return dtype == DType::bf16 && s.rows() <= kCodeRows && makes_fragments(k) && makes_fragments(v);
}

constexpr int64_t code_fixed_bytes() {
  return tile_bytes(kCodeDim, kCodeRows, 2) + 8 * kCodeKeys * kCodeDim / 16 * kCodeWarps +
         int64_t{16} * kCodeKeys * kCodeWarps * kCodeStages + 4 * kCodeRows * kCodeDim / 16 +
         (24 + 8 * kCodeWarps) * kCodeRows + 4 * kCodeWarps * kCodeRows * kCodeDim / 16 + 16;
}
// What the warps have summed takes the place of the copies.
constexpr int64_t code_shared_bytes(const CodeCopy& copy) {
  const int64_t stages = int64_t{kCodeWarps} * kCodeStages * copy.bytes;
  const int64_t sums = int64_t{4} * kCodeWarps * kCodeRows * kCodeDim;
  return code_fixed_bytes() + (stages > sums ? stages : sums);
}

// Example: B = 1, Hq = 32, Hkv = 8, L = 1, T = 131072, D = 128 in 4 bits in groups of 32 channels:
// 8 row tiles and 128 splits, 1024 blocks of 128 threads and 66 KB, of which three fit a
// multiprocessor.
constexpr LaunchPlan plan_code_decode(const ListShape& s, int64_t row_tiles, const CodeCopy& copy) {
  return {{row_tiles, decode_splits(s.length), 1},
          32 * kCodeWarps,
          code_shared_bytes(copy),
          "attention on codes"};
}

// packed_qk_score: a block for a chunk of the keys of one key head. Example: B = 1, Hkv = 8,
// T = 131072, D = 128 in 4 bits in groups of 32: 2048 blocks of 512 keys, 128 threads and 41 KB, of
// which four fit a multiprocessor.
constexpr int64_t code_score_chunk(int64_t heads, int64_t keys) {
  const int64_t step = kCodeWarps * kCodeKeys, longest = 4 * step;
  return heads * divide_up(keys, longest) >= 528 ? longest : step;
}
constexpr int64_t code_score_fixed_bytes() {
  return tile_bytes(kCodeDim, kCodeRows, 2) + 4 * kCodeRows * kCodeDim / 16 + 16 +
         8 * kCodeKeys * kCodeDim / 16 * kCodeWarps +
         int64_t{4} * kCodeKeys * kCodeWarps * kCodeStages;
}
constexpr LaunchPlan plan_code_score(int64_t heads, int64_t keys, const SideCopy& copy) {
  return {{heads * divide_up(keys, code_score_chunk(heads, keys)), 1, 1},
          32 * kCodeWarps,
          code_score_fixed_bytes() + int64_t{kCodeWarps} * kCodeStages * copy.bytes()};
}

}  // namespace tokred::cuda
