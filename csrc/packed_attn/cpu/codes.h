// packed_attention in f32: weighted sums of rows of codes. Codes are not shifted: a byte is widened
// once, and the bits of a channel are masked in place, which gives the code times a power of two;
// the sums are divided by it at the end, see in_place_factors().
#pragma once

#include "attention/cpu/rows.h"
#include "kv_pack/cpu/codes.h"
#include "packed_attn/cpu/tokens.h"

namespace tokred::TOKRED_ISA {

// Formats whose codes are multiplied as they are. Unpacked first are rows
//   of 3 bits, whose codes cross bytes,
//   of a head_dim that is not whole units, or whose codes are not whole runs of sixteen bytes,
//   of groups along channels that are not whole units, or along tokens fewer than a register holds,
//   of groups along tokens that are not read in order.
enum class CodePath { unpacked, bits1, bits2, bits4, bits8, fp8 };

inline constexpr int64_t kUnit = 32;  // channels that are unpacked together: two Vecs
inline constexpr int64_t kMaxUnits = kMaxWideDim / kUnit;

#ifdef __AVX512F__
// Sixteen bytes each of four rows. Masked broadcasts need no shuffle, of which most processors
// execute one a cycle; insertions do.
TOKRED_INLINE __m512i load_quarters(const uint8_t* a, const uint8_t* b, const uint8_t* c,
                                    const uint8_t* d) {
  const auto sixteen = [](const uint8_t* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  };
  __m512i x = _mm512_zextsi128_si512(sixteen(a));
  x = _mm512_mask_broadcast_i32x4(x, 0x00f0, sixteen(b));
  x = _mm512_mask_broadcast_i32x4(x, 0x0f00, sixteen(c));
  return _mm512_mask_broadcast_i32x4(x, 0xf000, sixteen(d));
}
#endif

constexpr int bits_of(CodePath path) {
  return path == CodePath::bits1   ? 1
         : path == CodePath::bits2 ? 2
         : path == CodePath::bits4 ? 4
                                   : 8;
}

constexpr CodePath code_path(const PackFormat& f) {
  const bool whole = f.bits != 3 && f.head_dim % kUnit == 0 && f.head_dim * f.bits % 128 == 0;
  const bool groups =
      f.axis == GroupAxis::token ? f.group_size >= kLanes : f.group_size % kUnit == 0;
  if (!whole || !groups) return CodePath::unpacked;
  if (f.scheme == PackScheme::fp8) return CodePath::fp8;
  return f.bits == 1   ? CodePath::bits1
         : f.bits == 2 ? CodePath::bits2
         : f.bits == 4 ? CodePath::bits4
                       : CodePath::bits8;
}

// f.template operator()<path>() for all but unpacked.
template <class F>
TOKRED_INLINE void visit_code_path(CodePath path, const F& f) {
  switch (path) {
    case CodePath::bits1: return f.template operator()<CodePath::bits1>();
    case CodePath::bits2: return f.template operator()<CodePath::bits2>();
    case CodePath::bits4: return f.template operator()<CodePath::bits4>();
    case CodePath::bits8: return f.template operator()<CodePath::bits8>();
    case CodePath::fp8: return f.template operator()<CodePath::fp8>();
    case CodePath::unpacked: return;
  }
}

// The same for paths in fixed point, which fp8 is not.
template <class F>
TOKRED_INLINE void visit_fixed_path(CodePath path, const F& f) {
  visit_code_path(path, [&]<CodePath kCodes>() {
    if constexpr (kCodes != CodePath::fp8) f.template operator()<kCodes>();
  });
}

// The factor by which codes in place of a channel are to be multiplied, for all channels.
inline void in_place_factors(CodePath path, const PackFormat& f, float* factor) {
  const int32_t planes = 8 / f.bits;
  for (int64_t d = 0; d < f.head_dim; d += kLanes) {
    const int32_t shift = static_cast<int32_t>(d / kLanes) % planes * f.bits;
    store(factor + d,
          splat(path == CodePath::fp8 ? 256.0f : 1.0f / static_cast<float>(1 << shift)));
  }
}

// ---- Units --------------------------------------------------------------------------------------

// Register `part` of both Vecs of a unit.
template <CodePath kCodes>
struct UnitCodes {
  static constexpr int kBits = bits_of(kCodes);
  static constexpr int64_t kUnitsOfRun = kBits < 8 ? 4 / kBits : 1;
  const uint8_t* first;
  i32x16::N bytes;
  int32_t mask;

  UnitCodes(const uint8_t* row, int64_t unit, int part) {
    first = row + (kBits == 8 ? unit * kUnit : unit / kUnitsOfRun * 16) + part * f32x16::kWidth;
    if constexpr (kBits == 8) return;
    bytes = widen(first);
    mask = ((1 << kBits) - 1) << unit % kUnitsOfRun * (2 * kBits);
  }
  // Of Vec i, in place.
  Register<float> operator[](int i) const {
    if constexpr (kCodes == CodePath::fp8) {
      return widen_fp8(first + i * kLanes);
    } else if constexpr (kBits == 8) {
      return __builtin_convertvector(widen(first + i * kLanes), Register<float>);
    } else {
      return __builtin_convertvector(bytes & mask << i * kBits, Register<float>);
    }
  }
};

// ---- Weighted sums ------------------------------------------------------------------------------

// out_row += weights[row][unit's group][i] codes_i, for kUnits units and kParts registers of each.
template <CodePath kCodes, int kRows, int kUnits, int kParts>
TOKRED_INLINE void add_code_tile(const float* weights, int64_t row_weights, int64_t group_units,
                                 const TokenAddress* values, int64_t count, int64_t unit, int part,
                                 float* out, int64_t out_stride) {
  const auto at = [&](int row, int u, int p, int i) {
    return out + row * out_stride + (unit + u) * kUnit + i * kLanes + (part + p) * f32x16::kWidth;
  };
  const auto each_sum = [](auto visit) {
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int u = 0; u < kUnits; ++u) {
#pragma GCC unroll 2
        for (int p = 0; p < kParts; ++p) {
          visit(row, u, p, 0);
          visit(row, u, p, 1);
        }
      }
    }
  };
  Register<float> sum[kRows][kUnits][kParts][2];
  each_sum([&](int row, int u, int p, int i) {
    std::memcpy(&sum[row][u][p][i], at(row, u, p, i), sizeof(Register<float>));
  });
  const float* weight[kUnits];
  for (int u = 0; u < kUnits; ++u) weight[u] = weights + (unit + u) / group_units * kGather;
  for (int64_t token = 0; token < count; ++token) {
    const uint8_t* codes = values[token].row;
#pragma GCC unroll 4
    for (int u = 0; u < kUnits; ++u) {
      Register<float> x[kParts][2];
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) {
        const UnitCodes<kCodes> unit_codes(codes, unit + u, part + p);
        x[p][0] = unit_codes[0];
        x[p][1] = unit_codes[1];
      }
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
        const Register<float> w = weight[u][row * row_weights + token] - Register<float>{};
#pragma GCC unroll 2
        for (int p = 0; p < kParts; ++p) {
          sum[row][u][p][0] = fma(w, x[p][0], sum[row][u][p][0]);
          sum[row][u][p][1] = fma(w, x[p][1], sum[row][u][p][1]);
        }
      }
    }
  }
  each_sum([&](int row, int u, int p, int i) {
    std::memcpy(at(row, u, p, i), &sum[row][u][p][i], sizeof(Register<float>));
  });
}

// The same for rows <= kFewRows and all units.
template <CodePath kCodes>
__attribute__((noinline)) static void add_codes(const float* weights, int64_t row_weights,
                                                int64_t rows, int64_t group_units,
                                                const TokenAddress* values, int64_t count,
                                                int64_t units, float* out, int64_t out_stride,
                                                TokenPrefetcher& prefetcher) {
  constexpr int kRegisters = f32x16::kRegisters;
  visit_rows<kFewRows<float>>(rows, [&]<int kRows>() {
    constexpr int kTogether = kPowerOfTwo<kRows> < 4 ? 4 / kPowerOfTwo<kRows> : 1;
    constexpr int kParts = kTogether < kRegisters ? kTogether : kRegisters;
    constexpr int kUnits = kTogether / kParts;
    prefetcher.spread(units / (kUnits * kParts) * kRegisters);
    int64_t unit = 0;
    const auto tiles = [&]<int kCount>() {
      for (; unit + kCount <= units; unit += kCount) {
        for (int part = 0; part < kRegisters; part += kParts) {
          prefetcher.step();
          add_code_tile<kCodes, kRows, kCount, kParts>(weights, row_weights, group_units, values,
                                                       count, unit, part, out, out_stride);
        }
      }
    };
    tiles.template operator()<kUnits>();
    if constexpr (kUnits > 1) tiles.template operator()<1>();
  });
}

}  // namespace tokred::TOKRED_ISA
