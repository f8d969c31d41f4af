// Producers of the wgmma kernel: a warpgroup copies the tiles that some row of the block sees to a
// ring of slots in shared memory, which the consumers give back.
//
// Tiles are fetched by cp.async, which writes them swizzled, as wgmma reads them, and not by TMA:
// any strides and key masks are one case then, keys that do not exist come as zeros whatever they
// hold, and no tensor map has to be made on the host. It costs a tenth of the block's instructions.
#pragma once

#include "attention/cuda/forward.cuh"
#include "common/cuda/block.cuh"
#include "common/cuda/ptx_sm90.cuh"

namespace tokred::cuda::attention {

template <class StorageType, int kHeadDim, bool kHidesPairs>
struct WgmmaConfig {
  using T = StorageType;
  static constexpr int kDim = kHeadDim, kValueDim = kHeadDim;
  static constexpr bool kSparse = kHidesPairs;
  static constexpr AttentionTiles kTiles = wgmma_tiles(kDim);
  static constexpr int kRows = kTiles.rows(), kRowTiles = kTiles.row_tiles;
  static constexpr int kKeys = kTiles.columns, kStages = kTiles.stages;
  static constexpr int kConsumers = kTiles.threads(), kProducers = kWgmmaProducers;
  static constexpr int kThreads = kConsumers + kProducers;
};

// Shared memory ----------------------------------------------------------------------------------

// Rows in panels of 64 elements, swizzled (see matrix_descriptor).
template <class T, int kRowCount, int kHeadDim>
struct SwizzledTile {
  static constexpr int kRows = kRowCount, kPanels = kHeadDim / 64;
  T panel[kPanels][kRows][64];
};

// The part of a tile that one of kThreads threads copies: 8 elements of each panel of every
// kStep-th row.
template <int kThreads>
struct SwizzledPart {
  static constexpr int kStep = kThreads / 8;
  static_assert(kStep % 8 == 0);
  const int row, column, swizzled;

  __device__ explicit SwizzledPart(int thread)
      : row(thread / 8), column(thread % 8 * 8), swizzled((thread % 8 ^ row % 8) * 8) {}
};

// As load_tile, for whole rows at multiples of 16 bytes; and for rows that all exist, from `first`
// on and `stride` apart, which takes a tenth of the instructions.
template <int kThreads, class T, int kRows, int kDim, class Row>
__device__ __forceinline__ void fill(SwizzledTile<T, kRows, kDim>& tile, const T* anywhere,
                                     int thread, Row row) {
  const SwizzledPart<kThreads> part(thread);
#pragma unroll 2
  for (int r = part.row; r < kRows; r += part.kStep) {
    const T* source = row(r);
#pragma unroll
    for (int panel = 0; panel < kDim / 64; ++panel) {
      cp_async_16(&tile.panel[panel][r][part.swizzled],
                  source ? source + 64 * panel + part.column : anywhere, source ? 16 : 0);
    }
  }
}
template <int kThreads, class T, int kRows, int kDim>
__device__ __forceinline__ void fill(SwizzledTile<T, kRows, kDim>& tile, const T* first, int thread,
                                     int64_t stride) {
  const SwizzledPart<kThreads> part(thread);
  const T* source = first + part.row * stride + part.column;
#pragma unroll
  for (int i = 0; i < kRows / part.kStep; ++i, source += part.kStep * stride) {
#pragma unroll
    for (int panel = 0; panel < kDim / 64; ++panel) {
      cp_async_16(&tile.panel[panel][part.row + i * part.kStep][part.swizzled],
                  source + 64 * panel);
    }
  }
}

template <class C>
struct WgmmaShared {
  SwizzledTile<typename C::T, C::kRows, C::kDim> query;
  SwizzledTile<typename C::T, C::kKeys, C::kDim> key[C::kStages], value[C::kStages];
  int64_t mask_offset[C::kRows];
  Barrier query_full;
  Barrier key_full[C::kStages], key_empty[C::kStages];
  Barrier value_full[C::kStages], value_empty[C::kStages];
  float bias[C::kStages][C::kKeys];
  int last_key[C::kRows];
  uint32_t visit[C::kStages];  // of the tile in `key`

  // Every thread that loads arrives twice: when its copies are there, and when its stores are.
  __device__ void init() {
    barrier_init(query_full, 2 * C::kConsumers);
    for (int i = 0; i < C::kStages; ++i) {
      barrier_init(key_full[i], 2 * C::kProducers);
      barrier_init(value_full[i], C::kProducers);
      barrier_init(key_empty[i], C::kConsumers / kWarp);
      barrier_init(value_empty[i], C::kConsumers / kWarp);
    }
  }
};

// The dynamic shared memory from the first multiple of kWgmmaAlignment on.
template <class C>
__device__ __forceinline__ WgmmaShared<C>& wgmma_shared_memory() {
  char* start = reinterpret_cast<char*>(&shared_memory<uint4>());
  start += (0u - shared_address(start)) % kWgmmaAlignment;
  return *reinterpret_cast<WgmmaShared<C>*>(start);
}

// A slot in the ring of tiles. Rounds through one stage have parities 0, 1, 0, ...
template <class C>
struct RingSlot {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage < C::kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// Producers --------------------------------------------------------------------------------------

// The number of a tile that a block visits, and how much of it each of the two warpgroups sees. 0:
// no tile is left.
struct Visit {
  uint32_t bits;

  __device__ static Visit of(uint32_t number, unsigned visible, unsigned hides) {
    return {number << 4 | hides << 2 | visible};
  }
  __device__ bool is_end() const { return bits == 0; }
  __device__ uint32_t number() const { return bits >> 4; }
  __device__ bool visible(int warpgroup) const { return bits >> warpgroup & 1; }
  __device__ bool hides(int warpgroup) const { return bits >> (2 + warpgroup) & 1; }
};

// The tiles that some row of the block sees. A warp looks at 32 tiles at once, one a lane.
template <class C>
class TileWalk {
 public:
  __device__ explicit TileWalk(const ForwardRows<C>& rows) : rows_(rows) {}

  __device__ __forceinline__ Visit next() {
    const bool by_block = C::kSparse && rows_.p.blocks.mask.data;
    while (from_ < rows_.tiles) {
      if (!by_block) return Visit::of(from_++, rows_.first_row + 64 < rows_.view.rows ? 3 : 1, 0);
      if (from_ % kWarp == 0) look();
      const unsigned left = (visible_[0] | visible_[1]) >> from_ % kWarp;
      from_ += left ? __ffs(left) - 1 : kWarp - from_ % kWarp;
      if (left == 0) continue;
      const uint32_t number = from_++, i = number % kWarp;
      return Visit::of(number, (visible_[0] >> i & 1) | (visible_[1] >> i & 1) << 1,
                       (hides_[0] >> i & 1) | (hides_[1] >> i & 1) << 1);
    }
    return {0};
  }

 private:
  __device__ __forceinline__ void look() {
    const uint32_t tile = from_ + lane_id();
#pragma unroll
    for (int warpgroup = 0; warpgroup < 2; ++warpgroup) {
      const unsigned seen = tile < rows_.tiles ? rows_.look(tile, warpgroup, 64) : 0;
      visible_[warpgroup] = __ballot_sync(kAllLanes, (seen & kSomeVisible) != 0);
      hides_[warpgroup] = __ballot_sync(kAllLanes, (seen & kSomeHidden) != 0);
    }
  }

  const ForwardRows<C>& rows_;
  uint32_t from_ = 0;
  unsigned visible_[2] = {}, hides_[2] = {};  // of the tiles from from_ / 32 * 32 on, by lane
};

template <class C>
__device__ __forceinline__ void produce(const ForwardRows<C>& rows, WgmmaShared<C>& shared,
                                        int thread) {
  using T = typename C::T;
  const AttentionParams& p = rows.p;
  const RowSource<T> keys(p.k, rows.view.batch, rows.key_head, 0, p.head_dim);
  const RowSource<T> values(p.v, rows.view.batch, rows.key_head, 0, p.value_dim);
  const auto load = [&](auto& tile, const RowSource<T>& source, int64_t first) {
    const int64_t stride = source.tensor.stride_token;
    if (!rows.view.key_mask && first + C::kKeys <= p.keys) {
      return fill<C::kProducers>(tile, source.first + first * stride, thread, stride);
    }
    fill<C::kProducers>(tile, source.first, thread, [&](int r) {
      return rows.view.key_exists(p, first + r) ? source.first + (first + r) * stride : nullptr;
    });
  };
  TileWalk<C> walk(rows);
  RingSlot<C> at;
  for (;; at.advance()) {
    const Visit visit = walk.next();
    barrier_wait(shared.key_empty[at.stage], at.parity ^ 1);
    const int64_t first = int64_t{visit.number()} * C::kKeys;
    if (!visit.is_end()) {
      load(shared.key[at.stage], keys, first);
      shared.bias[at.stage][thread] = rows.view.key_bias_log2(p, first + thread);
    }
    if (thread == 0) shared.visit[at.stage] = visit.bits;
    barrier_arrive_after_copies(shared.key_full[at.stage]);
    barrier_arrive(shared.key_full[at.stage]);
    if (visit.is_end()) return;
    barrier_wait(shared.value_empty[at.stage], at.parity ^ 1);
    load(shared.value[at.stage], values, first);
    barrier_arrive_after_copies(shared.value_full[at.stage]);
  }
}

}  // namespace tokred::cuda::attention
