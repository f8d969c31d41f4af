// Rows of queries that share keys, and the keys they share: those of an index list, or all of them
// in order. Both come from the same code, so that listing every key changes no bit of a result.
#pragma once

#include "attention/cuda/plan_decode.h"
#include "attention/cuda/row_source.cuh"
#include "common/cuda/raw_tile.cuh"

namespace tokred::cuda::attention {

// The shape as the plans take it.
inline ListShape list_shape(const AttentionParams& p, const KeyLists& lists) {
  const int64_t heads = lists.heads == p.heads_q && p.heads_q > 0 ? p.heads_q : p.heads_kv;
  return {attention_shape(p), heads, lists.length, min(lists.block_q, p.queries)};
}
// Rotated keys stay as exact as f32, and have its tiles.
inline ListShape list_shape(const SparseAttentionParams& p) {
  ListShape shape = list_shape(p.attention, p.lists);
  if (p.rotation.cos) shape.attention.is_float = true;
  return shape;
}

// Whether a struct of so many bytes has the shared memory of a plan: that of f32 has room to spare
// where rotated 16-bit keys take its place.
template <class Key>
constexpr bool fits(int64_t size, int64_t planned) {
  return Operand<Key>::kPlanes == 2 ? size <= planned : size == planned;
}

// List number `index` of all: its rows are rows first_row .. view.rows - 1 of the view, which is
// that of a key head, or of one query head where every query head has lists of its own.
struct ListView {
  HeadView view;
  int64_t key_head, length, list;
  const int32_t* indices;  // null: all keys in order
  uint32_t first_row;

  __device__ ListView(const AttentionParams& p, const KeyLists& lists, int64_t index)
      : ListView(p, lists, index / count(p, lists), index % count(p, lists)) {}

  // The list of queries list * block_q, .. of head `head`, counted over the batch.
  __device__ ListView(const AttentionParams& p, const KeyLists& lists, int64_t head, int64_t list)
      : view(p, by_query_head(p, lists) ? head / (p.heads_q / p.heads_kv) : head),
        key_head(view.head), length(lists.length), list(list), indices(nullptr) {
    if (by_query_head(p, lists)) {
      view.head = head % p.heads_q;
      view.group = 1;
    }
    if (lists.indices) {
      indices = lists.indices + view.batch * lists.stride_batch +
                (lists.heads == 1 ? 0 : view.head) * lists.stride_head + list * lists.stride_list;
    }
    first_row = static_cast<uint32_t>(list * lists.block_q * view.group);
    const int64_t end = min((list + 1) * lists.block_q, p.queries) * view.group;
    view.rows = static_cast<uint32_t>(end);
  }

  __device__ static bool by_query_head(const AttentionParams& p, const KeyLists& lists) {
    return lists.heads == p.heads_q && p.heads_q != p.heads_kv;
  }
  // Lists of a head.
  __device__ static int64_t count(const AttentionParams& p, const KeyLists& lists) {
    return (p.queries + lists.block_q - 1) / lists.block_q;
  }

  // The entry at a position of the list: a key, or any number where there is none.
  __device__ int entry(int64_t position) const {
    if (position >= length) return -1;
    return indices ? indices[position] : static_cast<int>(position);
  }
};

// Limits to the listed keys that a row sees.
struct RowVisibility {
  int64_t mask_offset;
  int last_key;
  Position position;
};

__device__ __forceinline__ RowVisibility row_visibility(const AttentionParams& p,
                                                        const HeadView& view, uint32_t row) {
  RowVisibility visibility{view.mask_offset(p, row), view.last_key(p, row), {0, 0}};
  if (p.positions.columns > 0) {
    visibility.position = query_position(p.positions, view.batch, view.query(row));
  }
  return visibility;
}

// Whether a row sees a key that exists.
__device__ __forceinline__ bool sees(const AttentionParams& p, int64_t batch,
                                     const RowVisibility& visibility, int64_t key) {
  if (key > visibility.last_key) return false;
  if (p.positions.columns > 0 &&
      !sees(visibility.position, key_position(p.positions, batch, key))) {
    return false;
  }
  if (!p.mask.data || masks_keys_only(p)) return true;
  return p.mask.data[visibility.mask_offset + key * p.mask.stride[3]];
}

// The keys of a tile in shared memory: -1 for none, with a bias of -inf.
template <int kKeys>
struct KeySlots {
  int key[kKeys];
  float bias[kKeys];  // times log2(e)
};

// Where the listed keys of a tile lie, as load_tile asks for it.
template <class T, int kKeys>
__device__ __forceinline__ auto listed_rows(const RowSource<T>& source,
                                            const KeySlots<kKeys>& slots) {
  return [&](int r) -> const T* {
    const int key = slots.key[r];
    return key < 0 ? nullptr : source.first + key * source.tensor.stride_token;
  };
}

// The entries that one thread reads of tile after tile: an entry two tiles ahead, and
// look_up(entry) one tile ahead, so that the thread waits for neither.
template <class Position, class LookUp>
class ListStream {
 public:
  // Positions first, first + step, .. below `end` of the list.
  __device__ ListStream(const ListView& list, Position first, Position step, Position end,
                        const LookUp& look_up)
      : list_(list), look_up_(look_up), position_(first), step_(step), end_(end) {
    const int entry = read();
    info_ = look_up_(entry);
    entry_ = read();
  }

  __device__ __forceinline__ auto next() {
    const auto info = info_;
    info_ = look_up_(entry_);
    entry_ = read();
    return info;
  }

 private:
  __device__ __forceinline__ int read() {
    const int entry = position_ < end_ ? list_.entry(position_) : -1;
    position_ += step_;
    return entry;
  }

  const ListView& list_;
  LookUp look_up_;
  Position position_, step_, end_;
  int entry_;
  typename LookUp::Info info_;
};

// Of attention to keys that lie in order: whether the key exists, and its bias.
struct KeyLookUp {
  struct Info {
    int key;
    float bias;
  };
  const AttentionParams& p;
  const HeadView& view;

  __device__ __forceinline__ Info operator()(int entry) const {
    if (entry < 0 || !view.key_exists(p, entry)) return {-1, -kInfinity};
    const float* biases = view.key_bias;
    const float bias = biases ? kLog2E * biases[entry * p.bias_stride_key] : 0.0f;
    return {bias == -kInfinity ? -1 : entry, bias};
  }
};
using KeyInfo = KeyLookUp::Info;

struct KeyStream : ListStream<int64_t, KeyLookUp> {
  __device__ KeyStream(const AttentionParams& p, const ListView& list, int64_t first, int64_t step,
                       int64_t end)
      : ListStream(list, first, step, end, {p, list.view}) {}
};

// Products to logits, for kRowTiles tiles of rows and a tile of keys; row(i, h) is the row of the
// block that half h of row tile i is. Only `per_row_mask` blocks have rows that see different keys.
// T is the type of q; without kHasPairs there are no numbers for pairs.
template <class T, bool kHasPairs = true, int kRowTiles, int kKeys, class Row>
__device__ __forceinline__ void list_logits(float (&product)[kRowTiles][kKeys / 8][4],
                                            const KeySlots<kKeys>& slots,
                                            const RowVisibility* visibility,
                                            const AttentionParams& p, int64_t batch, float scale,
                                            bool per_row_mask, Row row) {
  const int first_column = lane_id() % 4 * 2;
  cap_products(product, p);
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float bias = slots.bias[8 * j + first_column + e % 2];
        float& x = product[i][j][e];
        x = bias == -kInfinity ? bias : fmaf(x, scale, bias);
      }
    }
  }
  if (!per_row_mask) return;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const RowVisibility& row_visibility = visibility[row(i, h)];
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = slots.key[8 * j + first_column + e];
          if (key < 0 || !sees(p, batch, row_visibility, key))
            product[i][j][2 * h + e] = -kInfinity;
        }
      }
    }
  }
  if (!kHasPairs || !p.pair_bias.data) return;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t offset = visibility[row(i, h)].mask_offset;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = product[i][j][2 * h + e];
          if (x == -kInfinity) continue;
          x = with_pair_bias<T>(x, p.pair_bias, offset, slots.key[8 * j + first_column + e]);
        }
      }
    }
  }
}

// Fills a tile with keys rotated to the positions first_position, .. of their entries. row(r) as in
// load_tile.
template <int kThreads, class Tile, class T, class Row>
__device__ __forceinline__ void load_rotated(Tile& tile, const RowSource<T>& source,
                                             const Rotation& rotation, int64_t first_position,
                                             Row row, int thread = static_cast<int>(threadIdx.x)) {
  constexpr int kChunks = Tile::kDim / 8;
  const int half = source.columns / 2;
#pragma unroll 1
  for (int i = thread; i < Tile::kRows * kChunks; i += kThreads) {
    const int r = i / kChunks, column = i % kChunks * 8;
    const T* key = row(r);
    const int count = key ? max(0, min(source.columns - column, 8)) : 0;
    const float* cos = rotation.cos + (first_position + r) * rotation.cos_stride;
    const float* sin = rotation.sin + (first_position + r) * rotation.sin_stride;
    float x[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      x[e] = 0.0f;
      if (e >= count) continue;
      const int d = column + e, angle = d < half ? d : d - half;
      const float other = to_float(key[d < half ? d + half : angle]) * sin[angle];
      x[e] = fmaf(to_float(key[d]), cos[angle], d < half ? -other : other);
    }
    keep_finite<T>(x);
    store_eight(tile, r, column, x);
  }
}

// The keys of a tile, rotated or as they are. 16-bit keys of one plane are never rotated.
template <class C, int kThreads, class Tile, class T, class Row>
__device__ __forceinline__ void load_listed_keys(Tile& tile, const RowSource<T>& source,
                                                 const Rotation& rotation, int64_t first_position,
                                                 Row row, int thread) {
  constexpr bool kRotates = sizeof(T) == 4 || !std::is_same_v<typename C::Key, T>;
  if constexpr (kRotates) {
    if (sizeof(T) == 2 || rotation.cos) {
      return load_rotated<kThreads>(tile, source, rotation, first_position, row, thread);
    }
  }
  if constexpr (std::is_same_v<typename C::Key, T>) {
    load_tile<kThreads>(tile, source.first, source.columns, source.aligned, row, thread);
  }
}

}  // namespace tokred::cuda::attention
