// packed_attention with groups along channels: products with codes as they are, which 16 bits hold
// exactly. The sum over a group of channels is multiplied by its scale, as are the weights of
// values.
#pragma once

#include "attention/cuda/plan_decode.h"
#include "common/cuda/mma_tile.cuh"
#include "packed_attn/cuda/query_codes.cuh"
#include "packed_attn/cuda/side.cuh"

namespace tokred::cuda::attention {

// Codes less their middle are multiplied, so that offsets are those of the middle of a group's
// range.
__device__ __forceinline__ int middle_code(const PackFormat& f) {
  return f.scheme == PackScheme::fp8 ? 0 : 1 << (as_read(f).bits - 1);
}

// The pairs (0, 2), (1, 3), (4, 6), (5, 7) of eight codes less their middle. An integer below 128
// (1024) is the significand of 128 (1024) plus itself in bf16 (f16).
template <class T>
__device__ __forceinline__ Chunk code_pairs(uint2 codes, const PackFormat& f) {
  constexpr bool kWide = std::is_same_v<T, f16>;
  constexpr uint32_t kBase = kWide ? 0x64006400u : 0x43004300u;
  constexpr uint32_t kMask = kWide ? 0x00ff00ffu : 0x007f007fu;
  const uint32_t words[4] = {codes.x, codes.x >> 8, codes.y, codes.y >> 8};
  const uint32_t middle = kBase | static_cast<uint32_t>(middle_code(f)) * 0x10001u;
  Chunk pairs;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t less = middle;
    // Of eight bits bf16 takes seven; from 128 on 128 is to be subtracted, below it 256.
    if (!kWide && as_read(f).bits == 8) less = (words[i] & 0x00800080u) ^ 0x43804380u;
    pairs.word[i] = subtract_pairs(T{}, (words[i] & kMask) | kBase, less);
  }
  return pairs;
}
template <class T>
__device__ __forceinline__ Chunk number_pairs(const float (&x)[8]) {
  return {{pack_pair<T>(x[0], x[2]), pack_pair<T>(x[1], x[3]), pack_pair<T>(x[4], x[6]),
           pack_pair<T>(x[5], x[7])}};
}

// Scale and offset of every group of a tile's tokens: a number is scale * code + offset.
template <int kDim>
struct GroupScales {
  float2 of[kDecodeKeys][kDim / 16 + 1];  // one more, so that tokens lie in different banks

  // Of the rows of a side, whose params were copied to `params`; two lanes a token.
  __device__ __forceinline__ void fill(const PackFormat& f, const int* places,
                                       const uint8_t* params, int param_pitch) {
    const int token = lane_id() / 2, place = places[token];
    const int groups = static_cast<int>(groups_per_row(f));
    const auto* row = reinterpret_cast<const packing::HalfWord*>(params + token * param_pitch);
    const auto middle = static_cast<float>(middle_code(f));
    for (int group = lane_id() % 2; group < groups; group += 2) {
      float2 result{place == kNowhere ? 0.0f : 1.0f, 0.0f};
      if (is_packed(place)) {
        result.x = packing::param(row[group]);
        const float second = has_offset(f.scheme) ? packing::param(row[groups + group]) : 0.0f;
        if (f.scheme == PackScheme::asymmetric) result.y = fmaf(result.x, middle, second);
        if (f.scheme == PackScheme::zero_point) result.y = result.x * (middle - second);
      }
      of[token][group] = result;
    }
  }
};

// out = rows of the query . rows of the tile, of `dim` channels; sums[row][group] are those of the
// query.
template <class T, int kDim, class Sums>
__device__ __forceinline__ void multiply_codes(float (&out)[1][kDecodeKeys / 8][4],
                                               const Tile<T, kDecodeKeys, kDim>& tile,
                                               const GroupScales<kDim>& scales,
                                               const Tile<Split<T>, kDecodeRows, kDim>& query,
                                               const Sums& sums, int planes, int group_size,
                                               int dim) {
  constexpr int kTiles = kDecodeKeys / 8;
  float part[kTiles][4] = {};
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) out[0][j][e] = 0.0f;
  }
  int group = 0, end = group_size;
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    if (16 * k >= dim) break;
    uint32_t b[kTiles][2];
    load_right<false>(b, tile, 0, 0, 16 * k);
    for (int plane = planes - 1; plane >= 0; --plane) {
      uint32_t a[4];
      ldmatrix_x4(a, &query.plane[plane][lane_id() % 16][16 * k + lane_id() / 16 * 8]);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) mma(T{}, part[j], a, b[j]);
    }
    if (16 * (k + 1) != end) continue;
    const float sum[2] = {sums[lane_id() / 4][group], sums[lane_id() / 4 + 8][group]};
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 s = scales.of[8 * j + lane_id() % 4 * 2 + e % 2][group];
        out[0][j][e] = fmaf(s.x, part[j][e], fmaf(s.y, sum[e / 2], out[0][j][e]));
        part[j][e] = 0.0f;
      }
    }
    ++group;
    end += group_size;
  }
}

// out += weights . rows of the tile, of `dim` columns.
template <class T, int kDim>
__device__ __forceinline__ void accumulate_codes(float (&out)[1][kDim / 8][4],
                                                 const float (&weights)[1][kDecodeKeys / 8][4],
                                                 const Tile<T, kDecodeKeys, kDim>& tile,
                                                 const GroupScales<kDim>& scales, bool has_offset,
                                                 int group_size, int dim) {
  const uint32_t one = pack_pair<T>(1.0f, 1.0f), ones[2] = {one, one};
  uint32_t scaled[4], shifted[4];
  int group = 0, first = 0;
#pragma unroll
  for (int j = 0; j < kDim / 16; ++j) {
    if (16 * j >= dim) break;
    if (16 * j == first) {
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        const float* w = &weights[0][quarter / 2][quarter % 2 * 2];
        const int token = quarter / 2 * 8 + lane_id() % 4 * 2;
        const float2 s = scales.of[token][group], t = scales.of[token + 1][group];
        scaled[quarter] = pack_pair<T>(w[0] * s.x, w[1] * t.x);
        shifted[quarter] = pack_pair<T>(w[0] * s.y, w[1] * t.y);
      }
      ++group;
      first += group_size;
    }
    uint32_t b[2][2];
    load_right<true>(b, tile, 0, 0, 16 * j);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      mma(T{}, out[0][2 * j + i], scaled, b[i]);
      if (has_offset) mma(T{}, out[0][2 * j + i], shifted, ones);
    }
  }
}

}  // namespace tokred::cuda::attention
