// Numbers to codes and back, for every scheme of kv_pack/layout.h, sixteen at a time.
#pragma once

#include "common/cpu/row.h"
#include "kv_pack/cpu/codes.h"
#include "kv_pack/params.h"

namespace tokred::TOKRED_ISA {

inline constexpr int64_t kMaxGroups = kMaxWideDim;  // that are coded together

// Groups side by side: first the range of their numbers, then their scales and offsets.
struct GroupTable {
  alignas(64) float low[kMaxGroups], high[kMaxGroups];
  alignas(64) float divisor[kMaxGroups];  // the scale; NaN where it is 0, so that every code is
  alignas(64) float offset[kMaxGroups];  // that of 0. The minimum, or the code of 0
  alignas(64) f16 stored_scale[kMaxGroups], stored_offset[kMaxGroups];
};

// Calls f.template operator()<scheme>().
template <class F>
TOKRED_INLINE void visit_scheme(PackScheme scheme, F f) {
  switch (scheme) {
    case PackScheme::asymmetric: f.template operator()<PackScheme::asymmetric>(); break;
    case PackScheme::zero_point: f.template operator()<PackScheme::zero_point>(); break;
    case PackScheme::symmetric: f.template operator()<PackScheme::symmetric>(); break;
    case PackScheme::fp8: f.template operator()<PackScheme::fp8>(); break;
    case PackScheme::codebook: f.template operator()<PackScheme::codebook>(); break;
  }
}

// The code of 0 where all groups share it.
TOKRED_INLINE float middle_code(int32_t bits) { return static_cast<float>(1 << (bits - 1)); }

TOKRED_INLINE f32x16 magnitude(f32x16 x) {
  return map<f32x16>([&](int i) {
    return (f32x16::N)((Native<float>::bits)x.r[i] & (Native<float>::bits{} + INT32_MAX));
  });
}

// NaN in place of numbers that are not finite: min and max pass over it.
TOKRED_INLINE f32x16 only_finite(f32x16 x) {
  return select_greater(splat(INFINITY), magnitude(x), x, splat(NAN));
}

// The sum of the squares of `count` numbers; see PackScheme.
template <class T>
TOKRED_INLINE float sum_squares(const T* x, int64_t count) {
  const f32x16 zero = splat(0.0f), most = splat(kMaxInMean);
  f32x16 total = zero;
  for (int64_t i = 0; i < count; i += kLanes) {
    const f32x16 size = magnitude(load_as(x + i));
    const f32x16 number = select_greater(splat(INFINITY), size, min(size, most), zero);
    total = total + number * number;
  }
  return sum(total);
}

// Fills the table up to whole vectors; false where a range is not finite: some number is not.
inline bool ranges_are_finite(GroupTable& table, int64_t groups) {
  f32x16 bound = splat(0.0f);
  for (int64_t g = groups; g % kLanes; ++g) table.low[g] = table.high[g] = 0.0f;
  for (int64_t g = 0; g < groups; g += kLanes) {
    bound = max(max(load(table.high + g), splat(0.0f) - load(table.low + g)), bound);
  }
  return max_lane(bound) < INFINITY;
}

TOKRED_INLINE f32x16 storable(f32x16 param) {
  return min(max(param, splat(-kMaxParam)), splat(kMaxParam));
}

// Scales and offsets of the ranges. The sum with 0 turns -0 into 0, for min and max do not tell
// them apart.
template <PackScheme kScheme>
void make_scales(GroupTable& table, int64_t groups, int32_t bits) {
  const f32x16 zero = splat(0.0f), top = splat(static_cast<float>((1 << bits) - 1));
  for (int64_t g = 0; g < groups; g += kLanes) {
    f32x16 low = load(table.low + g), high = load(table.high + g), scale, offset = zero;
    const f32x16 empty_low = low;  // low > high: there was no number
    low = select_greater(low, high, zero, low) + zero;
    high = select_greater(empty_low, high, zero, high) + zero;
    if constexpr (kScheme == PackScheme::zero_point) {
      low = min(low, zero);
      high = max(high, zero);
    }
    if constexpr (has_offset(kScheme)) {
      scale = (high - low) / top;
    } else if constexpr (kScheme == PackScheme::symmetric) {
      scale = max(high, zero - low) / splat(middle_code(bits) - 1);
    } else if constexpr (kScheme == PackScheme::codebook) {
      scale = sqrt(high) * splat(kLevelStep);  // of the mean square
    } else {
      scale = max(high, zero - low) / splat(kFp8Max);
    }
    const f32x16 divisor = select_greater(scale, zero, scale, splat(NAN));
    if constexpr (kScheme == PackScheme::asymmetric) offset = low;
    if constexpr (kScheme == PackScheme::zero_point) {
      offset = to_f32(round_even(max((zero - low) / divisor, zero)));
    }
    if constexpr (kScheme == PackScheme::symmetric) offset = splat(middle_code(bits));
    store(table.divisor + g, divisor);
    store(table.offset + g, offset);
    store_as(table.stored_scale + g, storable(scale));
    store_as(table.stored_offset + g, storable(offset));
  }
}

// To e4m3fn, halves to even; |x| <= 448 or NaN, which becomes 0.
TOKRED_INLINE i32x16 to_e4m3(f32x16 x) {
  constexpr int32_t kMinNormal = 0x3c800000;  // 2^-6 in f32
  using Bits = i32x16::N;
  return map<i32x16>([&](int i) {
    const Bits bits = (Bits)x.r[i], sign = (bits >> 24) & 0x80, size = bits & INT32_MAX;
    const Bits normal = (size + 0x7ffff + ((size >> 20) & 1) - (120 << 23)) >> 20;
    // An ulp of 2^14 is 2^-9, the step of the numbers below 2^-6.
    const f32x16::N shift = 0x1p14f - f32x16::N{};
    const Bits small = (Bits)((f32x16::N)size + shift) - (Bits)shift;
    return x.r[i] == x.r[i] ? sign | (size < kMinNormal ? small : normal) : Bits{};
  });
}
TOKRED_INLINE f32x16 from_e4m3(i32x16 code) {
  using Bits = i32x16::N;
  return map<f32x16>([&](int i) {
    const Bits size = code.r[i] & 0x7f, sign = (code.r[i] & 0x80) << 24;
    const f32x16::N normal = (f32x16::N)((size << 20) + (120 << 23));
    const f32x16::N small = __builtin_convertvector(size, f32x16::N) * 0x1p-9f;
    Bits bits = size < 8 ? (Bits)small : (Bits)normal;
    bits = size == 0x7f ? Bits{} + 0x7fc00000 : bits;
    return (f32x16::N)(bits | sign);
  });
}

// The levels of a head's codebook.
class Levels {
 public:
  Levels(const PackedRows& p, int64_t head) : codes_(1 << p.format.bits) {
    if (p.format.scheme != PackScheme::codebook) return;
    LevelBytes bytes = gaussian_levels(p.format.bits);
    if (p.levels) {
      bytes = {};
      for (int c = 0; c < codes_; ++c) {
        bytes = with_level(bytes, c, p.levels[head * p.levels_stride_head + c]);
      }
    }
    std::memcpy(byte_, &bytes, sizeof bytes);
  }

  // Codes, a byte each, to the bytes level + 128, in place.
  void look_up(uint8_t* code, int64_t head_dim) const {
    typedef uint8_t Bytes __attribute__((vector_size(16)));
    Bytes table, codes;
    std::memcpy(&table, byte_, sizeof table);
    for (int64_t d = 0; d < head_dim; d += 16) {
      std::memcpy(&codes, code + d, sizeof codes);
      codes = __builtin_shuffle(table, codes);
      std::memcpy(code + d, &codes, sizeof codes);
    }
  }
  // The codes of numbers in units of the scale.
  i32x16 nearest(f32x16 ratio) const {
    f32x16 count = splat(0.0f);
    for (int c = 1; c < codes_; ++c) {
      const int twice = byte_[c - 1] + byte_[c] - 256;
      const f32x16 midpoint = splat(0.5f * static_cast<float>(twice));
      count = count + select_greater(ratio, midpoint, splat(1.0f), splat(0.0f));
    }
    return round_even(count);
  }

 private:
  int codes_;
  alignas(16) uint8_t byte_[16];
};
static_assert(sizeof(LevelBytes) == 16);

// Scale and offset of sixteen numbers: of one group, or of sixteen side by side.
struct Scales {
  f32x16 scale, offset;
};
template <PackScheme kScheme>
TOKRED_INLINE i32x16 encode(const Scales& s, f32x16 x, f32x16 top, const Levels& levels) {
  const f32x16 zero = splat(0.0f);
  if constexpr (kScheme == PackScheme::asymmetric) {
    return round_even(min(max((x - s.offset) / s.scale, zero), top));  // NaN becomes 0
  } else if constexpr (kScheme == PackScheme::fp8) {
    const f32x16 ratio = x / s.scale;
    const f32x16 clamped = min(max(ratio, splat(-kFp8Max)), splat(kFp8Max));
    return to_e4m3(select_number(ratio, clamped, splat(NAN)));
  } else if constexpr (kScheme == PackScheme::codebook) {
    const f32x16 ratio = x / s.scale;
    return levels.nearest(select_number(ratio, ratio, zero));
  } else {
    // Bounds that are integers may come before the rounding.
    const f32x16 ratio = x / s.scale, number = select_number(ratio, ratio, zero);
    const f32x16 clamped = min(max(number, zero - s.offset), top - s.offset);
    return round_even(clamped) + round_even(s.offset);
  }
}

// With the scale as it is stored. The product is exact: 11 bits by 8. Symmetric codes have the
// offset middle_code(), as have those of a codebook, of eight bits, after look_up().
template <PackScheme kScheme>
TOKRED_INLINE f32x16 decode(i32x16 code, const Scales& s) {
  if constexpr (kScheme == PackScheme::asymmetric) return s.scale * to_f32(code) + s.offset;
  if constexpr (kScheme == PackScheme::fp8) return s.scale * from_e4m3(code);
  return s.scale * (to_f32(code) - s.offset);
}

}  // namespace tokred::TOKRED_ISA
