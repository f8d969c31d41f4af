// packed_qk_score of up to eight query rows a key head on codes as they are: a warp multiplies
// tiles of 32 keys with the queries on the tensor cores, as in code_decode.cuh.
#pragma once

#include "attention/cuda/qk_score.cuh"
#include "common/cuda/tile_ring.cuh"
#include "packed_attn/cuda/code_products.cuh"

namespace tokred::cuda::scoring {

struct CodeScoreArgs {
  QkScoreArgs score;  // p.k is the window
  PackedSide k;
  SlotTable slots;
  SideCopy copy;
};

// Copies of packed rows follow in memory.
template <class C>
struct CodeScoreShared : attention::CodeQueries<C> {
  attention::CodeScales scales[C::kWarps];
  int places[C::kWarps][C::kStages][C::kKeys];

  __device__ uint8_t* stage(const SideCopy& copy, int warp, int number) {
    return reinterpret_cast<uint8_t*>(this + 1) + (warp * C::kStages + number) * copy.bytes();
  }
};

// The query rows of a key head, each of 16 threads with eight channels.
template <class C>
__device__ __forceinline__ void load_score_queries(CodeScoreShared<C>& shared, const QkScoreArgs& a,
                                                   int64_t batch, int64_t head) {
  const int row = static_cast<int>(threadIdx.x) / C::kRowLanes;
  const int channel = static_cast<int>(threadIdx.x) % C::kRowLanes * 8;
  static_assert(C::kThreads == C::kRows * C::kRowLanes);
  const int64_t of_query =
      batch * a.query.stride_batch + (head * a.rows + row) * a.query.stride_head;
  const int64_t offset[1] = {row < a.rows ? of_query : -1};
  float x[1][8];
  load_rows(x, a.query.data, a.query_dtype, offset, channel, static_cast<int>(a.p.head_dim),
            is_aligned(a.query, a.query_dtype));
  attention::order_codes(x[0]);
  store_eight(shared.query, row, channel, x[0]);
}

// Scores of query lane / 4 with keys 8 n + 2 (lane % 4) and the next of a tile from first_key on.
template <class C>
__device__ __forceinline__ void store_scores(const QkScoreArgs& a, int64_t batch, int64_t head,
                                             const float (&sum)[1][C::kParts][4], const int* places,
                                             int64_t first_key, int64_t end) {
  const bool is_max = a.p.reduction == HeadReduction::group_max;
  const int row = lane_id() / 4;
  const int64_t of_out = (batch * a.p.heads_kv + head) * (is_max ? 1 : a.rows) + (is_max ? 0 : row);
  float* out = a.out + of_out * a.p.keys + first_key;
#pragma unroll
  for (int n = 0; n < C::kParts; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int key = 8 * n + lane_id() % 4 * 2 + e;
      float x = sum[0][n][e] * a.scale;
      if (is_max) {
        if (row >= a.rows) x = -kInfinity;
#pragma unroll
        for (int step = 4; step < kWarp; step *= 2) {
          x = max_or_nan(x, __shfl_xor_sync(kAllLanes, x, step));
        }
      }
      if (places[key] == attention::kNowhere) x = -kInfinity;
      if (first_key + key < end && row < (is_max ? 1 : a.rows)) out[key] = x;
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 4)
    code_score_kernel(const __grid_constant__ CodeScoreArgs a) {
  auto& shared = shared_memory<CodeScoreShared<C>>();
  const QkScoreParams& p = a.score.p;
  const ScoreChunk chunk(a.score);
  const int64_t tokens = attention::item_tokens(p.lengths, p.lengths_stride, chunk.batch, p.keys);
  const attention::SidePlaces side(a.k, a.slots, chunk.batch, tokens);
  const attention::CodeRows rows(a.k, a.copy, p.k, a.slots, chunk.batch, chunk.group);
  const int step = C::kWarps * C::kKeys;
  const int64_t first = chunk.first + warp_id() * C::kKeys;
  const int tiles = static_cast<int>(max((chunk.end - first + step - 1) / step, int64_t{0}));
  const auto load = [&](int tile, int number) {
    int* places = shared.places[warp_id()][number];
    const int64_t key = first + int64_t{tile} * step + lane_id();
    const bool exists =
        key < min(chunk.end, tokens) &&
        (!p.mask || p.mask[chunk.batch * p.mask_stride_batch + key * p.mask_stride_token]);
    places[lane_id()] = exists ? side.place(static_cast<int>(key)) : attention::kNowhere;
    __syncwarp();
    rows.copy(shared.stage(a.copy, warp_id(), number), places);
  };
  const auto add = [&](int tile, int number) {
    const int* places = shared.places[warp_id()][number];
    const uint8_t* stage = shared.stage(a.copy, warp_id(), number);
    auto& scales = shared.scales[warp_id()];
    const int place = places[lane_id()];
    scales.fill(rows.format(), place, rows.param_row(stage), -attention::code_base(rows.format()));
    __syncwarp();
    float sum[1][C::kParts][4];
    attention::multiply_codes<C>(sum, rows, shared, scales, stage, places,
                                 __any_sync(kAllLanes, attention::in_window(place)));
    store_scores<C>(a.score, chunk.batch, chunk.group, sum, places, first + int64_t{tile} * step,
                    chunk.end);
  };

  load_score_queries(shared, a.score, chunk.batch, chunk.group);
  __syncthreads();
  attention::sum_queries<C>(shared, a.k.packed.format);
  __syncthreads();
  attention::order_queries<C>(shared);
  __syncthreads();
  for_each_tile_of_warp<C::kStages>(tiles, C::kStages, load, add);
}

}  // namespace tokred::cuda::scoring
