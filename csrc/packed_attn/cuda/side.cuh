// One side of a cache, keys or values: where its tokens lie, and their numbers in registers.
#pragma once

#include "common/cuda/row_io.cuh"
#include "kv_pack/cuda/groups.cuh"
#include "packed_attn/params.h"

namespace tokred::cuda::attention {

// A place is a packed row, -1 - w for row w of the window, or kNowhere.
inline constexpr int kNowhere = -0x7fffffff - 1;
__device__ __forceinline__ bool is_packed(int place) { return place >= 0; }

// Where the tokens of an item lie on a side that has packed the first `packed` of them.
struct SidePlaces {
  const PackedSide& side;
  const SlotTable& slots;
  const int64_t& batch;
  int packed;

  __device__ SidePlaces(const PackedSide& side, const SlotTable& slots, const int64_t& batch,
                        int64_t tokens)
      : side(side), slots(slots), batch(batch) {
    const int64_t count =
        side.ring ? packed_tokens(side.packed.format.axis, side.window_rows, tokens) : capacity();
    packed = static_cast<int>(min(count, int64_t{0x7fffffff}));
  }

  __device__ __forceinline__ int64_t capacity() const {
    return slots.data ? slots.capacity : side.packed.rows;
  }
  __device__ __forceinline__ int place(int token) const {
    if (token < packed) {
      if (token >= capacity()) return kNowhere;
      const int row = slots.data ? slots.data[batch * slots.stride_batch + token] : token;
      return row >= 0 && row < side.packed.rows ? row : kNowhere;
    }
    if (side.window_rows == 0) return kNowhere;
    if (!side.ring) return token - packed < side.window_rows ? -1 - (token - packed) : kNowhere;
    return -1 -
           static_cast<int>(static_cast<uint32_t>(token) % static_cast<uint32_t>(side.window_rows));
  }
};

// Tokens of an item, clamped to those there may be.
__device__ __forceinline__ int64_t item_tokens(const int32_t* lengths, int64_t stride,
                                               int64_t batch, int64_t most) {
  if (!lengths) return most;
  return max(int64_t{0}, min(int64_t{lengths[batch * stride]}, most));
}

// Eight channels of one head's rows on a side.
template <class T>
struct SideRows {
  packing::RowReader packed;
  const HeadTensor& window;
  int64_t window_start;  // of the head
  int channel;

  __device__ SideRows(const PackedSide& side, const HeadTensor& window, bool pooled, int64_t batch,
                      int64_t head, int channel, const packing::CodeReader& reader)
      : packed(side.packed, pooled ? 0 : batch, head, channel, reader), window(window),
        window_start(batch * window.stride_batch + head * window.stride_head), channel(channel) {}

  __device__ __forceinline__ bool exists(int place) const {
    return place != kNowhere && channel < packed.packed.format.head_dim;
  }
  // A row's numbers; zeros beyond its end and for a row nowhere.
  __device__ __forceinline__ void numbers(float (&x)[8], int place) {
    if (exists(place) && is_packed(place)) return packed.numbers(x, place);
    window_numbers(x, place);
  }
  // The same where copies of a packed row's codes and params lie.
  __device__ __forceinline__ void numbers(float (&x)[8], int place, const uint8_t* codes,
                                          const packing::HalfWord* params) {
    if (!exists(place) || !is_packed(place)) return window_numbers(x, place);
    packing::to_floats(x, packed.read(codes, true), packed.packed.format);
    packed.apply(x, place, params);
  }
  // Of a row of the window.
  __device__ __forceinline__ void window_numbers(float (&x)[8], int place) const {
    const T* row[1] = {nullptr};
    if (exists(place)) {
      row[0] =
          static_cast<const T*>(window.data) + window_start + (-1 - place) * window.stride_token;
    }
    float rows[1][8];
    load_rows(rows, row, channel, static_cast<int>(packed.packed.format.head_dim),
              reinterpret_cast<uintptr_t>(row[0]) % 16 == 0);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = rows[0][i];
  }
};

}  // namespace tokred::cuda::attention
