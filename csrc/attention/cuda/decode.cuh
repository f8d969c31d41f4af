// Attention of few query rows over many keys (Flash-Decoding): the keys of a row are split over
// blocks, each of which sums its split with an online softmax; a second kernel adds the splits up.
// Every warp streams tiles of its own, with no barrier but at the end, so that the copies never
// pause.
#pragma once

#include "attention/cuda/forward.cuh"
#include "attention/cuda/keys.cuh"
#include "common/cuda/block.cuh"
#include "common/cuda/raw_tile.cuh"
#include "common/cuda/tile_ring.cuh"

namespace tokred::cuda::attention {

struct DecodeParams {
  SparseAttentionParams sparse;  // null indices: dense attention
  int64_t first_tile_of_launch;
  int64_t list_tiles, tile_rows, split_length, splits;
  DecodeTiles tiles;

  // Partial results, by row tile of the launch, split and row.
  __device__ float* partial_out(int64_t slot) const {
    return static_cast<float*>(sparse.attention.workspace) + slot * sparse.attention.value_dim;
  }
  __device__ float* partial_state(int64_t row_tiles, int64_t slot) const {  // largest logit, sum
    return partial_out(row_tiles * splits * tile_rows) + 2 * slot;
  }
};

template <class StorageType, int kHeadDim>
struct DecodeConfig {
  using T = StorageType;
  using Key = T;  // the type in which queries and keys are multiplied
  static constexpr int kDim = kHeadDim;
  static constexpr int kValueDim = forward_value_dim(kDim, Operand<T>::kPlanes == 3);
  // The largest tiles; a device of less shared memory gets fewer warps or stages.
  static constexpr DecodeTiles kTiles = max_decode_tiles(kDim, Operand<T>::kPlanes == 3);
  static constexpr int kWarps = kTiles.warps, kStages = kTiles.stages;
  static constexpr int kThreads = kTiles.threads();
  static constexpr int kRowTiles = 1, kRows = kDecodeRows, kKeys = kDecodeKeys;
  static constexpr bool kQueryInRegisters = Operand<T>::kPlanes == 1 && kDim <= 128;
};

// For 16-bit keys that are rotated to the positions of their entries in the list.
template <class StorageType, int kHeadDim>
struct RotatedDecodeConfig : DecodeConfig<float, kHeadDim> {
  using T = StorageType;
  using Key = Split<T>;
};

// The stages of the warps follow in memory, as DecodeTiles has them; then what the warps have
// summed.
template <class C>
struct DecodeShared {
  struct Stage {
    StreamedTile<typename C::Key, C::kKeys, C::kDim> key;
    StreamedTile<typename C::T, C::kKeys, C::kValueDim> value;
    KeySlots<C::kKeys> slots;
  };
  using Sums = float[C::kWarps][C::kRows][C::kValueDim];

  Tile<typename C::Key, C::kRows, C::kDim> query;
  RowVisibility visibility[C::kRows];
  float top[C::kWarps][C::kRows], sum[C::kWarps][C::kRows];

  __device__ Stage* stages(int first) { return reinterpret_cast<Stage*>(this + 1) + first; }
  __device__ Sums& out() { return *reinterpret_cast<Sums*>(this + 1); }
};

// Up to kDecodeRows rows of one list.
struct RowTile {
  ListView list;
  uint32_t first_row;
  int rows;

  // The last list of a head may have fewer rows than the others, and even none for a tile.
  __device__ RowTile(const DecodeParams& p, int64_t index)
      : list(p.sparse.attention, p.sparse.lists, index / p.list_tiles),
        first_row(list.first_row + static_cast<uint32_t>(index % p.list_tiles * kDecodeRows)) {
    const uint32_t end = list.view.rows;
    rows = first_row < end ? static_cast<int>(min(end - first_row, uint32_t{kDecodeRows})) : 0;
  }
};

template <class C>
struct DecodeBlock {
  using T = typename C::T;
  const SparseAttentionParams& p;
  const RowTile& row_tile;
  const RowSource<T> keys, values;

  __device__ DecodeBlock(const SparseAttentionParams& p, const RowTile& row_tile)
      : p(p), row_tile(row_tile), keys(p.attention.k, row_tile.list.view.batch,
                                       row_tile.list.key_head, 0, p.attention.head_dim),
        values(p.attention.v, row_tile.list.view.batch, row_tile.list.key_head,
               blockIdx.z * int64_t{C::kValueDim}, p.attention.value_dim) {}

  __device__ __forceinline__ void load_rows(DecodeShared<C>& shared) const {
    const HeadView& view = row_tile.list.view;
    const RowSource<T> queries(p.attention.q, view.batch, 0, 0, p.attention.head_dim);
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    for (int i = thread; i < C::kThreads; i += threads) {
      load_queries<C::kThreads>(shared.query, queries, view, row_tile.first_row, i);
    }
    cp_async_commit();
    if (thread >= C::kRows) return;
    shared.visibility[thread] =
        row_visibility(p.attention, view, min(row_tile.first_row + thread, view.rows - 1));
  }

  // Starts this warp's copies of a tile, whose keys its first lanes bring.
  __device__ __forceinline__ void load_tile_of_warp(typename DecodeShared<C>::Stage& stage,
                                                    const KeyInfo& info, int64_t position) const {
    if (lane_id() < C::kKeys) {
      stage.slots.key[lane_id()] = info.key;
      stage.slots.bias[lane_id()] = info.bias;
    }
    __syncwarp();
    load_listed_keys<C, kWarp>(stage.key, keys, p.rotation, position,
                               listed_rows(keys, stage.slots), lane_id());
    load_tile<kWarp>(stage.value, values.first, values.columns, values.aligned,
                     listed_rows(values, stage.slots), lane_id());
  }
};

// Column `column` of a row, and with column 0 its lse, from sums in units of 2^top.
template <class T>
__device__ __forceinline__ void store_result(const AttentionParams& p, const HeadView& view,
                                             uint32_t row, int column, float top, float sum,
                                             float out) {
  T* result = static_cast<T*>(p.out) + view.batch * p.out_stride_batch +
              view.query_head(row) * p.out_stride_head + view.query(row) * p.out_stride_token;
  result[column] = from_float<T>(sum == 0.0f ? 0.0f : out / sum);
  if (column == 0) {
    static_cast<float*>(p.lse)[view.flat_row(p, row)] =
        sum == 0.0f ? -kInfinity : (top + log2f(sum)) * kLn2;
  }
}

// Writes this warp's sums to shared memory, for the whole block to add up.
template <class C, class Shared>
__device__ __forceinline__ void keep_warp_state(const ForwardState<C>& state, Shared& shared) {
  auto& out_of_warp = shared.out()[warp_id()];
  const int warp = warp_id();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = h * 8 + lane_id() / 4;
    const float sum = warp_sum<4>(state.sum[0][h]);
    shared.top[warp][row] = state.top[0][h];
    shared.sum[warp][row] = sum;
#pragma unroll
    for (int j = 0; j < C::kValueDim / 8; ++j) {
      float* out = &out_of_warp[row][8 * j + lane_id() % 4 * 2];
      out[0] = state.out[0][j][2 * h];
      out[1] = state.out[0][j][2 * h + 1];
    }
  }
}

// The factor exp2(top of the warp - top of all) of each warp's sums of a row, and the total sum.
template <class C>
struct WarpWeights {
  int warps = static_cast<int>(blockDim.x) / kWarp;
  float of[C::kWarps], top = -kInfinity, sum = 0.0f;

  template <class Shared>
  __device__ __forceinline__ WarpWeights(const Shared& shared, int row) {
#pragma unroll
    for (int w = 0; w < C::kWarps; ++w) {
      if (w < warps) top = fmaxf(top, shared.top[w][row]);
    }
    const float base = top == -kInfinity ? 0.0f : top;
#pragma unroll
    for (int w = 0; w < C::kWarps; ++w) {
      of[w] = 0.0f;
      if (w >= warps) continue;
      of[w] = exp2_approx(shared.top[w][row] - base);
      sum = fmaf(of[w], shared.sum[w][row], sum);
    }
  }

  // sums[w][row][column] of the warps.
  template <class Sums>
  __device__ __forceinline__ float add(const Sums& sums, int row, int column) const {
    float out = 0.0f;
#pragma unroll
    for (int w = 0; w < C::kWarps; ++w) {
      if (w < warps) out = fmaf(of[w], sums[w][row][column], out);
    }
    return out;
  }
};

// Column `column` of a row of this block: the result itself, or that of its split.
template <class T>
__device__ __forceinline__ void store_split(const DecodeParams& p, const RowTile& row_tile, int row,
                                            int column, float top, float sum, float out) {
  if (p.splits == 1) {
    return store_result<T>(p.sparse.attention, row_tile.list.view, row_tile.first_row + row, column,
                           top, sum, out);
  }
  const int64_t slot = (blockIdx.x * p.splits + blockIdx.y) * p.tile_rows + row;
  p.partial_out(slot)[column] = out;
  if (column > 0) return;
  float* partial = p.partial_state(gridDim.x, slot);
  partial[0] = top;
  partial[1] = sum;
}

// The sums of the warps become the result of the block.
template <class C>
__device__ __forceinline__ void finish_split(const ForwardState<C>& state, DecodeShared<C>& shared,
                                             const DecodeParams& p, const RowTile& row_tile) {
  __syncthreads();
  keep_warp_state(state, shared);
  __syncthreads();
  const int first_column = static_cast<int>(blockIdx.z) * C::kValueDim;
  const int value_dim = static_cast<int>(p.sparse.attention.value_dim);
  const int columns = min(value_dim - first_column, C::kValueDim);
  const int threads = static_cast<int>(blockDim.x);
  for (int i = static_cast<int>(threadIdx.x); i < row_tile.rows * columns; i += threads) {
    const int row = i / columns, column = i % columns;
    const WarpWeights<C> weights(shared, row);
    store_split<typename C::T>(p, row_tile, row, first_column + column, weights.top, weights.sum,
                               weights.add(shared.out(), row, column));
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeParams p) {
  auto& shared = shared_memory<DecodeShared<C>>();
  const AttentionParams& a = p.sparse.attention;
  const RowTile row_tile(p, p.first_tile_of_launch + blockIdx.x);
  if (row_tile.rows == 0) return;
  const DecodeBlock<C> block(p.sparse, row_tile);

  const int64_t first = blockIdx.y * p.split_length;
  const int64_t end = min(first + p.split_length, row_tile.list.length);
  const int64_t step = p.tiles.warps * C::kKeys, mine = first + warp_id() * C::kKeys;
  const int tiles = static_cast<int>(max((end - mine + step - 1) / step, int64_t{0}));
  KeyStream stream(a, row_tile.list, lane_id() < C::kKeys ? mine + lane_id() : end, step, end);
  Ring ring{p.tiles.stages};
  auto* const stages = shared.stages(warp_id() * ring.stages);
  const auto load = [&](int tile, int stage) {
    if (tile < tiles) block.load_tile_of_warp(stages[stage], stream.next(), mine + tile * step);
    cp_async_commit();
  };

  block.load_rows(shared);
#pragma unroll 1
  for (int tile = 0; tile < ring.stages - 1; ++tile) load(tile, tile);
  wait_for_stage<C::kStages + 1>(ring.stages + 1);  // the queries
  __syncthreads();

  ForwardState<C> state;
  start(state);
  Left<typename C::Key> query[C::kQueryInRegisters ? C::kDim / 16 : 1];
  if constexpr (C::kQueryInRegisters) {
#pragma unroll
    for (int k = 0; k < C::kDim / 16; ++k) load_left(query[k], shared.query, 0, 16 * k);
  }
  const float scale = logit_scale(a);
  const bool per_row_mask = rows_differ(a);
  for (int tile = 0; tile < tiles; ++tile) {
    wait_for_stage<C::kStages>(ring.stages);
    __syncwarp();  // all lanes have their copies, and are done with the tile before
    load(tile + ring.stages - 1, ring.before());
    const auto& stage = stages[ring.at];
    ring.advance();
    float weights[1][C::kKeys / 8][4];
    multiply_by_rows<C::kDim>(weights, stage.key, [&](int k, int) {
      if constexpr (C::kQueryInRegisters) return query[k];
      Left<typename C::Key> left;
      load_left(left, shared.query, 0, 16 * k);
      return left;
    });
    list_logits<typename C::T>(weights, stage.slots, shared.visibility, a, row_tile.list.view.batch,
                               scale, per_row_mask,
                               [](int, int h) { return h * 8 + lane_id() / 4; });
    to_weights(weights, state);
    accumulate(state.out, weights, stage.value);
  }
  finish_split(state, shared, p, row_tile);
}

}  // namespace tokred::cuda::attention
