// Attention over index lists that many query rows share: as biased_attention, with the keys of a
// tile gathered from all over the memory.
#pragma once

#include "attention/cuda/keys.cuh"
#include "sparse_attn/cuda/biased_attention.cuh"

namespace tokred::cuda::attention {

// Keys are looked up two tiles ahead of the one at work, so that their copies can start one ahead.
inline constexpr int kSlotStages = 3;

// For 16-bit keys that are rotated to the positions of their entries in the list.
template <class StorageType, int kHeadDim>
struct RotatedForwardConfig : ForwardConfig<float, kHeadDim> {
  using T = StorageType;
  using Key = Split<T>;
};

template <class C>
struct ListForwardShared {
  Tile<typename C::Key, C::kRows, C::kDim> query;
  Tile<typename C::Key, C::kKeys, C::kDim> key[C::kStages];
  Tile<typename C::T, C::kKeys, C::kValueDim> value[C::kStages];
  KeySlots<C::kKeys> slots[kSlotStages];
  RowVisibility visibility[C::kRows];
};

// Walks a list tile by tile: load(tile) starts the copies of a tile, add(tile) works on it. The
// keys of a tile are in slots[tile % kSlotStages] when either is called.
template <int kKeys, int kStages, class Load, class Add>
__device__ __forceinline__ void for_each_tile(const AttentionParams& p, const ListView& list,
                                              KeySlots<kKeys> (&slots)[kSlotStages], Load load,
                                              Add add) {
  const int thread = static_cast<int>(threadIdx.x);
  const int tiles = static_cast<int>((list.length + kKeys - 1) / kKeys);
  KeyStream stream(p, list, thread < kKeys ? thread : list.length, kKeys, list.length);
  const auto look_up = [&](int tile) {
    const KeyInfo info = stream.next();
    if (thread >= kKeys) return;
    slots[tile % kSlotStages].key[thread] = info.key;
    slots[tile % kSlotStages].bias[thread] = info.bias;
  };
  look_up(0);
  look_up(1);
  __syncthreads();
  if (kStages > 1 && tiles > 0) load(0);
  for (int tile = 0; tile < tiles; ++tile) {
    if (kStages == 1) {
      __syncthreads();
      load(tile);
    }
    cp_async_wait<0>();
    __syncthreads();
    if (kStages > 1 && tile + 1 < tiles) load(tile + 1);
    add(tile);
    look_up(tile + 2);
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 2)
    list_attention_kernel(const __grid_constant__ SparseAttentionParams p, int64_t row_blocks) {
  using T = typename C::T;
  auto& shared = shared_memory<ListForwardShared<C>>();
  const AttentionParams& a = p.attention;
  const int64_t parts = (a.value_dim + C::kValueDim - 1) / C::kValueDim;
  const ListView list(a, p.lists, blockIdx.x / row_blocks / parts);
  const HeadView& view = list.view;
  const uint32_t first_row =
      list.first_row + static_cast<uint32_t>(blockIdx.x % row_blocks * C::kRows);
  if (first_row >= view.rows) return;
  const int first_column = static_cast<int>(blockIdx.x / row_blocks % parts) * C::kValueDim;
  const RowSource<T> keys(a.k, view.batch, list.key_head, 0, a.head_dim);
  const RowSource<T> values(a.v, view.batch, list.key_head, first_column, a.value_dim);
  const int thread = static_cast<int>(threadIdx.x);

  load_queries<C::kThreads>(shared.query, RowSource<T>(a.q, view.batch, 0, 0, a.head_dim), view,
                            first_row);
  cp_async_commit();
  if (thread < C::kRows) {
    shared.visibility[thread] = row_visibility(a, view, min(first_row + thread, view.rows - 1));
  }
  const auto load = [&](int tile) {
    const auto& slots = shared.slots[tile % kSlotStages];
    auto& key = shared.key[tile % C::kStages];
    load_listed_keys<C, C::kThreads>(key, keys, p.rotation, int64_t{tile} * C::kKeys,
                                     listed_rows(keys, slots), thread);
    load_tile<C::kThreads>(shared.value[tile % C::kStages], values.first, values.columns,
                           values.aligned, listed_rows(values, slots));
    cp_async_commit();
  };

  // A warp without rows only helps with loading.
  const bool has_rows = first_row + warp_id() * C::kRowTiles * 16 < view.rows;
  const float scale = logit_scale(a);
  const bool per_row_mask = rows_differ(a);
  ForwardState<C> state;
  start(state);
  for_each_tile<C::kKeys, C::kStages>(a, list, shared.slots, load, [&](int tile) {
    if (!has_rows) return;
    float weights[C::kRowTiles][C::kKeys / 8][4];
    multiply_by_rows<C::kDim>(weights, shared.key[tile % C::kStages], [&](int k, int i) {
      Left<typename C::Key> left;
      load_left(left, shared.query, (warp_id() * C::kRowTiles + i) * 16, 16 * k);
      return left;
    });
    list_logits<typename C::T, false>(weights, shared.slots[tile % kSlotStages], shared.visibility,
                                      a, view.batch, scale, per_row_mask,
                                      [](int i, int h) { return lane_row<C>(i, h); });
    to_weights(weights, state);
    accumulate(state.out, weights, shared.value[tile % C::kStages]);
  });
  if (has_rows) finish(state, a, view, first_row, first_column);
}

}  // namespace tokred::cuda::attention
