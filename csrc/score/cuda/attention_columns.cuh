// attention_columns: a block owns keys of one query head and streams its queries. Lanes own the
// same keys to the end, so that every sum has one owner and a fixed order.
#pragma once

#include "score/cuda/attention_tile.cuh"
#include "score/cuda/moments.cuh"

namespace tokred::cuda::scoring {

// A streamed query. One that sees nothing has last_key -1.
struct ColumnQuery {
  int64_t mask_offset;
  float lse_log2, weight;
  int last_key;
};

template <class C>
struct ColumnsShared {
  typename C::Owned key;
  typename C::Streamed query[C::kStages];
  ColumnQuery info[C::kStages][C::kColumns];
  float bias[C::kRows];  // in units of log 2; -inf for a key that does not exist
};

__device__ __forceinline__ ColumnQuery column_query(const AttentionColumnsParams& p,
                                                    const KeyView& view, int64_t head,
                                                    int64_t query) {
  const AttentionParams& a = p.attention;
  if (query >= a.queries) return {0, 0.0f, 0.0f, -1};
  const float lse =
      static_cast<const float*>(a.lse)[(view.batch * a.heads_q + head) * a.queries + query];
  const float weight = p.weight
                           ? p.weight[view.batch * p.weight_stride_batch +
                                      head * p.weight_stride_head + query * p.weight_stride_query]
                           : 1.0f;
  return {view.mask_offset(head, query), lse * kLog2E, weight,
          lse == -kInfinity ? -1 : view.last_key(query)};
}

// A lane's statistics of one key: its share of the queries so far.
struct ColumnState {
  float sum = 0.0f, max_value = -kInfinity;
  Moments moments;

  // value(0) .. value(kCount - 1) for this lane's queries of a tile; valid(i) says which exist.
  // Values of the others are 0.
  template <int kCount, class Value, class Valid>
  __device__ __forceinline__ void add(ColumnReduction reduction, Value value, Valid valid) {
    if (reduction == ColumnReduction::max) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (valid(i)) max_value = max_or_nan(max_value, value(i));
      }
      return;
    }
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) total += value(i);
    sum += total;
    if (reduction != ColumnReduction::variance) return;
    float count = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) count += valid(i) ? 1.0f : 0.0f;
    if (count == 0.0f) return;
    Moments part{count, total / count, 0.0f};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float distance = value(i) - part.mean;
      if (valid(i)) part.squares = fmaf(distance, distance, part.squares);
    }
    moments.merge(part);
  }

  // Queries that were skipped because they do not see the key.
  __device__ __forceinline__ void add_zeros(int64_t count) {
    if (count == 0) return;
    max_value = max_or_nan(max_value, 0.0f);
    moments.merge({static_cast<float>(count), 0.0f, 0.0f});
  }

  // The reduction over the queries of four lanes, in the first of them.
  __device__ __forceinline__ float result(ColumnReduction reduction, int64_t queries) {
    const auto number = static_cast<float>(queries);
    moments.merge_lanes<4>();
    const float total = warp_sum<4>(sum);
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      max_value = max_or_nan(max_value, __shfl_xor_sync(kAllLanes, max_value, step));
    }
    if (queries == 0) return 0.0f;
    switch (reduction) {
      case ColumnReduction::sum: return total;
      case ColumnReduction::mean: return total / number;
      case ColumnReduction::max: return max_value;
      default: return queries > 1 ? moments.squares / (number - 1.0f) : 0.0f;
    }
  }
};

// Adds one tile of queries.
template <class C>
__device__ __forceinline__ void add_queries(ColumnState (&state)[C::kRowTiles][2],
                                            const ColumnsShared<C>& shared,
                                            const AttentionColumnsParams& p, const KeyView& view,
                                            int64_t first_key, int64_t tile) {
  const AttentionParams& a = p.attention;
  const int stage = static_cast<int>(tile % C::kStages);
  const auto scale = static_cast<float>(a.scale) * kLog2E;
  const int64_t left = a.queries - tile * C::kColumns;
  typename C::Products value;
  multiply_owned<C>(value, shared.key, shared.query[stage]);
#pragma unroll
  for (int j = 0; j < C::kColumns / 4; ++j) {
    const ColumnQuery info = shared.info[stage][streamed_row(j / 2, j % 2)];
#pragma unroll
    for (int i = 0; i < 2 * C::kRowTiles; ++i) {
      const int half = i % 2, owned = owned_row<C>(i / 2, half);
      const int64_t key = first_key + owned;
      const float bias = shared.bias[owned];
      float& x = value[i / 2][j / 2][2 * half + j % 2];
      const float logit = fmaf(x, scale, bias);
      const bool visible = view.sees(info.mask_offset, info.last_key, key, bias);
      x = visible ? info.weight * exp2_approx(logit - info.lse_log2) : 0.0f;
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * C::kRowTiles; ++i) {
    state[i / 2][i % 2].template add<C::kColumns / 4>(
        p.reduction, [&](int j) { return value[i / 2][j / 2][2 * (i % 2) + j % 2]; },
        [&](int j) { return streamed_row(j / 2, j % 2) < left; });
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 2)
    attention_columns_kernel(const __grid_constant__ AttentionColumnsParams p) {
  using T = typename C::T;
  auto& shared = shared_memory<ColumnsShared<C>>();
  const AttentionParams& a = p.attention;
  const int64_t key_blocks = (a.keys + C::kRows - 1) / C::kRows;
  const int64_t item = blockIdx.x / key_blocks, head = item % a.heads_q;
  const KeyView view(a, item / (a.heads_q / a.heads_kv));
  const int64_t first_key = blockIdx.x % key_blocks * C::kRows;
  // Under the causal rule the first query that sees a key of this block.
  const int64_t first_query = a.causal ? max(first_key - (a.keys - a.queries), int64_t{0}) : 0;
  const int64_t first_tile = first_query / C::kColumns;
  const T* queries =
      static_cast<const T*>(a.q.data) + view.batch * a.q.stride_batch + head * a.q.stride_head;
  const bool aligned = is_aligned<T>(a.q);
  const int thread = static_cast<int>(threadIdx.x);

  const auto load = [&](int64_t tile) {
    const int stage = static_cast<int>(tile % C::kStages);
    const int64_t first = tile * C::kColumns;
    load_tile<C::kThreads>(
        shared.query[stage], queries, static_cast<int>(a.head_dim), aligned, [&](int r) {
          return first + r < a.queries ? queries + (first + r) * a.q.stride_token : nullptr;
        });
    cp_async_commit();
    if (thread < C::kColumns) {
      shared.info[stage][thread] = column_query(p, view, head, first + thread);
    }
  };
  view.load_keys<C::kThreads>(shared.key, first_key);
  for (int r = thread; r < C::kRows; r += C::kThreads) {
    shared.bias[r] = kLog2E * view.bias(first_key + r);
  }
  ColumnState state[C::kRowTiles][2];
  stream<C>(first_tile, (a.queries + C::kColumns - 1) / C::kColumns, load,
            [&](int64_t tile) { add_queries<C>(state, shared, p, view, first_key, tile); });
#pragma unroll
  for (int i = 0; i < 2 * C::kRowTiles; ++i) {
    ColumnState& s = state[i / 2][i % 2];
    if (lane_id() % 4 == 0) s.add_zeros(first_tile * C::kColumns);
    const float result = s.result(p.reduction, a.queries);
    const int64_t key = first_key + owned_row<C>(i / 2, i % 2);
    if (lane_id() % 4 != 0 || key >= a.keys) continue;
    p.columns[(view.batch * a.heads_q + head) * a.keys + key] = fmaf(p.factor, result, p.offset);
  }
}

}  // namespace tokred::cuda::scoring
