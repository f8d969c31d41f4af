// Rows of packed codes as fragments of the tensor cores: a rotation and a mask of a word make two
// bf16 numbers 2^bits + code, because a code in the upper bits of the significand of 2^bits adds
// itself to it.
#pragma once

#include "common/cuda/mma_tile.cuh"
#include "packed_attn/cuda/plan_codes.h"
#include "packed_attn/cuda/side.cuh"

namespace tokred::cuda::attention {

// What a fragment adds to each code, as small as possible, since sums lose bits to it.
__device__ __forceinline__ float code_base(const PackFormat& f) {
  return static_cast<float>(1 << f.bits);
}

// Where the codes of channels 16 i .. 16 i + 15 lie in the rows of a tile, and how they become
// numbers. ldmatrix gives a lane four bytes of a run (of one row) or two bytes of two rows; either
// way bytes 0 and 2 of its word make one pair, bytes 1 and 3 the other.
struct CodeStep {
  uint32_t bits, bit, mask, base;

  // Of i = 0. Made anew for every tile, so that it takes no registers meanwhile.
  __device__ __forceinline__ explicit CodeStep(int bits)
      : bits(optimization_barrier(static_cast<uint32_t>(bits))), bit(0),
        mask(0x00010001u * (((1u << bits) - 1) << (7 - bits))),
        base(0x00010001u * static_cast<uint32_t>((127 + bits) << 7)) {}

  __device__ __forceinline__ void advance() { bit += bits; }
  __device__ __forceinline__ uint32_t byte() const { return (bit & ~7u) * 2; }

  __device__ __forceinline__ void pairs(uint32_t (&pair)[2], uint32_t word) const {
    const uint32_t rotated = rotate_right(word, (bit & 7) + bits - 7);
    pair[0] = (rotated & mask) | base;
    pair[1] = (rotate_right(rotated, 8) & mask) | base;
  }

 private:
  static __device__ __forceinline__ uint32_t rotate_right(uint32_t x, uint32_t by) {
    return x >> (by & 31) | x << (-by & 31);
  }
};

__device__ __forceinline__ float code_middle(const PackFormat& f) {
  return static_cast<float>(1 << (f.bits - 1));
}

// Scale and offset of the tokens of a tile, group by group.
struct CodeScales {
  float2 of[kCodeDim / 16][kCodeKeys];

  // A token a lane, whose params were copied to `params`: a number is scale * fragment + offset,
  // where a fragment is a code less `less`. A row of the window is its own numbers, a row nowhere
  // is zeros.
  __device__ __forceinline__ void fill(const PackFormat& f, int place, const uint8_t* params,
                                       float less) {
    const int groups = static_cast<int>(groups_per_row(f));
    const bool packed = is_packed(place), points = f.scheme == PackScheme::zero_point;
    const int second_row = has_offset(f.scheme) ? groups : 0;
    const float lone = place == kNowhere ? 0.0f : 1.0f;
    const float from_scale = f.scheme == PackScheme::symmetric ? less - code_middle(f) : less;
    const float of_second = f.scheme == PackScheme::asymmetric ? 1.0f : 0.0f;
    const float of_both = points ? -1.0f : 0.0f;
    const auto* row = reinterpret_cast<const packing::HalfWord*>(params);
#pragma unroll 2
    for (int group = 0; group < groups; ++group) {
      const float scale = packing::param(row[group]);
      const float second = packing::param(row[second_row + group]);
      const float offset = fmaf(second, fmaf(of_both, scale, of_second), scale * from_scale);
      of[group][lane_id()] = {packed ? scale : lone, packed ? offset : 0.0f};
    }
  }
  // Of keys 8 n + 2 (lane % 4) and the next: scale, offset, scale, offset.
  __device__ __forceinline__ float4 pair(int group, int n) const {
    return *reinterpret_cast<const float4*>(&of[group][8 * n + lane_id() % 4 * 2]);
  }
};

// Starts the copies of the packed rows of a tile, kLanes lanes a row.
template <int kLanes>
__device__ __forceinline__ void copy_code_rows(uint8_t* to, const RowCopy& copy,
                                               const uint8_t* head, int64_t stride,
                                               const int* places) {
  constexpr int kAtOnce = kWarp / kLanes;  // rows
  const int lane = lane_id() % kLanes, pitch = kAtOnce * copy.pitch;
  to += lane_id() / kLanes * copy.pitch;
  places += lane_id() / kLanes;
  if (copy.whole) {
    if (16 * lane >= copy.bytes) return;
    head += 16 * lane;
    to += 16 * lane;
#pragma unroll
    for (int i = 0; i < kCodeKeys / kAtOnce; ++i) {
      const int place = places[i * kAtOnce];
      const uint64_t offset = static_cast<uint32_t>(place) * static_cast<uint64_t>(stride);
      if (is_packed(place)) cp_async_16(to, head + offset);
      to += pitch;
    }
    return;
  }
#pragma unroll 1
  for (int r = 0; r < kCodeKeys; r += kAtOnce, to += pitch) {
    if (!is_packed(places[r])) continue;
    const uint8_t* from = head + places[r] * stride;
#pragma unroll 1
    for (int i = lane * copy.unit; i < copy.bytes; i += kLanes * copy.unit) {
      if (copy.unit == 16) {
        cp_async_16(to + i, from + i);
      } else if (copy.unit == 4) {
        cp_async_4(to + i, from + i);
      } else {
        to[i] = from[i];
      }
    }
  }
}

}  // namespace tokred::cuda::attention
