// Gradients of attention over index lists. As in the dense case one kernel owns rows of queries
// (grad_q) and one owns keys (grad_k, grad_v, grad_bias), so that every sum has one owner and a
// fixed order. An owner of keys reads all lists of its head for the rows that name its keys.
#pragma once

#include "sparse_attn/cuda/biased_attention_backward.cuh"
#include "sparse_attn/cuda/sparse_attention.cuh"

namespace tokred::cuda::attention {

// A query row. lse is +inf for a row that sees nothing or does not exist,
// which makes all its probabilities 0.
struct ListRowInfo {
  RowVisibility visibility;
  float lse_log2, delta;
  int list;  // counted from the first list of the tile
};

__device__ __forceinline__ ListRowInfo list_row_info(const AttentionBackwardParams& p,
                                                     const HeadView& view, int64_t index) {
  if (index >= view.rows) return {{}, kInfinity, 0.0f, 0};
  const auto row = static_cast<uint32_t>(index);
  const int64_t flat = view.flat_row(p.forward, row);
  const float lse = static_cast<const float*>(p.forward.lse)[flat];
  return {row_visibility(p.forward, view, row), lse == -kInfinity ? kInfinity : lse * kLog2E,
          static_cast<const float*>(p.delta)[flat], 0};
}

// The probability that a row gives to a key whenever one of its lists names it. T is the type of q.
template <class T>
__device__ __forceinline__ float list_probability(float product, float scale, float bias, int key,
                                                  const ListRowInfo& info, const AttentionParams& p,
                                                  int64_t batch, bool per_row_mask) {
  if (bias == -kInfinity || (per_row_mask && !sees(p, batch, info.visibility, key))) return 0.0f;
  const float logit =
      with_pair_bias<T>(fmaf(product, scale, bias), p.pair_bias, info.visibility.mask_offset, key);
  return exp2_approx(logit - info.lse_log2);
}

template <class C>
struct ListQueryGradShared {
  typename C::Owned query, grad_out;
  typename C::Streamed key[C::kStages], value[C::kStages];
  KeySlots<C::kColumns> slots[kSlotStages];
  ListRowInfo info[C::kRows];
};

// Adds one tile of keys to grad_q.
template <class C>
__device__ __forceinline__ void add_listed_keys(typename C::Sums& grad_q,
                                                const ListQueryGradShared<C>& shared,
                                                const AttentionParams& p, const HeadView& view,
                                                int tile, float scale, bool per_row_mask) {
  const int stage = tile % C::kStages;
  const KeySlots<C::kColumns>& slots = shared.slots[tile % kSlotStages];
  typename C::Products product, grad;
  multiply_owned<C>(product, shared.query, shared.key[stage], p.head_dim);
  multiply_owned<C>(grad, shared.grad_out, shared.value[stage], p.value_dim);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const ListRowInfo& info = shared.info[warp_id() * 16 + half * 8 + lane_id() / 4];
#pragma unroll
    for (int j = 0; j < C::kColumns / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * j + lane_id() % 4 * 2 + e;
        float& x = product[0][j][2 * half + e];
        const float slope = cap_product(x, p);
        x = list_probability<typename C::T>(x, scale, slots.bias[column], slots.key[column], info,
                                            p, view.batch, per_row_mask);
        x = grad_product(grad_logit(x, grad[0][j][2 * half + e], info.delta), slope);
      }
    }
  }
  accumulate(grad_q, product, shared.key[stage], static_cast<int>(p.head_dim));
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    list_grad_query_kernel(const __grid_constant__ SparseAttentionBackwardParams p,
                           int64_t row_blocks, int64_t first_block) {
  using T = typename C::T;
  auto& shared = shared_memory<ListQueryGradShared<C>>();
  const AttentionParams& f = p.backward.forward;
  const int64_t block = first_block + blockIdx.x;
  const ListView list(f, p.lists, block / row_blocks);
  const HeadView& view = list.view;
  const int64_t first_row = list.first_row + block % row_blocks * C::kRows;
  if (first_row >= view.rows) return;
  const RowSource<T> keys(f.k, view.batch, list.key_head, 0, f.head_dim);
  const RowSource<T> values(f.v, view.batch, list.key_head, 0, f.value_dim);
  const int thread = static_cast<int>(threadIdx.x);

  const RowSource<T> queries(f.q, view.batch, 0, 0, f.head_dim);
  const RowSource<T> grads(p.backward.grad_out, view.batch, 0, 0, f.value_dim);
  load_queries<C::kThreads>(shared.query, queries, view, first_row);
  load_queries<C::kThreads>(shared.grad_out, grads, view, first_row);
  cp_async_commit();
  if (thread < C::kRows) shared.info[thread] = list_row_info(p.backward, view, first_row + thread);
  const auto load = [&](int tile) {
    const auto& slots = shared.slots[tile % kSlotStages];
    const int stage = tile % C::kStages;
    load_tile<C::kThreads>(shared.key[stage], keys.first, keys.columns, keys.aligned,
                           listed_rows(keys, slots));
    load_tile<C::kThreads>(shared.value[stage], values.first, values.columns, values.aligned,
                           listed_rows(values, slots));
    cp_async_commit();
  };

  const bool has_rows = first_row + warp_id() * 16 < view.rows, per_row_mask = rows_differ(f);
  const auto scale = static_cast<float>(f.scale);
  typename C::Sums grad_q;
  zero(grad_q);
  for_each_tile<C::kColumns, C::kStages>(f, list, shared.slots, load, [&](int tile) {
    if (has_rows) add_listed_keys<C>(grad_q, shared, f, view, tile, logit_scale(f), per_row_mask);
  });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first_row + warp_id() * 16 + half * 8 + lane_id() / 4;
    if (row >= view.rows) continue;
    T* out = static_cast<T*>(p.backward.grad_q) +
             view.flat_row(f, static_cast<uint32_t>(row)) * f.head_dim;
    store_sums(out, static_cast<int>(f.head_dim), grad_q, half, scale);
  }
}

template <class C>
struct ListKeyGradShared {
  // To save registers: the first list of a head, how many heads have their own, sums.
  ListView list;
  int heads;
  typename C::Owned key, value;
  typename C::Streamed query, grad_out;
  ListRowInfo info[C::kColumns];
  float bias[C::kRows], grad_bias[C::kRows];
  int count[C::kColumns][C::kRows];          // how often a list names a key
  float times[C::kColumns][C::kRows + 4];    // the same of a row that sees the key, else 0
};

// Counts how often each of the `count` lists from shared.list + `first` on names each of the keys
// first_key, ..; whether any does. There are no more lists than rows in a tile.
template <class C>
__device__ __forceinline__ bool count_entries(ListKeyGradShared<C>& shared, int64_t first,
                                              int count, const KeyLists& lists, int first_key) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < count * C::kRows; i += C::kThreads) {
    shared.count[i / C::kRows][i % C::kRows] = 0;
  }
  __syncthreads();
  bool found = false;
  for (int list = 0; list < count; ++list) {
    const int32_t* entries = shared.list.indices + (first + list) * lists.stride_list;
    for (int64_t i = thread; i < lists.length; i += C::kThreads) {
      const int64_t key = int64_t{entries[i]} - first_key;
      if (key < 0 || key >= C::kRows) continue;
      atomicAdd(&shared.count[list][key], 1);
      found = true;
    }
  }
  return __syncthreads_or(found);
}

// How often the rows of a tile list, and see, each key.
template <class C>
__device__ __forceinline__ void look_at_keys(ListKeyGradShared<C>& shared, const AttentionParams& p,
                                             int first_key) {
  const bool per_row_mask = rows_differ(p);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < C::kColumns * C::kRows; i += C::kThreads) {
    const int column = i / C::kRows, row = i % C::kRows;
    const ListRowInfo& info = shared.info[column];
    int count = shared.bias[row] == -kInfinity ? 0 : shared.count[info.list][row];
    if (per_row_mask && count) {
      const int64_t key = int64_t{first_key} + row;
      if (!sees(p, shared.list.view.batch, info.visibility, key)) count = 0;
    }
    shared.times[column][row] = static_cast<float>(count);
  }
}

// Adds one tile of query rows: products have a key a row and a query row a column.
template <class C>
__device__ __forceinline__ void add_listing_rows(KeyGradSums<C>& sums, ListKeyGradShared<C>& shared,
                                                 const AttentionParams& p, int first_key) {
  const float scale = logit_scale(p);
  typename C::Products weight, grad;
  float bias[2] = {};
  multiply_owned<C>(weight, shared.key, shared.query, p.head_dim);
  if constexpr (C::kWantsKey) multiply_owned<C>(grad, shared.value, shared.grad_out, p.value_dim);
#pragma unroll
  for (int j = 0; j < C::kColumns / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = 8 * j + lane_id() % 4 * 2 + e;
      const float lse = shared.info[column].lse_log2, delta = shared.info[column].delta;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_id() * 16 + half * 8 + lane_id() / 4;
        const float times = shared.times[column][row];
        float& x = weight[0][j][2 * half + e];
        const float slope = cap_product(x, p);
        float logit = fmaf(x, scale, shared.bias[row]);
        if (times != 0.0f) {
          logit = with_pair_bias<typename C::T>(logit, p.pair_bias,
                                                shared.info[column].visibility.mask_offset,
                                                int64_t{first_key} + row);
        }
        x = times == 0.0f ? 0.0f : times * exp2_approx(logit - lse);
        if constexpr (C::kWantsKey) {
          float& g = grad[0][j][2 * half + e];
          g = grad_logit(x, g, delta);
          bias[half] += g;
          g = grad_product(g, slope);
        }
      }
    }
  }
  if constexpr (C::kWantsKey) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      bias[half] = warp_sum<4>(bias[half]);
      if (lane_id() % 4 != 0) continue;
      shared.grad_bias[warp_id() * 16 + half * 8 + lane_id() / 4] += bias[half];
    }
  }
  if constexpr (C::kWantsValue) {
    accumulate(sums.value, weight, shared.grad_out, static_cast<int>(p.value_dim));
  }
  if constexpr (C::kWantsKey) {
    accumulate(sums.key, grad, shared.query, static_cast<int>(p.head_dim));
  }
}

// Adds all rows that read the lists from shared.list on.
template <class C>
__device__ __forceinline__ void add_rows_of_lists(KeyGradSums<C>& sums,
                                                  ListKeyGradShared<C>& shared,
                                                  const SparseAttentionBackwardParams& p,
                                                  int first_key) {
  using T = typename C::T;
  const AttentionParams& f = p.backward.forward;
  const HeadView& view = shared.list.view;
  const int thread = static_cast<int>(threadIdx.x);
  const auto list_of = [&](uint32_t row) {
    return row / view.group / static_cast<uint32_t>(p.lists.block_q);
  };
  for (uint32_t tile = 0; int64_t{tile} * C::kColumns < view.rows; ++tile) {
    const uint32_t row = tile * C::kColumns;
    const uint32_t last = min(view.rows - row, uint32_t{C::kColumns}) - 1 + row;
    const uint32_t list = list_of(row);
    const int lists = static_cast<int>(list_of(last) - list) + 1;
    __syncthreads();
    if (!count_entries(shared, list, lists, p.lists, first_key)) continue;
    load_queries<C::kThreads>(shared.query, RowSource<T>(f.q, view.batch, 0, 0, f.head_dim), view,
                              row);
    load_queries<C::kThreads>(shared.grad_out,
                              RowSource<T>(p.backward.grad_out, view.batch, 0, 0, f.value_dim),
                              view, row);
    cp_async_commit();
    if (thread < C::kColumns) {
      ListRowInfo info = list_row_info(p.backward, view, int64_t{row} + thread);
      info.list = static_cast<int>(list_of(min(row + thread, last)) - list);
      shared.info[thread] = info;
    }
    cp_async_wait<0>();
    __syncthreads();
    look_at_keys(shared, f, first_key);
    __syncthreads();
    add_listing_rows<C>(sums, shared, f, first_key);
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    list_grad_key_kernel(const __grid_constant__ SparseAttentionBackwardParams p) {
  using T = typename C::T;
  auto& shared = shared_memory<ListKeyGradShared<C>>();
  const AttentionBackwardParams& b = p.backward;
  const AttentionParams& f = b.forward;
  const int64_t key_blocks = (f.keys + C::kRows - 1) / C::kRows;
  const HeadView key_view(f, blockIdx.x / key_blocks);
  const auto first_key = static_cast<int>(blockIdx.x % key_blocks * C::kRows);
  const int thread = static_cast<int>(threadIdx.x);
  const RowSource<T> keys(f.k, key_view.batch, key_view.head, 0, f.head_dim);
  const RowSource<T> values(f.v, key_view.batch, key_view.head, 0, f.value_dim);
  load_keys<C::kThreads>(shared.key, keys, f, key_view, first_key);
  load_keys<C::kThreads>(shared.value, values, f, key_view, first_key);
  cp_async_commit();
  if (thread < C::kRows) {
    shared.bias[thread] = key_view.key_bias_log2(f, int64_t{first_key} + thread);
    shared.grad_bias[thread] = 0.0f;
  }
  // Of the heads of the group each for itself, where each has lists of its own.
  if (thread == 0) {
    shared.heads = ListView::by_query_head(f, p.lists) ? static_cast<int>(key_view.group) : 1;
    shared.list = ListView(f, p.lists, blockIdx.x / key_blocks * shared.heads, 0);
    shared.list.view.rows = static_cast<uint32_t>(f.queries) * shared.list.view.group;
  }
  __syncthreads();

  KeyGradSums<C> sums;
  zero(sums.key);
  zero(sums.value);
  for (int h = 0; h < shared.heads; ++h) {
    add_rows_of_lists(sums, shared, p, first_key);
    __syncthreads();
    if (thread == 0) {
      ++shared.list.view.head;
      shared.list.indices += p.lists.stride_head;
    }
    __syncthreads();
  }
  HeadView view = shared.list.view;
  view.head = shared.list.key_head;
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // by four lanes, of which one brings the sum
    const int row = warp_id() * 16 + half * 8 + lane_id() / 4;
    sums.bias[half] = lane_id() % 4 == 0 ? shared.grad_bias[row] : 0.0f;
  }
  store_key_grads<C>(sums, b, view, first_key);
}

}  // namespace tokred::cuda::attention
