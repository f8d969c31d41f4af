// Dot products of a few f32 rows with rows of codes. Lanes are tokens: the codes of sixteen tokens
// are turned in words of four bytes, and each byte of a word gives the code of a channel. So nothing
// is summed over lanes, scales are lanes too, and every multiply-add meets a register of codes.
#pragma once

#include "packed_attn_codes.h"

namespace tokred::TOKRED_ISA {

// What an unpacked code has to be multiplied by, for all channels.
inline void word_factors(Codes codes, const PackFormat& f, float* factor) {
  alignas(64) float lane[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const int byte = i % 4;
    const bool shifted = codes == Codes::bits8 && byte == 3;
    lane[i] = codes == Codes::fp8 ? 256.0f
              : shifted           ? 1.0f
                                  : 1.0f / static_cast<float>(1 << 8 * byte);
  }
  for (int64_t d = 0; d < f.head_dim; d += kLanes) store(factor + d, load(lane));
}

inline constexpr int64_t kMostWords = kMaxHeadDim / 4;  // of a token

// words[word][16 tokens].
TOKRED_INLINE void turn_words(const Place* tokens, int64_t bytes, int32_t* words) {
  for (int64_t token = 0; token < kLanes; token += 4) {
    for (int64_t byte = 0; byte < bytes; byte += 16) {
      Four<int32_t> x[4];
      for (int i = 0; i < 4; ++i) std::memcpy(&x[i], tokens[token + i].row + byte, sizeof x[i]);
      transpose<int32_t>(x);
      for (int i = 0; i < 4; ++i) {
        std::memcpy(words + (byte / 4 + i) * kLanes + token, &x[i], sizeof x[i]);
      }
    }
  }
}

// The codes in byte kByte of a register of words, times what word_factors() makes good; the bits of
// the channel are the byte's lowest.
template <Codes kCodes, int kByte>
TOKRED_INLINE Register<float> codes_of_byte(i32x16::N words) {
  typedef uint32_t Unsigned __attribute__((vector_size(kRegisterBytes)));
  if constexpr (kCodes == Codes::fp8) {
    // The bits of an f32 that is 2^-120 times the number.
    const i32x16::N bits = words << (24 - 8 * kByte) >> 4 & static_cast<int32_t>(0x87f00000u);
    return (Register<float>)bits * 0x1p112f;
  } else if constexpr (kCodes == Codes::bits8 && kByte == 3) {
    return __builtin_convertvector((i32x16::N)((Unsigned)words >> 24), Register<float>);
  } else {
    constexpr int32_t kMask = ((1 << bits_of(kCodes)) - 1) << 8 * kByte;
    return __builtin_convertvector(words & kMask, Register<float>);
  }
}

// A block's codes, turned.
struct TurnedCodes {
  const int32_t* words;  // [token / 16][words_of_token][16 tokens]
  const float* scales;   // [groups][kGather], or null for 1
  int64_t words_of_token, groups, group_vecs;
};

// out[row][token ..] = what the groups before left there + the scale of this one * its sum. Without
// scales there is one group.
template <int kRows, int kParts>
TOKRED_INLINE void add_group(const TurnedCodes& turned, int64_t group, int64_t token,
                             Register<float> (&sum)[kRows][kParts], float* out) {
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      const int64_t first = token + part * f32x16::kWidth;
      float* to = out + row * kGather + first;
      if (turned.scales) {
        Register<float> scale, before = {};
        std::memcpy(&scale, turned.scales + group * kGather + first, sizeof scale);
        if (group > 0) std::memcpy(&before, to, sizeof before);
        sum[row][part] = multiply_add(sum[row][part], scale, before);
      }
      std::memcpy(to, &sum[row][part], sizeof sum[row][part]);
    }
  }
}

// out[row][token ..] for kRows rows and 16 kVecs tokens: the sum over the groups, ascending, of
// their scale times the sum over their channels, ascending, of x code.
template <Codes kCodes, int kRows, int kVecs>
TOKRED_INLINE void dot_code_tile(const float* x, int64_t x_stride, const TurnedCodes& turned,
                                 int64_t token, float* out) {
  constexpr int kBits = bits_of(kCodes), kPlanes = 8 / kBits, kWidth = f32x16::kWidth;
  constexpr int kParts = kVecs * f32x16::kRegisters;
  const int32_t* words = turned.words + token * turned.words_of_token;
  const auto of_part = [&](int part, int64_t word) {
    i32x16::N x;
    std::memcpy(&x, words + (part * kWidth / kLanes * turned.words_of_token + word) * kLanes +
                        part * kWidth % kLanes, sizeof x);
    return x;
  };
  int64_t vec = 0;
  for (int64_t group = 0; group < turned.groups; ++group) {
    Register<float> sum[kRows][kParts] = {};
    for (const int64_t end = vec + turned.group_vecs; vec < end; ++vec) {
      const int shift = static_cast<int>(vec % kPlanes) * kBits;
      for (int64_t j = 0; j < 4; ++j) {
        i32x16::N word[kParts];
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
          word[part] = of_part(part, vec / kPlanes * 4 + j) >> shift;
        }
        const float* number = x + vec * kLanes + 4 * j;
        const auto add = [&]<int kByte>() {
          Register<float> codes[kParts];
#pragma GCC unroll 4
          for (int part = 0; part < kParts; ++part) {
            codes[part] = codes_of_byte<kCodes, kByte>(word[part]);
          }
#pragma GCC unroll 4
          for (int row = 0; row < kRows; ++row) {
            const Register<float> q = number[row * x_stride + kByte] - Register<float>{};
#pragma GCC unroll 4
            for (int part = 0; part < kParts; ++part) {
              sum[row][part] = multiply_add(codes[part], q, sum[row][part]);
            }
          }
        };
        add.template operator()<0>();
        add.template operator()<1>();
        add.template operator()<2>();
        add.template operator()<3>();
      }
    }
    add_group(turned, group, token, sum, out);
  }
}

// out[row][i] = x_row . codes_i for i < count, over `groups` groups of so many Vecs that are scaled
// by scales[group][kGather], or not where it is null; `tokens` are valid up to whole_lanes(count).
template <Codes kCodes>
__attribute__((noinline)) static void dot_codes(const float* x, int64_t x_stride, int64_t rows,
                                                const Place* tokens, int64_t count,
                                                const float* scales, int64_t groups,
                                                int64_t group_vecs, float* out,
                                                PlacesAhead& ahead) {
  alignas(64) int32_t words[kMostWords * kGather];
  alignas(64) float dots[kFewRows<float> * kGather];
  const int64_t bytes = groups * group_vecs * kLanes * bits_of(kCodes) / 8;
  const TurnedCodes turned{words, scales, bytes / 4, groups, group_vecs};
  for (int64_t token = 0; token < count; token += kLanes) {
    turn_words(tokens + token, bytes, words + token * turned.words_of_token);
  }
  for (int64_t row = 0; row < rows; row += kFewRows<float>) {
    visit_rows<kFewRows<float>>(rows - row, [&]<int kRows>() {
      // The words need registers of their own.
      constexpr int kVecs = kBeside<float, kRows == 1 ? 2 : kPowerOfTwo<kRows>>;
      int64_t token = 0;
      const auto tiles = [&]<int kCount>() {
        for (; token + (kCount - 1) * kLanes < count; token += kCount * kLanes) {
          ahead.take(row == 0 ? kCount * kLanes : 0);
          dot_code_tile<kCodes, kRows, kCount>(x + row * x_stride, x_stride, turned, token, dots);
        }
      };
      tiles.template operator()<kVecs>();
      if constexpr (kVecs > 1) tiles.template operator()<1>();
      for (int r = 0; r < kRows; ++r) {
        copy_bytes(out + (row + r) * kGather, dots + r * kGather, 4 * count);
      }
    });
  }
}

}  // namespace tokred::TOKRED_ISA
