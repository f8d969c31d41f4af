// Launch plans of the kv_pack ops.
#pragma once

#include "common/cuda/plan.h"
#include "kv_pack/params.h"

namespace tokred::cuda {

inline constexpr int kPackThreads = 256;

// The lanes that share a row of up to 256 channels, eight neighbours each; those of a wider row
// take it in parts.
constexpr int pack_lanes(int64_t head_dim) {
  return head_dim <= 64 ? 8 : head_dim <= 128 ? 16 : 32;
}
constexpr int64_t pack_rows(int lanes) { return kPackThreads / lanes; }  // of a block at once

// The tokens of an item that one append may pack at most, T tokens being held already: the exact
// number where T is known.
constexpr int64_t max_packed(GroupAxis axis, int64_t window, int64_t tokens, int64_t held) {
  if (held >= 0) {
    return packed_tokens(axis, window, held + tokens) - packed_tokens(axis, window, held);
  }
  return axis == GroupAxis::token && window > 0 ? round_up(tokens, window) : tokens;
}

// Codes of a block's rows, a byte each, and along tokens the extremes of 8 warps by channel.
constexpr int64_t pack_shared_bytes(int lanes) { return 8 * kPackThreads + 2 * 8 * 4 * 8 * lanes; }

// Of wide rows, a warp each: the numbers and the codes.
inline constexpr int64_t kWidePackBytes = kPackThreads / 32 * 5 * kMaxWideDim;

// Along channels a block for pack_rows() rows of a head, along tokens one for a group. Example:
// B = 8, H = 8, N = 131072, D = 128: 64 * 8192 blocks of 16 rows along channels; 64 * 4096 blocks
// along tokens in groups of 32. One token more along channels: 64 blocks.
constexpr int64_t pack_units(const PackFormat& f, int64_t tokens) {
  return divide_up(tokens,
                   f.axis == GroupAxis::token ? f.group_size : pack_rows(pack_lanes(f.head_dim)));
}
constexpr LaunchPlan plan_kv_pack(const PackFormat& f, int64_t heads, int64_t tokens) {
  const int64_t bytes =
      f.head_dim > kMaxHeadDim ? kWidePackBytes : pack_shared_bytes(pack_lanes(f.head_dim));
  return {{heads * pack_units(f, tokens), 1, 1}, kPackThreads, bytes};
}

// pack_runs_kernel: a lane owns eight bytes of a row of codes, of kRunSteps rows one after another.
inline constexpr int kRunSteps = 8;

struct RunLayout {
  int lanes, group_lanes;    // of a row, and that share a group; powers of two
  int groups;                // of a lane
  int64_t units;             // blocks of a head
  float divisor, reciprocal; // of the range of a group, that make its scale
};

// Whether its rows are runs of sixteen bytes whose lanes share groups evenly. `aligned`: rows of
// numbers start at multiples of 16 bytes, those of codes of 8.
constexpr bool is_power_of_two(int64_t n) { return n > 0 && (n & (n - 1)) == 0; }
constexpr bool packs_runs(const PackFormat& f, bool aligned) {
  if (f.bits != 2 && f.bits != 4 && f.bits != 8) return false;
  const int64_t run = 128 / f.bits,
                of_run = f.group_size / run;  // channels of a run, runs of a group
  return aligned && f.axis == GroupAxis::channel && f.scheme <= PackScheme::symmetric &&
         !f.rotated && f.head_dim % run == 0 &&
         (of_run * run == f.group_size ? is_power_of_two(of_run) : run % f.group_size == 0);
}
constexpr RunLayout run_layout(const PackFormat& f, int64_t tokens) {
  const int64_t run = 128 / f.bits, levels = (int64_t{1} << f.bits) - 1;
  int lanes = 2;
  while (8 * lanes < code_bytes(f.head_dim, f.bits)) lanes *= 2;
  const bool small = f.group_size < run;
  const auto divisor = static_cast<float>(has_offset(f.scheme) ? levels : levels / 2);
  return {lanes,
          small ? 2 : static_cast<int>(2 * f.group_size / run),
          small ? static_cast<int>(run / f.group_size) : 1,
          divide_up(tokens, int64_t{kRunSteps} * (kPackThreads / lanes)),
          divisor,
          1.0f / divisor};
}
// Example: B = 8, H = 8, N = 131072, D = 128 in 4 bits: 8 lanes a row, 64 * 512 blocks of 256 rows.
constexpr LaunchPlan plan_pack_runs(int64_t heads, const RunLayout& layout) {
  return {{heads * layout.units, 1, 1}, kPackThreads, 0};
}

// Rows of kv_unpack, and those that go to the window: pack_rows() to a block. The example above:
// 64 * 8192 blocks.
constexpr LaunchPlan plan_packed_rows(int64_t head_dim, int64_t rows) {
  return {{divide_up(rows, pack_rows(pack_lanes(head_dim))), 1, 1},
          kPackThreads,
          head_dim > kMaxHeadDim ? kWidePackBytes : 0};
}

}  // namespace tokred::cuda
