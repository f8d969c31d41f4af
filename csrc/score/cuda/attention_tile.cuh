// Tiles of attention matrices for attention_rows and attention_columns: a block owns rows of one
// side and streams the other.
#pragma once

#include "attention/cuda/row_source.cuh"
#include "common/cuda/block.cuh"
#include "score/cuda/plan.h"
#include "score/params.h"

namespace tokred::cuda::scoring {

using attention::kLog2E;

template <class StorageType, int kHeadDim>
struct AttentionConfig {
  using T = StorageType;
  static constexpr int kDim = kHeadDim;
  static constexpr AttentionTiles kTiles = score_tiles(kDim, Operand<T>::kPlanes == 3);
  static constexpr int kThreads = kTiles.threads(), kRows = kTiles.rows();
  static constexpr int kRowTiles = kTiles.row_tiles, kColumns = kTiles.columns;
  static constexpr int kStages = kTiles.stages;
  using Owned = Tile<T, kRows, kDim>;
  using Streamed = Tile<T, kColumns, kDim>;
  using Products = float[kRowTiles][kColumns / 8][4];
};

// Products of this warp's rows with the rows of a streamed tile.
template <class C>
__device__ __forceinline__ void multiply_owned(typename C::Products& out,
                                               const typename C::Owned& owned,
                                               const typename C::Streamed& streamed) {
  multiply_by_rows<C::kDim>(out, streamed, [&](int k, int i) {
    Left<typename C::T> a;
    load_left(a, owned, (warp_id() * C::kRowTiles + i) * 16, 16 * k);
    return a;
  });
}

// The owned row that half `half` of row tile i is.
template <class C>
__device__ __forceinline__ int owned_row(int i, int half) {
  return (warp_id() * C::kRowTiles + i) * 16 + half * 8 + lane_id() / 4;
}
// The streamed row of element e (0 or 1) of column tile j.
__device__ __forceinline__ int streamed_row(int j, int e) { return 8 * j + lane_id() % 4 * 2 + e; }

// One key head: which of its keys exist, and which of them a query sees.
struct KeyView {
  const AttentionParams& a;
  const int64_t batch, head;
  const int64_t group;      // query heads that read it
  const bool by_query;      // the mask differs by query or query head
  const bool* key_mask;     // otherwise; null where all exist
  const float* key_bias;

  __device__ KeyView(const AttentionParams& a, int64_t index)
      : a(a), batch(index / a.heads_kv), head(index % a.heads_kv), group(a.heads_q / a.heads_kv),
        by_query(a.mask.data && (a.mask.stride[1] != 0 || a.mask.stride[2] != 0)),
        key_mask(a.mask.data && !by_query ? a.mask.data + batch * a.mask.stride[0] : nullptr),
        key_bias(a.key_bias ? static_cast<const float*>(a.key_bias) + batch * a.bias_stride_batch +
                                  head * a.bias_stride_head
                            : nullptr) {}

  __device__ __forceinline__ bool exists(int64_t key) const {
    return key < a.keys && (!key_mask || key_mask[key * a.mask.stride[3]]);
  }
  // -inf for a key that does not exist.
  __device__ __forceinline__ float bias(int64_t key) const {
    if (!exists(key)) return -kInfinity;
    return key_bias ? key_bias[key * a.bias_stride_key] : 0.0f;
  }
  // Where the mask of a query lies, if it has one of its own.
  __device__ __forceinline__ int64_t mask_offset(int64_t query_head, int64_t query) const {
    return by_query
               ? batch * a.mask.stride[0] + query_head * a.mask.stride[1] + query * a.mask.stride[2]
               : 0;
  }
  __device__ __forceinline__ int last_key(int64_t query) const {
    return static_cast<int>(a.causal ? query + a.keys - a.queries : a.keys - 1);
  }
  // Whether the query with that mask and last key sees a key with that bias.
  __device__ __forceinline__ bool sees(int64_t mask_offset, int last_key, int64_t key,
                                       float bias) const {
    return bias != -kInfinity && key <= last_key &&
           (!by_query || a.mask.data[mask_offset + key * a.mask.stride[3]]);
  }

  template <int kThreads, class T, int kRows, int kDim>
  __device__ __forceinline__ void load_keys(Tile<T, kRows, kDim>& tile, int64_t first) const {
    const T* base =
        static_cast<const T*>(a.k.data) + batch * a.k.stride_batch + head * a.k.stride_head;
    load_tile<kThreads>(tile, base, static_cast<int>(a.head_dim), is_aligned<T>(a.k), [&](int r) {
      return exists(first + r) ? base + (first + r) * a.k.stride_token : nullptr;
    });
  }
};

// step(tile) for tiles first .. last - 1, each once load(tile) is done, which copies the next one
// meanwhile where there are two stages.
template <class C, class Load, class Step>
__device__ __forceinline__ void stream(int64_t first, int64_t last, Load load, Step step) {
  if (C::kStages > 1 && first < last) load(first);
  for (int64_t tile = first; tile < last; ++tile) {
    if (C::kStages == 1) {
      __syncthreads();
      load(tile);
    }
    cp_async_wait<0>();
    __syncthreads();
    if (C::kStages > 1 && tile + 1 < last) load(tile + 1);
    step(tile);
  }
}

}  // namespace tokred::cuda::scoring
