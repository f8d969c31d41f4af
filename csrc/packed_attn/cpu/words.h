// packed_attention and packed_qk_score: dot products of a few queries with rows of codes. Lanes are
// tokens: the codes of sixteen tokens are transposed in words of four bytes, and each byte of a
// word gives the code of a channel. So nothing is summed over lanes, scales are lanes too, and
// every multiplication is by a whole register of codes.
#pragma once

#include "packed_attn/cpu/codes.h"
#include "packed_attn/cpu/fixed.h"

namespace tokred::TOKRED_ISA {

// The factor by which codes as codes_of_byte() gives them are to be multiplied, for all channels.
inline void word_factors(CodePath path, const PackFormat& f, float* factor) {
  alignas(64) float lane[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const int byte = i % 4;
    const bool shifted = path == CodePath::bits8 && byte == 3;
    lane[i] = path == CodePath::fp8 ? 256.0f
              : shifted             ? 1.0f
                                    : 1.0f / static_cast<float>(1 << 8 * byte);
  }
  for (int64_t d = 0; d < f.head_dim; d += kLanes) store(factor + d, load(lane));
}

inline constexpr int64_t kMaxWords = kMaxWideDim / 4;  // of a token

// Four words of every fourth token from `token` on, as many as a register holds.
template <class Tokens>
TOKRED_INLINE Register<int32_t> load_words(const Tokens& tokens, int64_t token, int64_t byte) {
  [[maybe_unused]] const auto row = [&](int i) { return tokens.row(token + 4 * i) + byte; };
#if defined(__AVX512F__)
  return (Register<int32_t>)load_quarters(row(0), row(1), row(2), row(3));
#elif defined(__AVX2__)
  const auto words = [&](int i) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row(i)));
  };
  return (Register<int32_t>)_mm256_inserti128_si256(_mm256_castsi128_si256(words(0)), words(1), 1);
#else
  Register<int32_t> words;
  std::memcpy(&words, tokens.row(token) + byte, sizeof words);
  return words;
#endif
}

// The same from four tokens on, one after the other.
template <class Tokens>
TOKRED_INLINE void load_four(const Tokens& tokens, int64_t token, int64_t byte,
                             Register<int32_t> (&x)[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) x[i] = load_words(tokens, token + i, byte);
}
#ifdef __AVX512F__
// In a run every fourth address and the stride give all: GCC would keep sixteen in registers.
TOKRED_INLINE void load_four(const TokenRun& run, int64_t token, int64_t byte,
                             Register<int32_t> (&x)[4]) {
  const uint8_t* row[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    row[i] = run.row(token + 4 * i) + byte;
    asm("" : "+r"(row[i]));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int64_t at = i * run.stride;
    x[i] = (Register<int32_t>)load_quarters(row[0] + at, row[1] + at, row[2] + at, row[3] + at);
  }
}
#endif

// words[word][16 tokens], of the tokens from `first` on. Each quarter of a register's lanes is four
// tokens, transposed by itself.
template <class Tokens>
TOKRED_INLINE void transpose_words(const Tokens& tokens, int64_t first, int64_t bytes,
                                   int32_t* words) {
  using Words = Register<int32_t>;
  constexpr int kWidth = i32x16::kWidth;
  Words low{}, high{};
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    low[i] = i / 4 * 4 + i % 4 / 2 + i % 2 * kWidth;
    high[i] = low[i] + 2;
  }
  for (int64_t token = 0; token < kLanes; token += kWidth) {
    for (int64_t byte = 0; byte < bytes; byte += 16) {
      Words x[4];
      load_four(tokens, first + token, byte, x);
      const Words even_low = __builtin_shuffle(x[0], x[2], low);
      const Words even_high = __builtin_shuffle(x[0], x[2], high);
      const Words odd_low = __builtin_shuffle(x[1], x[3], low);
      const Words odd_high = __builtin_shuffle(x[1], x[3], high);
      x[0] = __builtin_shuffle(even_low, odd_low, low);
      x[1] = __builtin_shuffle(even_low, odd_low, high);
      x[2] = __builtin_shuffle(even_high, odd_high, low);
      x[3] = __builtin_shuffle(even_high, odd_high, high);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        std::memcpy(words + (byte / 4 + i) * kLanes + token, &x[i], sizeof x[i]);
      }
    }
  }
}

// The codes in byte kByte of a register of words, but for word_factors(); the bits of
// the channel are the byte's lowest.
template <CodePath kCodes, int kByte>
TOKRED_INLINE Register<float> codes_of_byte(i32x16::N words) {
  typedef uint32_t Unsigned __attribute__((vector_size(kRegisterBytes)));
  if constexpr (kCodes == CodePath::fp8) {
    // The bits of an f32 that is 2^-120 times the number.
    const i32x16::N bits = words << (24 - 8 * kByte) >> 4 & static_cast<int32_t>(0x87f00000u);
    return (Register<float>)bits * 0x1p112f;
  } else if constexpr (kCodes == CodePath::bits8 && kByte == 3) {
    return __builtin_convertvector((i32x16::N)((Unsigned)words >> 24), Register<float>);
  } else {
    constexpr int32_t kMask = ((1 << bits_of(kCodes)) - 1) << 8 * kByte;
    return __builtin_convertvector(words & kMask, Register<float>);
  }
}

// A block's codes, transposed.
struct TransposedCodes {
  const int32_t* words;  // [token / 16][words_of_token][16 tokens]
  const float* scales;  // [groups][kGather], or null for 1
  int64_t words_of_token, groups, group_vecs;
};

// out[row][token ..] = what the groups before left there + the scale of this one * its sum. Without
// scales there is one group.
template <int kRows, int kParts>
TOKRED_INLINE void add_group(const TransposedCodes& transposed, int64_t group, int64_t token,
                             Register<float> (&sum)[kRows][kParts], float* out) {
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      const int64_t first = token + part * f32x16::kWidth;
      float* to = out + row * kGather + first;
      if (transposed.scales) {
        Register<float> scale, before = {};
        std::memcpy(&scale, transposed.scales + group * kGather + first, sizeof scale);
        if (group > 0) std::memcpy(&before, to, sizeof before);
        sum[row][part] = fma(sum[row][part], scale, before);
      }
      std::memcpy(to, &sum[row][part], sizeof sum[row][part]);
    }
  }
}

// Register `part` of `word` of the tokens from `token` on.
TOKRED_INLINE i32x16::N transposed_word(const TransposedCodes& transposed, int64_t token, int part,
                                        int64_t word) {
  constexpr int kWidth = f32x16::kWidth;
  const int64_t first = token + part * kWidth / kLanes * kLanes;
  i32x16::N x;
  std::memcpy(
      &x,
      transposed.words + first * transposed.words_of_token + word * kLanes + part * kWidth % kLanes,
      sizeof x);
  return x;
}

// Rows of f32, times word_factors().
struct FloatQueries {
  template <CodePath>
  static constexpr int kVecsOfStep = 1;
  const float* numbers;  // [row][stride]
  int64_t stride;

  // out[row][token ..] for kRows rows from `first` on and 16 kVecs tokens: the sum over the groups,
  // ascending, of their scale times the sum over their channels, ascending, of x code.
  template <CodePath kCodes, int kRows, int kVecs>
  void dot(int64_t first, const TransposedCodes& transposed, int64_t token, float* out,
           TokenPrefetcher& prefetcher) const {
    constexpr int kBits = bits_of(kCodes), kPlanes = 8 / kBits;
    constexpr int kParts = kVecs * f32x16::kRegisters;
    const float* x = numbers + first * stride;
    int64_t vec = 0;
    for (int64_t group = 0; group < transposed.groups; ++group) {
      Register<float> sum[kRows][kParts] = {};
      for (const int64_t end = vec + transposed.group_vecs; vec < end; ++vec) {
        prefetcher.step();
        const int shift = static_cast<int>(vec % kPlanes) * kBits;
        for (int64_t j = 0; j < 4; ++j) {
          i32x16::N word[kParts];
#pragma GCC unroll 4
          for (int part = 0; part < kParts; ++part) {
            word[part] = transposed_word(transposed, token, part, vec / kPlanes * 4 + j) >> shift;
          }
          const auto add = [&]<int kByte>() {
            Register<float> codes[kParts];
#pragma GCC unroll 4
            for (int part = 0; part < kParts; ++part) {
              codes[part] = codes_of_byte<kCodes, kByte>(word[part]);
            }
#pragma GCC unroll 4
            for (int row = 0; row < kRows; ++row) {
              const float number = x[row * stride + vec * kLanes + 4 * j + kByte];
              const Register<float> q = number - Register<float>{};
#pragma GCC unroll 4
              for (int part = 0; part < kParts; ++part) {
                sum[row][part] = fma(codes[part], q, sum[row][part]);
              }
            }
          };
          add.template operator()<0>();
          add.template operator()<1>();
          add.template operator()<2>();
          add.template operator()<3>();
        }
      }
      add_group(transposed, group, token, sum, out);
    }
  }
};

// Rows in fixed point, as Products places them.
template <class Products>
struct FixedQueries {
  // Two Vecs of a run at once, which no group cuts, share the registers of its words.
  template <CodePath kCodes>
  static constexpr int kVecsOfStep = bits_of(kCodes) < 8 ? 2 : 1;
  const int16_t* numbers;  // [row][stride]
  int64_t stride;
  // [row][kMaxUnits], of a row's groups: the step, what is added to the sum, and first_total().
  const float *steps, *rests;
  const int32_t* first_totals;

  // Like FloatQueries::dot(); sums over a group are exact.
  template <CodePath kCodes, int kRows, int kVecs>
  void dot(int64_t first, const TransposedCodes& transposed, int64_t token, float* out,
           TokenPrefetcher& prefetcher) const {
    constexpr int kBits = bits_of(kCodes), kPlanes = 8 / kBits;
    constexpr int kTogether = kVecsOfStep<kCodes>, kParts = kVecs * f32x16::kRegisters;
    const int16_t* x = numbers + first * stride;
    int64_t vec = 0;
    for (int64_t group = 0; group < transposed.groups; ++group) {
      const int64_t at = first * kMaxUnits + group;
      typename Products::Sum sum[kRows][kParts];
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
          sum[row][part] = Products::start(first_totals[at + row * kMaxUnits]);
        }
      }
      for (const int64_t end = vec + transposed.group_vecs; vec < end; vec += kTogether) {
        prefetcher.step();
        const int shift = kTogether == kPlanes ? 0 : static_cast<int>(vec % kPlanes) * kBits;
        for (int64_t j = 0; j < 4; ++j) {
          i32x16::N words[kParts];
#pragma GCC unroll 4
          for (int part = 0; part < kParts; ++part) {
            words[part] = transposed_word(transposed, token, part, vec / kPlanes * 4 + j) >> shift;
          }
          const int16_t* four = x + vec * kLanes + 4 * j;
          add_words<Products, kBits>(words, 0, four, stride, sum);
          if constexpr (kTogether > 1) {
            add_words<Products, kBits>(words, kBits, four + kLanes, stride, sum);
          }
        }
      }
      Register<float> total[kRows][kParts];
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
        const Register<float> step = steps[at + row * kMaxUnits] - Register<float>{};
        const Register<float> rest = rests[at + row * kMaxUnits] - Register<float>{};
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
          const auto units =
              __builtin_convertvector(Products::total(sum[row][part]), Register<float>);
          total[row][part] = fma(units, step, rest);
        }
      }
      add_group(transposed, group, token, total, out);
    }
  }
};

// out[row][i] = x_row . codes_i for i < whole_lanes(count), over `groups` groups of so many Vecs
// that are scaled by scales[group][kGather], or not where it is null; `tokens` are valid that far.
template <CodePath kCodes, class Rows, class Tokens>
__attribute__((noinline)) static void dot_codes(const Rows& x, int64_t rows, const Tokens& tokens,
                                                int64_t count, const float* scales, int64_t groups,
                                                int64_t group_vecs, float* out,
                                                TokenPrefetcher& prefetcher) {
  alignas(64) int32_t words[kMaxWords * kGather];
  const int64_t bytes = groups * group_vecs * kLanes * bits_of(kCodes) / 8;
  const TransposedCodes transposed{words, scales, bytes / 4, groups, group_vecs};
  for (int64_t token = 0; token < count; token += kLanes) {
    transpose_words(tokens, token, bytes, words + token * transposed.words_of_token);
  }
  for (int64_t row = 0; row < rows; row += kFewRows<float>) {
    visit_rows<kFewRows<float>>(rows - row, [&]<int kRows>() {
      // The words need registers of their own.
      constexpr int kVecs = kBeside < float, kRows == 1 ? 2 : kPowerOfTwo < kRows >> ;
      prefetcher.spread(divide_up(count, kVecs * kLanes) * groups * group_vecs /
                        Rows::template kVecsOfStep<kCodes>);
      int64_t token = 0;
      const auto tiles = [&]<int kCount>() {
        for (; token + (kCount - 1) * kLanes < count; token += kCount * kLanes) {
          x.template dot<kCodes, kRows, kCount>(row, transposed, token, out + row * kGather,
                                                prefetcher);
        }
      };
      tiles.template operator()<kVecs>();
      if constexpr (kVecs > 1) tiles.template operator()<1>();
    });
  }
}

}  // namespace tokred::TOKRED_ISA
