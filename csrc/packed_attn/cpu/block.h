// The scales and offsets of a block of tokens, and tokens as rows of f32.
#pragma once

#include "packed_attn/cpu/codes.h"

namespace tokred::TOKRED_ISA {

// The offset that is added to scale c for the codes c of a group; see PackScheme.
TOKRED_INLINE f32x16 whole_offset(const PackFormat& f, f32x16 scale, f32x16 offset) {
  if (f.scheme == PackScheme::asymmetric) return offset;
  if (f.scheme == PackScheme::zero_point) return splat(0.0f) - scale * offset;
  return scale * splat(-static_cast<float>(1 << (f.bits - 1)));
}

// Sixteen tokens' numbers [token][x], sixteen a Vec, to [x][token], where there are 2^n of them: n
// times the even ones of all come before the odd ones.
template <int kNumbers>
TOKRED_INLINE void transpose_numbers(f32x16 (&x)[kNumbers]) {
  constexpr int kWidth = f32x16::kWidth, kRegisters = f32x16::kRegisters;
  Native<float>::bits even{};
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) even[i] = 2 * i;
  for (int n = 1; n < kNumbers; n *= 2) {
    f32x16 from[kNumbers];
#pragma GCC unroll 16
    for (int i = 0; i < kNumbers; ++i) from[i] = x[i];
#pragma GCC unroll 16
    for (int i = 0; i < kNumbers / 2; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < kRegisters; ++r) {
        const auto at = [&](int j) { return from[2 * i + j / kRegisters].r[j % kRegisters]; };
        x[i].r[r] = __builtin_shuffle(at(2 * r), at(2 * r + 1), even);
        x[kNumbers / 2 + i].r[r] = __builtin_shuffle(at(2 * r), at(2 * r + 1), even + 1);
      }
    }
  }
}

// The scales and offsets of a block's tokens, along channels.
struct BlockParams {
  alignas(64) float scale[kMaxUnits][kGather], offset[kMaxUnits][kGather];

  void read(const PackFormat& f, const BlockAddresses& block) {
    switch (params_per_row(f)) {
      case 1: return read<1>(f, block);
      case 2: return read<2>(f, block);
      case 4: return read<4>(f, block);
      case 8: return read<8>(f, block);
      case 16: return read<16>(f, block);
      default: return read<0>(f, block);
    }
  }

 private:
  // kNumbers a token, or any number of them where it is 0.
  template <int kNumbers>
  void read(const PackFormat& f, const BlockAddresses& block) {
    const int64_t groups = groups_per_row(f), numbers = params_per_row(f);
    alignas(64) uint16_t copied[2 * kMaxUnits * kLanes];
    alignas(64) float number[2 * kMaxUnits][kLanes];
    for (int64_t i = 0; i < block.count; i += kLanes) {
      const uint16_t* from = block.tight ? block[i].params : copied;
      for (int64_t j = 0; j < kLanes && !block.tight; ++j) {
        // GCC copies without a call where it knows the size.
        const auto bytes = static_cast<size_t>(2 * (kNumbers > 0 ? kNumbers : numbers));
        std::memcpy(copied + j * numbers, block.at[i + j].params, bytes);
      }
      if constexpr (kNumbers > 0) {
        f32x16 x[kNumbers];
        for (int j = 0; j < kNumbers; ++j) x[j] = load_params(from + j * kLanes);
        transpose_numbers(x);
        for (int j = 0; j < kNumbers; ++j) store(number[j], x[j]);
      } else {
        alignas(64) float converted[2 * kMaxUnits * kLanes];
        for (int64_t j = 0; j < kLanes * numbers; j += kLanes) {
          store(converted + j, load_params(from + j));
        }
        for (int64_t x = 0; x < numbers; ++x) {
          for (int64_t j = 0; j < kLanes; ++j) number[x][j] = converted[j * numbers + x];
        }
      }
      for (int64_t g = 0; g < groups; ++g) {
        const f32x16 of = load(number[g]);
        store(scale[g] + i, of);
        if (f.scheme == PackScheme::fp8) continue;
        const f32x16 second = has_offset(f.scheme) ? load(number[groups + g]) : of;
        store(offset[g] + i, whole_offset(f, of, second));
      }
    }
  }
};

// The scales and offsets of a group of tokens.
struct GroupParams {
  alignas(64) float scale[kMaxWideDim], offset[kMaxWideDim];

  void read(const PackFormat& f, const uint16_t* params) {
    for (int64_t d = 0; d < f.head_dim; d += kLanes) {
      const f32x16 of = load_params(params + d);
      store(scale + d, of);
      if (f.scheme == PackScheme::fp8) continue;
      const f32x16 second = has_offset(f.scheme) ? load_params(params + f.head_dim + d) : of;
      store(offset + d, whole_offset(f, of, second));
    }
  }
};

// A block's tokens with rows of codes as SideView::format has them.
class ReadableBlock {
 public:
  const BlockAddresses& of(const SideView& side, const BlockAddresses& block) {
    if (!side.has_levels()) return block;
    block_ = block;
    block_.row_stride = side.format.head_dim;
    for (int64_t i = 0; i < block.count; ++i) {
      uint8_t* row = rows_ + i * block_.row_stride;
      side.read_codes(block[i].row, row);
      if (i == 0 || !block.tight) block_.at[i].row = row;
    }
    if (!block.run) block_.finish(block.count);
    return block_;
  }

 private:
  BlockAddresses block_;
  alignas(64) uint8_t rows_[kGather * kMaxWideDim];
};

// Up to sixteen tokens of a block as rows of f32.
struct UnpackedRows {
  alignas(64) float numbers[kLanes * kMaxWideDim];
  const float* row[kLanes];

  // Those from `first` on.
  void load(const SideView& side, const BlockAddresses& block, int64_t first) {
    const int64_t count = block.count - first;
    for (int64_t i = 0; i < kLanes; ++i) {
      row[i] = numbers + (i < count ? i : 0) * side.format.head_dim;
      if (i < count) unpack_token(side, block[first + i], numbers + i * side.format.head_dim);
    }
  }
};

// How a side is read; in_order: its tokens one after the other.
TOKRED_INLINE CodePath read_path(const PackFormat& f, bool in_order) {
  return in_order || f.axis == GroupAxis::channel ? code_path(f) : CodePath::unpacked;
}

// Whether rows of this type and such codes are multiplied in fixed point; see
// packed_attn/cpu/fixed.h.
TOKRED_INLINE bool in_fixed_point(CodePath path, DType dtype) {
  return dtype != DType::f32 && path != CodePath::unpacked && path != CodePath::fp8;
}

// Whether the sum of a group of keys is below 2^31 in fixed point: 256 codes of eight bits are.
TOKRED_INLINE bool sums_in_32_bits(const PackFormat& f) {
  const int64_t span = f.axis == GroupAxis::channel ? f.group_size : f.head_dim;
  return span * ((1 << f.bits) - 1) * INT16_MAX <= INT32_MAX;
}

}  // namespace tokred::TOKRED_ISA
