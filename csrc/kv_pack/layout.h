// The bytes of packed keys and values, defined once for the CPU, for CUDA and for readers of cache
// files.
//
// A packed tensor [B, H, N, D] is two tensors. `codes` u8 [B, H, N, code_bytes(D, bits)]: a row of
// codes for every token. `params` f16: scales and offsets, a row for every token
// (axis channel: the groups are group_size neighbouring channels of one token) or for every
// group_size tokens (axis token: the groups are group_size tokens of one channel). A row of params
// has the scales of its groups, then, where the scheme has one, their offsets. Rows of several
// tensors may interleave in memory: every stride but the last is free.
#pragma once

#include "common/hadamard.h"

namespace tokred {

enum class GroupAxis : int32_t { channel, token };

// How a group of numbers x becomes codes c of b bits, and back:
// asymmetric  scale = (max - min) / (2^b - 1), offset = min;
//             c = rint(clamp((x - min) / scale, 0, 2^b - 1)), x' = scale c + offset
// zero_point  the same scale with min <= 0 <= max, offset z = rint(-min / scale), stored as it is;
//             c = clamp(rint(x / scale) + z, 0, 2^b - 1), x' = scale (c - z)
// symmetric   scale = max |x| / (2^(b-1) - 1), no offset, b >= 2;
//             c = clamp(rint(x / scale), -2^(b-1), 2^(b-1) - 1) + 2^(b-1), x' = scale (c - 2^(b-1))
// fp8         scale = max |x| / 448, no offset, b = 8; c = e4m3fn(x / scale), x' = scale c
// codebook    scale = sqrt(mean x^2) / 32, no offset, b <= 4, along channels; c = the number of
//             midpoints of neighbouring levels that are less than x / scale, x' = scale level[c].
//             Levels are bytes, ascending, in 1/32 of the root mean square; see gaussian_levels().
//             Channels l, l + 16, .. add their squares to sum l of sixteen, in order, and then sum
//             l + 8 is added to l, l + 4 to l, l + 2 to l, 1 to 0; no |x| counts as more than 2^40.
// All in f32, halves to even; scale and offset are stored in f16 and saturate at +-65504. Only
// finite numbers count for min, max and mean (without any these are 0). Where scale is 0 all codes
// are those of 0, or of min (asymmetric: 0). NaN packs as 0, as min in asymmetric; +-inf as the
// largest and the smallest code.
enum class PackScheme : int32_t { asymmetric, zero_point, symmetric, fp8, codebook };

inline constexpr float kFp8Max = 448.0f;
inline constexpr float kMaxParam = 65504.0f;
inline constexpr float kLevelStep = 0x1p-5f;      // of a level, in root mean squares
inline constexpr float kMaxInMean = 0x1p40f;   // that a number counts as in a mean square
inline constexpr int64_t kPackMultiple = 16;  // of head_dim, and of group_size along channels

struct PackFormat {
  int64_t head_dim;    // D, a multiple of kPackMultiple
  int64_t group_size;  // divides D (axis channel)
  int32_t bits;        // 1, 2, 3, 4 or 8
  GroupAxis axis;
  PackScheme scheme;
  bool rotated;  // rows are rotated (common/hadamard.h) before they are packed, the window too
};

constexpr bool has_offset(PackScheme scheme) {
  return scheme == PackScheme::asymmetric || scheme == PackScheme::zero_point;
}

constexpr int64_t code_bytes(int64_t head_dim, int64_t bits) { return head_dim * bits / 8; }

constexpr int64_t groups_per_row(const PackFormat& f) {
  return f.axis == GroupAxis::channel ? f.head_dim / f.group_size : f.head_dim;
}
constexpr int64_t params_per_row(const PackFormat& f) {
  return groups_per_row(f) * (has_offset(f.scheme) ? 2 : 1);
}

// The bytes level + 128 of a codebook's codes 0 .. 7 and 8 .. 15, the first one lowest. A row of
// codes through this table is a row of eight bits of the symmetric scheme with the same scales.
struct LevelBytes {
  uint64_t low = 0, high = 0;
};
constexpr LevelBytes with_level(LevelBytes bytes, int code, int level) {
  const uint64_t byte = static_cast<uint64_t>(level + 128) << code % 8 * 8;
  if (code < 8) return {bytes.low | byte, bytes.high};
  return {bytes.low, bytes.high | byte};
}
// Levels -x and x for the given ones, of which there are half as many as codes.
template <int kHalf>
constexpr LevelBytes symmetric_levels(const int (&positive)[kHalf]) {
  LevelBytes bytes;
  for (int i = 0; i < kHalf; ++i) {
    bytes = with_level(bytes, kHalf + i, positive[i]);
    bytes = with_level(bytes, kHalf - 1 - i, -positive[i]);
  }
  return bytes;
}
// The levels with the smallest mean square error for normally distributed numbers (Lloyd and Max).
constexpr LevelBytes gaussian_levels(int32_t bits) {
  constexpr LevelBytes k1 = symmetric_levels({26}), k2 = symmetric_levels({14, 48});
  constexpr LevelBytes k3 = symmetric_levels({8, 24, 43, 69});
  constexpr LevelBytes k4 = symmetric_levels({4, 12, 21, 30, 40, 52, 66, 87});
  return bits == 1 ? k1 : bits == 2 ? k2 : bits == 3 ? k3 : k4;
}
static_assert(gaussian_levels(2).low == 0xb08e7250 && gaussian_levels(2).high == 0);

// The format as which rows of levels are read.
constexpr PackFormat as_read(PackFormat f) {
  if (f.scheme != PackScheme::codebook) return f;
  f.bits = 8;
  f.scheme = PackScheme::symmetric;
  return f;
}

// Where the code of a channel lies in a row of 1, 2, 4 or 8 bits: in a byte, from a bit on. The
// bytes of a row are cut into runs of 16 (the rest into 8, 4, 2): the first channels of a run lie
// in the lowest bits of its bytes, one a byte, the next ones above them. So D = 128 in 4 bits is
// four runs; channels 0 .. 15 are the low halves of the first run, 16 .. 31 its high halves. The
// sixteen channels 16 i .. 16 i + 15 never straddle two runs.
struct CodePosition {
  int64_t byte;
  int32_t shift;
};
constexpr CodePosition code_position(int64_t channel, int64_t head_dim, int64_t bits) {
  const int64_t bytes = code_bytes(head_dim, bits);
  int64_t first = 0, run = 16;
  for (;; first += run, channel -= run * 8 / bits) {
    while (run > bytes - first) run /= 2;
    if (channel < run * 8 / bits) break;
  }
  return {first + channel % run, static_cast<int32_t>(channel / run * bits)};
}
// Three bits are the low two, as rows of two bits, followed by the high one, as rows of one bit.
constexpr int64_t high_bit_row(int64_t head_dim) { return code_bytes(head_dim, 2); }

static_assert(code_bytes(128, 4) == 64 && code_bytes(64, 3) == 24 && code_bytes(16, 1) == 2);
static_assert(code_position(17, 128, 4).byte == 1 && code_position(17, 128, 4).shift == 4);
static_assert(code_position(127, 128, 2).byte == 31 && code_position(127, 128, 2).shift == 6);
static_assert(code_position(9, 64, 1).byte == 1 && code_position(9, 64, 1).shift == 1);
static_assert(code_position(79, 80, 4).byte == 39 && code_position(72, 80, 4).shift == 4);

// Of a cache that holds `tokens` tokens, the first packed_tokens() are packed and the others lie in
// the window, token t in row t % window. Along tokens the window empties a whole window at a time,
// before it overflows; along channels it holds the last `window` tokens.
constexpr int64_t packed_tokens(GroupAxis axis, int64_t window, int64_t tokens) {
  if (window == 0) return tokens;
  if (axis == GroupAxis::token) return tokens > 0 ? (tokens - 1) / window * window : 0;
  return tokens > window ? tokens - window : 0;
}
static_assert(packed_tokens(GroupAxis::token, 64, 64) == 0);
static_assert(packed_tokens(GroupAxis::token, 64, 65) == 64);
static_assert(packed_tokens(GroupAxis::channel, 64, 65) == 1);

}  // namespace tokred
