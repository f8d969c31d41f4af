// packed_attention: as attention/cuda/decode.cuh, but a warp copies packed rows, and unpacks the
// keys of a tile, then its values, for the tensor cores.
#pragma once

#include "packed_attn/cuda/query_codes.cuh"
#include "packed_attn/cuda/tokens.cuh"

namespace tokred::cuda::attention {

// What each of the warps has follows in memory, with the copies of its stages; then what the warps
// have summed.
template <class C>
struct PackedShared {
  struct Warp {
    union {
      StreamedTile<typename C::Key, C::kKeys, C::kDim> key;
      StreamedTile<typename C::T, C::kKeys, C::kValueDim> value;  // or codes
    };
    GroupScales<C::kDim> scales;
  };
  using Sums = float[C::kWarps][C::kRows][C::kValueDim];

  Tile<typename C::Key, C::kRows, C::kDim> query;
  float query_sum[C::kRows][C::kDim / 16];             // of the groups of keys
  uint2 k_codes[C::kRowLanes], v_codes[C::kRowLanes];  // CodeReader::positions() of a row's lanes
  RowVisibility visibility[C::kRows];
  float top[C::kWarps][C::kRows], sum[C::kWarps][C::kRows];

  __device__ Sums& out() { return *reinterpret_cast<Sums*>(this + 1); }
  __device__ Warp& warp() { return reinterpret_cast<Warp*>(this + 1)[warp_id()]; }
  // The copies of a stage of this warp; then come the tokens that they are of.
  __device__ uint8_t* stage(const DecodeTiles& tiles, const PackedCopy& copy, int number) {
    auto* first = reinterpret_cast<uint8_t*>(reinterpret_cast<Warp*>(this + 1) + tiles.warps);
    return first + (warp_id() * tiles.stages + number) *
                       (static_cast<int>(sizeof(TilePlaces)) + copy.bytes());
  }
  __device__ static TilePlaces& places(uint8_t* stage, const PackedCopy& copy) {
    return *reinterpret_cast<TilePlaces*>(stage + copy.bytes());
  }
};

// Where the codes of each lane's channels lie; lanes beyond a row have those of its beginning.
template <class C>
__device__ __forceinline__ void place_codes(PackedShared<C>& shared, const PackedDecodeParams& p) {
  const int lane = static_cast<int>(threadIdx.x);
  if (lane >= C::kRowLanes) return;
  const auto places = [&](const PackFormat& f) {
    return packing::CodeReader(f, 8 * lane < f.head_dim ? 8 * lane : 0).positions();
  };
  shared.k_codes[lane] = places(p.k.packed.format);
  shared.v_codes[lane] = places(p.v.packed.format);
}

// The query rows of a tile, rotated where the keys are, and their visibility.
template <class C, class Shared>
__device__ __forceinline__ void load_packed_queries(Shared& shared, const PackedDecodeParams& p,
                                                    const RowTile& row_tile, int64_t tokens) {
  using T = typename C::T;
  const AttentionParams& a = p.decode.sparse.attention;
  const HeadView& view = row_tile.list.view;
  const int thread = static_cast<int>(threadIdx.x), channel = thread % C::kRowLanes * 8;
  const bool aligned = is_aligned<T>(a.q);
  const int at_once = static_cast<int>(blockDim.x) / C::kRowLanes;
  for (int r = thread / C::kRowLanes; r < C::kRows; r += at_once) {
    const uint32_t row = row_tile.first_row + static_cast<uint32_t>(r);
    const T* source[1] = {nullptr};
    if (row < view.rows) {
      source[0] = static_cast<const T*>(a.q.data) + view.batch * a.q.stride_batch +
                  view.query_head(row) * a.q.stride_head + view.query(row) * a.q.stride_token;
    }
    float x[1][8];
    load_rows(x, source, channel, static_cast<int>(a.head_dim), aligned);
    if (p.k.packed.format.rotated) packing::rotate_row(x[0], a.head_dim);
    keep_finite<T>(x[0]);
    if (p.key_codes<T>()) order_codes(x[0]);
    uint32_t pairs[4][Operand<typename C::Key>::kPlanes];
#pragma unroll
    for (int i = 0; i < 4; ++i) split_pair<typename C::Key>(x[0][2 * i], x[0][2 * i + 1], pairs[i]);
#pragma unroll
    for (int plane = 0; plane < Operand<typename C::Key>::kPlanes; ++plane) {
      store_chunk(&shared.query.plane[plane][r][channel],
                  {{pairs[0][plane], pairs[1][plane], pairs[2][plane], pairs[3][plane]}});
    }
  }
  if (thread >= C::kRows) return;
  const uint32_t row = min(row_tile.first_row + static_cast<uint32_t>(thread), view.rows - 1);
  RowVisibility visibility = row_visibility(a, view, row);
  visibility.last_key =
      static_cast<int>(a.causal ? view.query(row) + tokens - a.queries : tokens - 1);
  shared.visibility[thread] = visibility;
}

// The products of the query rows with a tile of keys.
template <class C>
__device__ __forceinline__ void multiply_keys(float (&out)[1][C::kKeys / 8][4],
                                              SideTiles<C, C::kDim> side, PackedShared<C>& shared,
                                              const PackedDecodeParams& p, const uint8_t* stage,
                                              const int* places) {
  auto& warp = shared.warp();
  if constexpr (Operand<typename C::T>::kPlanes == 1) {
    if (p.key_codes<typename C::T>()) {
      const PackFormat& f = p.k.packed.format;
      side.unpack_codes(warp.value, warp.scales, stage, places);
      __syncwarp();
      return multiply_codes(out, warp.value, warp.scales, shared.query, shared.query_sum,
                            f.rotated ? 2 : 1, static_cast<int>(f.group_size),
                            static_cast<int>(f.head_dim));
    }
  }
  side.unpack(warp.key, stage, places);
  __syncwarp();
  multiply_by_rows<C::kDim>(out, warp.key, [&](int column, int) {
    Left<typename C::Key> left;
    load_left(left, shared.query, 0, 16 * column);
    return left;
  });
}

// Adds weights . a tile of values.
template <class C>
__device__ __forceinline__ void accumulate_values(ForwardState<C>& state,
                                                  const float (&weights)[1][C::kKeys / 8][4],
                                                  SideTiles<C, C::kValueDim> side,
                                                  PackedShared<C>& shared,
                                                  const PackedDecodeParams& p, const uint8_t* stage,
                                                  const int* places) {
  auto& warp = shared.warp();
  if constexpr (std::is_same_v<typename C::T, bf16>) {
    if (p.value_codes<bf16>()) {
      const PackFormat& f = p.v.packed.format;
      side.unpack_codes(warp.value, warp.scales, stage, places);
      __syncwarp();
      return accumulate_codes(state.out, weights, warp.value, warp.scales, has_offset(f.scheme),
                              static_cast<int>(f.group_size), static_cast<int>(f.head_dim));
    }
  }
  side.unpack(warp.value, stage, places);
  __syncwarp();
  accumulate(state.out, weights, warp.value);
}

// The sums of the warps become the result of the block; rows of rotated values are rotated back,
// unless rotates_later(). `ordered`: their columns are those of order_codes().
template <class C, class Shared>
__device__ __forceinline__ void finish_rows(Shared& shared, const PackedDecodeParams& p,
                                            const RowTile& row_tile, bool ordered) {
  constexpr int kRowLanes = C::kValueDim / 8;
  const int thread = static_cast<int>(threadIdx.x), column = thread % kRowLanes * 8;
  const int first = static_cast<int>(blockIdx.z) * C::kValueDim + column;
  const AttentionParams& a = p.decode.sparse.attention;
  const bool rotated =
      p.v.packed.format.rotated && hadamard_size(a.value_dim) <= int64_t{C::kValueDim};
  const int at_once = static_cast<int>(blockDim.x) / kRowLanes;
  for (int row = thread / kRowLanes; row < C::kRows; row += at_once) {
    const WarpWeights<C> weights(shared, row);
    float out[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = weights.add(shared.out(), row, column + i);
    if (ordered) order_codes(out);
    if (rotated) packing::rotate_row(out, a.value_dim);
    if (row >= row_tile.rows || first >= a.value_dim) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      store_split<typename C::T>(p.decode, row_tile, row, first + i, weights.top, weights.sum,
                                 out[i]);
    }
  }
}

// The rows of a block, and which tokens of its split this warp has: tiles of kKeys.
template <int kKeys>
struct PackedSplit {
  const RowTile row_tile;
  const int64_t tokens, end, step, first;
  const int tiles;

  __device__ PackedSplit(const PackedDecodeParams& p, int warps)
      : row_tile(p.decode, p.decode.first_tile_of_launch + blockIdx.x),
        tokens(item_tokens(p.lengths, p.lengths_stride, list().view.batch,
                           p.decode.sparse.attention.keys)),
        end(min((blockIdx.y + 1) * p.decode.split_length, list().indices ? list().length : tokens)),
        step(warps * kKeys), first(blockIdx.y * p.decode.split_length + warp_id() * kKeys),
        tiles(static_cast<int>(max((end - first + step - 1) / step, int64_t{0}))) {}

  __device__ __forceinline__ const ListView& list() const { return row_tile.list; }
  // Of lane i token i of the tiles.
  __device__ __forceinline__ TokenStream stream(const PackedDecodeParams& p) const {
    return {p, list(), tokens, lane_id() < kKeys ? first + lane_id() : end, step, end};
  }
};

// A lane's token of a tile.
template <class Places>
__device__ __forceinline__ void keep_token(Places& places, const TokenInfo& info) {
  places.key[lane_id()] = info.key;
  places.bias[lane_id()] = info.bias;
  places.k[lane_id()] = info.k;
  places.v[lane_id()] = info.v;
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    packed_decode_kernel(const __grid_constant__ PackedDecodeParams p) {
  using Shared = PackedShared<C>;
  auto& shared = shared_memory<Shared>();
  const AttentionParams& a = p.decode.sparse.attention;
  const PackedSplit<C::kKeys> split(p, p.decode.tiles.warps);
  if (split.row_tile.rows == 0) return;
  const ListView& list = split.list();
  TokenStream stream = split.stream(p);
  const int first_column = static_cast<int>(blockIdx.z) * C::kValueDim;
  // Made again for every tile, so that they hold no registers in between.
  const auto k_side = [&] {
    return SideTiles<C, C::kDim>(p.k, a.k, p.slots, optimization_barrier(list.view.batch),
                                 optimization_barrier(list.key_head), 0, shared.k_codes,
                                 p.copy.k_codes, p.copy.k_params);
  };
  const auto v_side = [&] {
    return SideTiles<C, C::kValueDim>(p.v, a.v, p.slots, optimization_barrier(list.view.batch),
                                      optimization_barrier(list.key_head), first_column,
                                      shared.v_codes, p.copy.v_codes, p.copy.v_params);
  };
  const int v_first = C::kKeys * (p.copy.k_codes + p.copy.k_params);

  place_codes(shared, p);
  load_packed_queries<C>(shared, p, split.row_tile, split.tokens);
  __syncthreads();
  if (p.key_codes<typename C::T>()) sum_queries<C>(shared, p.k.packed.format);
  __syncthreads();

  ForwardState<C> state;
  start(state);
  const float scale = logit_scale(a);
  const bool per_row_mask = rows_differ(a);
  const auto load = [&](int, int number) {
    uint8_t* stage = shared.stage(p.decode.tiles, p.copy, number);
    TilePlaces& places = Shared::places(stage, p.copy);
    const TokenInfo info = stream.next();
    if (lane_id() < C::kKeys) keep_token(places, info);
    __syncwarp();
    k_side().copy(stage, places.k);
    v_side().copy(stage + v_first, places.v);
  };
  const auto add = [&](int, int number) {
    uint8_t* stage = shared.stage(p.decode.tiles, p.copy, number);
    const TilePlaces& places = Shared::places(stage, p.copy);
    float weights[1][C::kKeys / 8][4];
    multiply_keys(weights, k_side(), shared, p, stage, places.k);
    __syncwarp();
    list_logits<typename C::T>(weights, places, shared.visibility, a, list.view.batch, scale,
                               per_row_mask, [](int, int h) { return h * 8 + lane_id() / 4; });
    to_weights(weights, state);
    accumulate_values(state, weights, v_side(), shared, p, stage + v_first, places.v);
  };
  for_each_tile_of_warp<C::kStages>(split.tiles, p.decode.tiles.stages, load, add);
  __syncthreads();
  keep_warp_state(state, shared);
  __syncthreads();
  const int64_t row_tile = optimization_barrier(p.decode.first_tile_of_launch + blockIdx.x);
  finish_rows<C>(shared, p, RowTile(p.decode, row_tile), p.value_codes<typename C::T>());
}

}  // namespace tokred::cuda::attention
