// packed_attention in fixed point: weighted sums of rows of codes. Lanes are channels: rows are
// interleaved in words of two bytes of one token and the same two of the next, and a mask leaves
// two codes of a channel, to be multiplied by a pair of weights.
#pragma once

#include "packed_attn/cpu/codes.h"
#include "packed_attn/cpu/fixed.h"

namespace tokred::TOKRED_ISA {

inline constexpr int64_t kRunWords = 8;  // of two tokens, from a run of sixteen bytes of each
inline constexpr int64_t kMaxRuns = kMaxHeadDim / 16;
inline constexpr int64_t kMaxPairs = kGather / 2;

// words[run][kMaxPairs][kRunWords] for an even number of pairs.
TOKRED_INLINE void interleave_runs(const TokenAddress* tokens, int64_t pairs, int64_t runs,
                                   int32_t* words) {
  typedef uint16_t Run __attribute__((vector_size(16)));
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const uint8_t *first = tokens[2 * pair].row, *second = tokens[2 * pair + 1].row;
    for (int64_t run = 0; run < runs; ++run) {
      Run a, b;
      std::memcpy(&a, first + run * 16, sizeof a);
      std::memcpy(&b, second + run * 16, sizeof b);
      const Run low = __builtin_shuffle(a, b, Run{0, 8, 1, 9, 2, 10, 3, 11});
      const Run high = __builtin_shuffle(a, b, Run{4, 12, 5, 13, 6, 14, 7, 15});
      int32_t* to = words + (run * kMaxPairs + pair) * kRunWords;
      std::memcpy(to, &low, sizeof low);
      std::memcpy(to + 4, &high, sizeof high);
    }
  }
}

// A block's codes, interleaved, and the weights of its tokens for a few rows in sixteen bits, by
// group of channels.
struct Int16Weights {
  alignas(64) int32_t words[kMaxRuns * kMaxPairs * kRunWords];
  alignas(64) int16_t units[kFewRows<float>][kMaxUnits][kGather];  // zeros behind the last token
  float steps[kFewRows<float>][kMaxUnits];
  int64_t count, pairs;

  void interleave(const TokenAddress* tokens, int64_t token_count, int64_t dim, int64_t bits) {
    count = token_count;
    pairs = round_up(count, 4) / 2;
    interleave_runs(tokens, pairs, code_bytes(dim, bits) / 16, words);
  }
  // weights[row][group][kGather]; a row's are `stride` apart from the next one's.
  void weigh(const float* weights, int64_t stride, int64_t rows, int64_t groups) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t g = 0; g < groups; ++g) {
        const float* from = weights + row * stride + g * kGather;
        const FixedStep step = fixed_step(from, count);
        steps[row][g] = step.step;
        for (int64_t i = 0; i < count; i += kLanes) {
          store_units(units[row][g] + i, load_row(from + i, count - i) * splat(step.inverse));
        }
      }
    }
  }
};

// The pairs of weights that meet a register of words.
TOKRED_INLINE Register<int32_t> load_pairs(const int16_t* weights) {
#ifdef __AVX512F__
  return (Register<int32_t>)_mm512_inserti64x4(
      (__m512i)load_pair(weights), _mm512_castsi512_si256((__m512i)load_pair(weights + 2)), 1);
#else
  return load_pair(weights);
#endif
}

// out_row += the weighted sums of kVecs Vecs of a run, whose codes begin at bit `shift` of their
// bytes; each Vec's even channels come before its odd ones.
template <CodePath kCodes, int kRows, int kVecs, bool kVnni>
TOKRED_INLINE void add_pair_tile(const Int16Weights& block, int64_t group, int64_t run, int shift,
                                 float* out, int64_t out_stride) {
  constexpr int kBits = bits_of(kCodes), kWidth = i32x16::kWidth;
  constexpr int32_t kMask = ((1 << kBits) - 1) * 0x10001;
  constexpr int kAtOnce = kWidth > kRunWords ? kWidth / kRunWords : 1;  // pairs of a register
  constexpr int kParts = kWidth < kRunWords ? kRunWords / kWidth : 1;   // registers of a pair
  const int32_t* words = block.words + run * kMaxPairs * kRunWords;
  alignas(64) int32_t total[kRows][2 * kVecs][kRunWords];
#pragma GCC unroll 2
  for (int part = 0; part < kParts; ++part) {
    Register<int32_t> sum[kRows][2 * kVecs] = {};
    for (int64_t pair = 0; pair < block.pairs; pair += kAtOnce) {
      i32x16::N word, codes[2 * kVecs];
      std::memcpy(&word, words + pair * kRunWords + part * kWidth, sizeof word);
#pragma GCC unroll 4
      for (int i = 0; i < 2 * kVecs; ++i) {
        codes[i] = word >> (shift + i / 2 * kBits + i % 2 * 8) & kMask;
      }
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
        const Register<int32_t> weight = load_pairs(block.units[row][group] + 2 * pair);
#pragma GCC unroll 4
        for (int i = 0; i < 2 * kVecs; ++i) {
          sum[row][i] = add_products<kVnni>(codes[i], weight, sum[row][i]);
        }
      }
    }
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int i = 0; i < 2 * kVecs; ++i) {
        int32_t lane[kWidth];
        std::memcpy(lane, &sum[row][i], sizeof lane);
        for (int j = 0; j < kWidth / kAtOnce; ++j) {
          total[row][i][part * kWidth + j] =
              kAtOnce == 1 ? lane[j] : lane[j] + lane[j + kWidth / 2];
        }
      }
    }
  }
  for (int row = 0; row < kRows; ++row) {
    const f32x16 step = splat(block.steps[row][group]);
    for (int vec = 0; vec < kVecs; ++vec) {
      float* to = out + row * out_stride + vec * kLanes;
      store(to, fma(to_f32(load(total[row][2 * vec])), step, load(to)));
    }
  }
}

// out_row += the weighted sums of `dim` channels, in groups of group_vecs Vecs, in the order of
// add_pair_tile().
template <CodePath kCodes, bool kVnni>
__attribute__((noinline)) static void add_pairs(const Int16Weights& block, int64_t rows,
                                                int64_t group_vecs, int64_t dim, float* out,
                                                int64_t out_stride, TokenPrefetcher& prefetcher) {
  constexpr int kBits = bits_of(kCodes), kPlanes = 8 / kBits;
  // Where registers allow it, two Vecs share those of the words and weights.
  constexpr int kVecs = kRegisterBytes == 64 && kPlanes > 1 ? 2 : 1;
  visit_rows<kFewRows<float>>(rows, [&]<int kRows>() {
    for (int64_t vec = 0; vec < dim / kLanes; vec += kVecs) {
      prefetcher.prefetch(kVecs * kLanes / 2);
      add_pair_tile<kCodes, kRows, kVecs, kVnni>(block, vec / group_vecs, vec / kPlanes,
                                                 static_cast<int>(vec % kPlanes) * kBits,
                                                 out + vec * kLanes, out_stride);
    }
  });
}

}  // namespace tokred::TOKRED_ISA
