// packed_attention: the tokens of a cache as one query row sees them, for the kernel of
// attention/cuda/recompute.cuh.
#pragma once

#include "attention/cuda/recompute.cuh"
#include "packed_attn/cuda/tokens.cuh"

namespace tokred::cuda::attention {

template <class T>
struct PackedKeys {
  static constexpr int kParts = 1;
  struct Found {
    int key;  // -1 for none
    float bias;
    int k, v;  // places

    __device__ Found of(int lane) const {
      return {__shfl_sync(kAllLanes, key, lane), __shfl_sync(kAllLanes, bias, lane),
              __shfl_sync(kAllLanes, k, lane), __shfl_sync(kAllLanes, v, lane)};
    }
  };
  const PackedAttentionParams& p;
  const int64_t tokens;
  const PlainKeys<T> plain;  // visibility, and the list
  const SidePlaces k_places, v_places;
  const int64_t last_key;

  __device__ PackedKeys(const PackedAttentionParams& p, int64_t batch, int64_t head, int64_t query)
      : p(p), tokens(item_tokens(p.lengths, p.lengths_stride, batch, p.attention.keys)),
        plain(p.attention, p.lists, {}, batch, head, query),
        k_places(p.k, p.slots, plain.batch, tokens), v_places(p.v, p.slots, plain.batch, tokens),
        last_key(p.attention.causal ? query + tokens - p.attention.queries : tokens - 1) {}

  __device__ int64_t length() const { return plain.length(); }
  __device__ Found find(int64_t position) const {
    const auto found = plain.find(position);
    const Found none{-1, 0.0f, kNowhere, kNowhere};
    if (found.key < 0 || found.key >= tokens || found.key > last_key) return none;
    const int k = k_places.place(found.key), v = v_places.place(found.key);
    if (k == kNowhere || v == kNowhere) return none;
    return {found.key, found.bias, k, v};
  }

  __device__ void rotate_query(LaneRow& x) const {
    if (p.k.packed.format.rotated) packing::rotate_row(x[0], p.attention.head_dim);
    keep_finite<T>(x[0]);
  }
  __device__ void rotate_out(LaneRow& x) const {
    if (p.v.packed.format.rotated) packing::rotate_row(x[0], p.attention.value_dim);
  }
  __device__ void load_key(LaneRow& x, const Found& found, int64_t) const {
    load(x, p.k, p.attention.k, found.k);
  }
  __device__ void load_value(LaneRow& x, const Found& found) const {
    load(x, p.v, p.attention.v, found.v);
  }

 private:
  // SideRows are made again for every token, so that they hold no registers in between.
  __device__ __forceinline__ void load(LaneRow& x, const PackedSide& side, const HeadTensor& window,
                                       int place) const {
    const PackFormat& f = side.packed.format;
    const auto channel =
        static_cast<int>(optimization_barrier(static_cast<uint32_t>(8 * lane_id())));
    SideRows<T> rows(side, window, p.slots.data != nullptr, optimization_barrier(plain.batch),
                     optimization_barrier(plain.kv_head), channel,
                     packing::CodeReader(f, channel < f.head_dim ? channel : 0));
#pragma unroll
    for (int i = 0; i < 8; ++i) x[0][i] = 0.0f;
    if (channel >= f.head_dim) return;
    rows.numbers(x[0], place);
    keep_finite<T>(x[0]);
  }
};

}  // namespace tokred::cuda::attention
