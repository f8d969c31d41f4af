// The tiles of tokens that a warp works on: which tokens, where they lie, copies of their packed
// rows, and what these unpack to.
#pragma once

#include "attention/cuda/decode.cuh"
#include "packed_attn/cuda/codes.cuh"
#include "packed_attn/cuda/plan.h"

namespace tokred::cuda::attention {

struct PackedDecodeParams {
  DecodeParams decode;
  PackedSide k, v;
  SlotTable slots;
  const int32_t* lengths;
  int64_t lengths_stride;
  PackedCopy copy;

  // Whether keys, and values, are multiplied as codes. In f16 weights times small scales would lose
  // bits.
  template <class T>
  __device__ __forceinline__ bool key_codes() const {
    return Operand<T>::kPlanes == 1 && k.packed.format.axis == GroupAxis::channel;
  }
  template <class T>
  __device__ __forceinline__ bool value_codes() const {
    return std::is_same_v<T, bf16> && v.packed.format.axis == GroupAxis::channel;
  }
};

// The types in which keys and queries are multiplied, by the dtype of the query.
template <class T>
struct KeyOperandOf {
  using type = Split<T>;
};
template <>
struct KeyOperandOf<float> {
  using type = float;
};
template <class T>
using KeyOperand = typename KeyOperandOf<T>::type;

template <class StorageType, int kHeadDim>
struct PackedConfig {
  using T = StorageType;
  using Key = KeyOperand<T>;
  static constexpr int kDim = kHeadDim;
  static constexpr int kValueDim = forward_value_dim(kDim, Operand<T>::kPlanes == 3);
  // The largest tiles; a device of less shared memory gets fewer warps or stages.
  static constexpr DecodeTiles kTiles = max_packed_tiles(kDim, Operand<T>::kPlanes == 3);
  static constexpr int kWarps = kTiles.warps, kStages = kTiles.stages;
  static constexpr int kThreads = kTiles.threads();
  static constexpr int kRowTiles = 1, kRows = kDecodeRows, kKeys = kDecodeKeys;
  static constexpr int kRowLanes = kDim / 8;  // that share a row
};

// The tokens of a tile: none is key -1, with a bias of -inf.
struct TilePlaces : KeySlots<kDecodeKeys> {
  int k[kDecodeKeys], v[kDecodeKeys];
};

// Of attention to the `tokens` of a cache: also where both sides of the token lie.
struct TokenLookUp {
  struct Info {
    int key;
    float bias;
    int k, v;
  };
  const AttentionParams& a;
  const HeadView& view;
  SidePlaces k, v;
  int tokens;

  __device__ TokenLookUp(const PackedDecodeParams& p, const HeadView& view, int64_t tokens)
      : a(p.decode.sparse.attention), view(view), k(p.k, p.slots, view.batch, tokens),
        v(p.v, p.slots, view.batch, tokens), tokens(static_cast<int>(tokens)) {}

  __device__ __forceinline__ Info operator()(int entry) const {
    const Info none{-1, -kInfinity, kNowhere, kNowhere};
    if (entry < 0 || entry >= tokens || !view.key_exists(a, entry)) return none;
    const int k_place = k.place(entry), v_place = v.place(entry);
    const float* biases = view.key_bias;
    const float bias = biases ? kLog2E * biases[entry * a.bias_stride_key] : 0.0f;
    if (k_place == kNowhere || v_place == kNowhere || bias == -kInfinity) return none;
    return {entry, bias, k_place, v_place};
  }
};
using TokenInfo = TokenLookUp::Info;

struct TokenStream : ListStream<uint32_t, TokenLookUp> {
  __device__ TokenStream(const PackedDecodeParams& p, const ListView& list, int64_t tokens,
                         int64_t first, int64_t step, int64_t end)
      : ListStream(list, static_cast<uint32_t>(first), static_cast<uint32_t>(step),
                   static_cast<uint32_t>(end), TokenLookUp(p, list.view, tokens)) {}
};

// Starts the copies of `bytes` of the packed rows of a tile, two lanes a row.
__device__ __forceinline__ void copy_packed_rows(uint8_t* to, int pitch, const uint8_t* head,
                                                 int64_t stride, int bytes, const int* places) {
  const int row = lane_id() / 2, place = places[row];
  if (!is_packed(place) || pitch == 0) return;
  const uint8_t* from = head + place * stride;
  to += row * pitch;
  const uintptr_t address = reinterpret_cast<uintptr_t>(head) | static_cast<uintptr_t>(stride);
  if (address % 16 == 0) {
    for (int i = lane_id() % 2 * 16; i < bytes; i += 32) {
      cp_async_16(to + i, from + i, min(bytes - i, 16));
    }
  } else if (address % 4 == 0 && bytes % 4 == 0) {
    for (int i = lane_id() % 2 * 4; i < bytes; i += 8) {
      *reinterpret_cast<packing::Word*>(to + i) = *reinterpret_cast<const packing::Word*>(from + i);
    }
  } else {
    for (int i = lane_id() % 2; i < bytes; i += 2) to[i] = from[i];
  }
}

// One side of a warp's tiles, from its first byte in a stage on: channels first_channel on, as many
// as the tile is wide.
template <class C, int kWidth>
struct SideTiles {
  using T = typename C::T;
  static constexpr int kRowLanes = kWidth / 8;  // that share a row
  SideRows<T> rows;
  int code_pitch, param_pitch;

  __device__ SideTiles(const PackedSide& side, const HeadTensor& window, const SlotTable& slots,
                       int64_t batch, int64_t head, int first_channel, const uint2* codes,
                       int code_pitch, int param_pitch)
      : rows(side, window, slots.data != nullptr, batch, head,
             first_channel + lane_id() % kRowLanes * 8,
             {side.packed.format, codes[first_channel / 8 + lane_id() % kRowLanes]}),
        code_pitch(code_pitch), param_pitch(param_pitch) {}

  __device__ __forceinline__ void copy(uint8_t* stage, const int* places) const {
    const PackedRows& packed = rows.packed.packed;
    const PackFormat& f = packed.format;
    copy_packed_rows(stage, code_pitch, rows.packed.codes(), packed.codes_stride_token,
                     static_cast<int>(code_bytes(f.head_dim, f.bits)), places);
    copy_packed_rows(stage + C::kKeys * code_pitch, param_pitch,
                     reinterpret_cast<const uint8_t*>(rows.packed.params()),
                     2 * packed.params_stride_row, static_cast<int>(2 * params_per_row(f)), places);
  }

  template <class Tile>
  __device__ __forceinline__ void unpack(Tile& tile, const uint8_t* stage, const int* places) {
    const uint8_t* params = stage + C::kKeys * code_pitch;
#pragma unroll 1
    for (int r = lane_id() / kRowLanes; r < C::kKeys; r += kWarp / kRowLanes) {
      float x[8];
      rows.numbers(x, places[r], stage + r * code_pitch,
                   reinterpret_cast<const packing::HalfWord*>(params + r * param_pitch));
      keep_finite<T>(x);
      store_eight(tile, r, lane_id() % kRowLanes * 8, x);
    }
  }

  // The codes, in the order of code_order(), and their scales.
  __device__ __forceinline__ void unpack_codes(Tile<T, C::kKeys, kWidth>& tile,
                                               GroupScales<C::kDim>& scales, const uint8_t* stage,
                                               const int* places) const {
    const PackFormat& f = rows.packed.packed.format;
    scales.fill(f, places, stage + C::kKeys * code_pitch, param_pitch);
#pragma unroll 1
    for (int r = lane_id() / kRowLanes; r < C::kKeys; r += kWarp / kRowLanes) {
      Chunk pairs;
      if (!rows.exists(places[r]) || !is_packed(places[r])) {
        float x[8];
        rows.window_numbers(x, places[r]);
        pairs = number_pairs<T>(x);
      } else {
        const uint2 codes = rows.packed.read(stage + r * code_pitch, true);
        if (f.scheme == PackScheme::fp8) {
          float x[8];
          packing::to_floats(x, codes, f);
          pairs = number_pairs<T>(x);
        } else {
          pairs = code_pairs<T>(codes, f);
        }
      }
      store_chunk(&tile.plane[0][r][lane_id() % kRowLanes * 8], pairs);
    }
  }
};

}  // namespace tokred::cuda::attention
