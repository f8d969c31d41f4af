// Blocks of up to kGather tokens on one side of a cache, and their scales and offsets.
#pragma once

#include "packed_attn/cpu/codes.h"

namespace tokred::TOKRED_ISA {

// Where the tokens of a block lie.
struct BlockAddresses {
  int64_t count = 0;
  bool packed = true;           // none lies in the window
  bool run = false;             // packed, and neighbours are equally far apart
  TokenAddress at[kGather + kLanes];   // valid up to whole_lanes(count)

  void finish(int64_t tokens) {
    count = tokens;
    packed = true;
    run = false;
    for (int64_t i = 0; i < count; ++i) packed = packed && at[i].params;
    pad();
  }
  // The tokens of SideView::find_run().
  void finish_run(int64_t tokens) {
    count = tokens;
    packed = run = true;
    pad();
  }
  void pad() {
    for (int64_t i = count; count > 0 && i < count + kLanes; ++i) at[i] = at[count - 1];
  }
  TokenPrefetcher prefetcher(const PackFormat& f) const {
    return {at, count, code_bytes(f.head_dim, f.bits)};
  }
  // Whether the params of all tokens, so many numbers each, follow each other without gaps.
  bool in_order(int64_t numbers) const {
    return run && at[count - 1].params == at[0].params + (count - 1) * numbers;
  }
  // The first token from i on whose params are not those of i.
  int64_t group_end(int64_t i) const {
    int64_t end = i + 1;
    while (end < count && at[end].params == at[i].params) ++end;
    return end;
  }
};

// The offset that is added to scale c for the codes c of a group; see PackScheme.
TOKRED_INLINE f32x16 whole_offset(const PackFormat& f, f32x16 scale, f32x16 offset) {
  if (f.scheme == PackScheme::asymmetric) return offset;
  if (f.scheme == PackScheme::zero_point) return splat(0.0f) - scale * offset;
  return scale * splat(-static_cast<float>(1 << (f.bits - 1)));
}

// The scales and offsets of a block's tokens, along channels.
struct BlockParams {
  alignas(64) float scale[kMaxUnits][kGather], offset[kMaxUnits][kGather];

  void read(const PackFormat& f, const BlockAddresses& block) {
    const int64_t groups = groups_per_row(f), numbers = params_per_row(f);
    alignas(64) float stored[2 * kMaxUnits * kGather], transposed[2 * kMaxUnits * kGather];
    const int64_t count = whole_lanes(block.count);
    collect(block, count, numbers, stored);
    transpose_numbers(stored, count, numbers, transposed);
    for (int64_t g = 0; g < groups; ++g) {
      const float *scales = transposed + g * count, *offsets = transposed + (groups + g) * count;
      for (int64_t i = 0; i < count; i += kLanes) {
        const f32x16 of = load(scales + i);
        store(scale[g] + i, of);
        if (f.scheme == PackScheme::fp8) continue;
        const f32x16 second = has_offset(f.scheme) ? load(offsets + i) : of;
        store(offset[g] + i, whole_offset(f, of, second));
      }
    }
  }

 private:
  // [token][number] as f32, `count` a multiple of 16.
  static void collect(const BlockAddresses& block, int64_t count, int64_t numbers, float* to) {
    if (count == block.count && block.in_order(numbers)) {
      const uint16_t* from = block.at[0].params;
      for (int64_t i = 0; i < count * numbers; i += kLanes) store(to + i, load_params(from + i));
      return;
    }
    alignas(64) uint16_t rows[2 * kMaxUnits * kGather];
    switch (numbers) {
      case 1: copy<1>(block, count, rows); break;
      case 2: copy<2>(block, count, rows); break;
      case 4: copy<4>(block, count, rows); break;
      case 8: copy<8>(block, count, rows); break;
      default:
        for (int64_t i = 0; i < count; ++i) {
          copy_bytes(rows + i * numbers, block.at[i].params, 2 * numbers);
        }
    }
    for (int64_t i = 0; i < count * numbers; i += kLanes) store(to + i, load_params(rows + i));
  }
  // [number][token] of [token][number]. Numbers are few, tokens many: so the loop is over these.
  static void transpose_numbers(const float* from, int64_t count, int64_t numbers, float* to) {
    int64_t first = 0;
    for (; first + 4 <= numbers; first += 4) {
      for (int64_t i = 0; i < count; i += 4) {
        Four<float> x[4];
        for (int j = 0; j < 4; ++j) std::memcpy(&x[j], from + (i + j) * numbers + first, 16);
        transpose<float>(x);
        for (int j = 0; j < 4; ++j) std::memcpy(to + (first + j) * count + i, &x[j], 16);
      }
    }
    for (; first < numbers; ++first) {
      for (int64_t i = 0; i < count; ++i) to[first * count + i] = from[i * numbers + first];
    }
  }
  template <int kNumbers>
  static void copy(const BlockAddresses& block, int64_t count, uint16_t* to) {
    for (int64_t i = 0; i < count; ++i, to += kNumbers) {
      std::memcpy(to, block.at[i].params, 2 * kNumbers);
    }
  }
};

// The scales and offsets of a group of tokens.
struct GroupParams {
  alignas(64) float scale[kMaxHeadDim], offset[kMaxHeadDim];

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

// Up to sixteen tokens of a block as rows of f32.
struct UnpackedRows {
  alignas(64) float numbers[kLanes * kMaxHeadDim];
  const float* row[kLanes];

  void load(const SideView& side, const TokenAddress* at, int64_t count) {
    for (int64_t i = 0; i < kLanes; ++i) {
      row[i] = numbers + (i < count ? i : 0) * side.format.head_dim;
      if (i < count) unpack_token(side, at[i], numbers + i * side.format.head_dim);
    }
  }
};

// How a side is read; in_order: its tokens one after the other.
TOKRED_INLINE CodePath read_path(const PackFormat& f, bool in_order) {
  return in_order || f.axis == GroupAxis::channel ? code_path(f) : CodePath::unpacked;
}

// Whether rows of this type meet such codes in fixed point; see packed_attn/cpu/fixed.h.
TOKRED_INLINE bool in_fixed_point(CodePath path, DType dtype) {
  return dtype != DType::f32 && path != CodePath::unpacked && path != CodePath::fp8;
}

}  // namespace tokred::TOKRED_ISA
