// packed_attention in fixed point: weighted sums of rows of codes. Lanes are channels: the same
// byte of four tokens makes a word, the bits of a channel in each byte, to be multiplied by the
// weights of these tokens.
#pragma once

#include "packed_attn/cpu/codes.h"
#include "packed_attn/cpu/fixed.h"

namespace tokred::TOKRED_ISA {

inline constexpr int64_t kMaxRuns = kMaxWideDim / 16;  // of sixteen bytes of a row
inline constexpr int64_t kMaxQuads = kGather / 4;

struct OneRun {
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  typedef uint16_t Pairs __attribute__((vector_size(16)));
};
struct TwoRuns {
  typedef uint8_t Bytes __attribute__((vector_size(32)));
  typedef uint16_t Pairs __attribute__((vector_size(32)));
};

// to[run][sixteen bytes][four rows], of Runs that are `stride` words apart.
template <class Runs>
TOKRED_INLINE void interleave_runs(const uint8_t* const (&rows)[4], int32_t* to, int64_t stride) {
  using Bytes = typename Runs::Bytes;
  using Pairs = typename Runs::Pairs;
  constexpr int kBytes = sizeof(Bytes);
  Bytes x[4], low{}, high{};
  Pairs low_pairs{}, high_pairs{};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) std::memcpy(&x[i], rows[i], sizeof x[i]);
#pragma GCC unroll 32
  for (int i = 0; i < kBytes; ++i) {
    low[i] = static_cast<uint8_t>(i / 16 * 16 + i % 16 / 2 + i % 2 * kBytes);
    high[i] = static_cast<uint8_t>(low[i] + 8);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kBytes / 2; ++i) {
    low_pairs[i] = static_cast<uint16_t>(i / 8 * 8 + i % 8 / 2 + i % 2 * kBytes / 2);
    high_pairs[i] = static_cast<uint16_t>(low_pairs[i] + 4);
  }
  const Pairs a_low = (Pairs)__builtin_shuffle(x[0], x[1], low);
  const Pairs a_high = (Pairs)__builtin_shuffle(x[0], x[1], high);
  const Pairs b_low = (Pairs)__builtin_shuffle(x[2], x[3], low);
  const Pairs b_high = (Pairs)__builtin_shuffle(x[2], x[3], high);
  const Pairs words[4] = {
      __builtin_shuffle(a_low, b_low, low_pairs), __builtin_shuffle(a_low, b_low, high_pairs),
      __builtin_shuffle(a_high, b_high, low_pairs), __builtin_shuffle(a_high, b_high, high_pairs)};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
    for (int run = 0; run < kBytes / 16; ++run) {
      std::memcpy(to + run * stride + 4 * i, reinterpret_cast<const char*>(&words[i]) + 16 * run,
                  16);
    }
  }
}

// words[run][kMaxQuads][sixteen bytes of four tokens].
template <class Tokens>
TOKRED_INLINE void interleave_quads(const Tokens& tokens, int64_t quads, int64_t runs,
                                    int32_t* words) {
  constexpr int64_t kStride = kMaxQuads * kLanes;  // words of a run
  for (int64_t quad = 0; quad < quads; ++quad) {
    int32_t* to = words + quad * kLanes;
    int64_t run = 0;
#ifdef __AVX512F__
    // One run of the four tokens at once: a transpose of 32-bit quarters, then one of bytes.
    const __m512i quarters =
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i bytes =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    for (; run < runs; ++run) {
      const auto row = [&](int i) { return tokens.row(4 * quad + i) + 16 * run; };
      __m512i x = load_quarters(row(0), row(1), row(2), row(3));
      x = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(quarters, x), bytes);
      std::memcpy(to + run * kStride, &x, sizeof x);
    }
#else
    const auto row = [&](int i) { return tokens.row(4 * quad + i) + 16 * run; };
#ifdef __AVX2__
    for (; run + 2 <= runs; run += 2) {
      interleave_runs<TwoRuns>({row(0), row(1), row(2), row(3)}, to + run * kStride, kStride);
    }
#endif
    for (; run < runs; ++run) {
      interleave_runs<OneRun>({row(0), row(1), row(2), row(3)}, to + run * kStride, kStride);
    }
#endif
  }
}

// The weights of a block's tokens, zero behind the last one.
struct BlockWeights {
  f32x16 vec[kGather / kLanes];
};

// A block's codes, interleaved, and the weights of its tokens for a few rows, by group of channels.
struct FixedWeights {
  alignas(64) int32_t words[kMaxRuns * kMaxQuads * kLanes];
  alignas(64) int16_t units[kFewRows<float>][kMaxUnits][kGather];
  float steps[kFewRows<float>][kMaxUnits];
  int32_t first_totals[kFewRows<float>][kMaxUnits];
  int64_t count, quads;

  template <class Tokens>
  void interleave(const Tokens& tokens, int64_t token_count, const PackFormat& f) {
    count = token_count;
    quads = divide_up(count, 4);
    interleave_quads(tokens, quads, code_bytes(f.head_dim, f.bits) / 16, words);
  }
  // The weights of a row and a group: zero behind the last token.
  template <class Products>
  __attribute__((always_inline)) void weigh(int64_t row, int64_t group, const BlockWeights& weights,
                                            int32_t bits) {
    const int64_t whole = round_up(count, 2 * kLanes);  // as first_total() wants it
    i32x16 most = splat(0);
    int16_t* to = units[row][group];
#pragma GCC unroll 4
    for (int i = 0; i < kGather / kLanes; ++i) {
      if (i * kLanes < whole) most = larger_magnitude(weights.vec[i], most);
    }
    const FixedStep step = fixed_step(most);
#pragma GCC unroll 4
    for (int i = 0; i < kGather / kLanes; ++i) {
      if (i * kLanes < whole) {
        store_units<Products>(to + i * kLanes, weights.vec[i] * splat(step.inverse));
      }
    }
    steps[row][group] = step.step;
    first_totals[row][group] = Products::first_total(to, whole, bits);
  }
};

// out_row += the weighted sums of kVecs Vecs of a group.
template <class Products, CodePath kCodes, int kRows, int kVecs>
TOKRED_INLINE void add_quad_tile(const FixedWeights& block, int64_t group, int64_t vec, float* out,
                                 int64_t out_stride, TokenPrefetcher& prefetcher) {
  constexpr int kBits = bits_of(kCodes), kPlanes = 8 / kBits, kRegisters = i32x16::kRegisters;
  constexpr int kParts = kVecs * kRegisters;
  typename Products::Sum sum[kRows][kParts];
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      sum[row][part] = Products::start(block.first_totals[row][group]);
    }
  }
  const int32_t* words = block.words + vec / kPlanes * kMaxQuads * kLanes;
  const int shift = static_cast<int>(vec % kPlanes) * kBits;
  for (int64_t quad = 0; quad < block.quads; ++quad) {
    if (quad % 4 == 0) prefetcher.step();
    i32x16::N word[kParts];
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      // The Vecs lie side by side in a run, or in runs side by side.
      const int64_t run = kPlanes > 1 ? 0 : part / kRegisters;
      const int plane = kPlanes > 1 ? part / kRegisters * kBits : 0;
      std::memcpy(&word[part],
                  words + (run * kMaxQuads + quad) * kLanes + part % kRegisters * i32x16::kWidth,
                  sizeof word[part]);
      word[part] = word[part] >> (shift + plane);
    }
    add_words<Products, kBits>(word, 0, block.units[0][group] + 4 * quad, kMaxUnits * kGather, sum);
  }
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
    const Register<float> step = block.steps[row][group] - Register<float>{};
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      const auto units = __builtin_convertvector(Products::total(sum[row][part]), Register<float>);
      float* to = out + row * out_stride + vec * kLanes + part * f32x16::kWidth;
      Register<float> before;
      std::memcpy(&before, to, sizeof before);
      before = fma(units, step, before);
      std::memcpy(to, &before, sizeof before);
    }
  }
}

// out_row += the weighted sums of `dim` channels, in groups of group_vecs Vecs.
template <class Products, CodePath kCodes>
__attribute__((noinline)) static void add_quads(const FixedWeights& block, int64_t rows,
                                                int64_t group_vecs, int64_t dim, float* out,
                                                TokenPrefetcher& prefetcher) {
  // Where registers allow it, two Vecs, which no group cuts, share those of weights and words.
  constexpr int kVecs = kRegisterBytes == 64 ? 2 : 1;
  prefetcher.spread(dim / kLanes / kVecs * divide_up(block.quads, 4));
  visit_rows<kFewRows<float>>(rows, [&]<int kRows>() {
    int64_t vec = 0;
    for (int64_t group = 0; vec < dim / kLanes; ++group) {
      for (const int64_t end = vec + group_vecs; vec < end; vec += kVecs) {
        add_quad_tile<Products, kCodes, kRows, kVecs>(block, group, vec, out, dim, prefetcher);
      }
    }
  });
}

}  // namespace tokred::TOKRED_ISA
