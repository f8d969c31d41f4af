// What the attention kernels share. Sixteen rows of one operand are the sixteen lanes of a "panel"
// [dim][16]; rows of the other operand stream past it as blocks [row][dim], broadcast one number at
// a time. So maxima, sums and exponentials are lane-wise, and no result depends on the register
// width.
#pragma once

#include "../ops/sparse_attn_params.h"
#include "register_tile.h"
#include "row.h"
#include "vexp.h"

namespace tokred::TOKRED_ISA {

// Rows of a streaming block: a multiple of every tile height. Part of the result's definition,
// because the softmax is rescaled once a block.
inline constexpr int kBlock = 96;
inline constexpr int64_t kMaxPanels = 8;
// The numbers of all panels of a task: 128 rows of up to 128 dimensions, or 64 rows of up to 256.
inline constexpr int64_t kPanelNumbers = kMaxPanels * kLanes * 128;

inline constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Panels that a task owns, fewer where the threads would otherwise go idle. Results do not depend
// on it: panels share nothing but the blocks they read.
inline int64_t panels_per_task(const AttentionParams& p, int64_t rows, int64_t threads) {
  int64_t panels = p.head_dim <= 128 && p.value_dim <= 128 ? kMaxPanels : kMaxPanels / 2;
  while (panels > 2 && p.batch * p.heads_kv * divide_up(rows, panels * kLanes) < 4 * threads) {
    panels /= 2;
  }
  return panels;
}

template <class T>
inline constexpr T kInfinity = static_cast<T>(__builtin_inf());

// The rows (query, head of the group) of one kv head, the head changing fastest.
template <class T>
struct Rows {
  T* data;
  int64_t stride_token, stride_head, group;

  T* operator[](int64_t row) const {
    return data + row / group * stride_token + row % group * stride_head;
  }
};

template <class T>
TOKRED_INLINE Rows<T> query_rows(const HeadTensor& x, int64_t batch, int64_t kv_head,
                                 int64_t group) {
  T* data = static_cast<T*>(const_cast<void*>(x.data));
  return {data + batch * x.stride_batch + kv_head * group * x.stride_head, x.stride_token,
          x.stride_head, group};
}
TOKRED_INLINE HeadTensor contiguous(const void* data, int64_t heads, int64_t tokens, int64_t dim) {
  return {data, heads * tokens * dim, tokens * dim, dim};
}
template <class T>
TOKRED_INLINE const T* key_row(const HeadTensor& x, int64_t batch, int64_t head, int64_t key) {
  return static_cast<const T*>(x.data) + batch * x.stride_batch + head * x.stride_head +
         key * x.stride_token;
}

// The bias of a key, 0 where there is none.
template <class Acc>
TOKRED_INLINE Acc key_bias(const AttentionParams& p, int64_t batch, int64_t kv_head, int64_t key) {
  if (!p.key_bias) return 0;
  const int64_t offset = batch * p.bias_stride_batch + kv_head * p.bias_stride_head;
  return static_cast<const Acc*>(p.key_bias)[offset + key * p.bias_stride_key];
}

// ---- Who sees whom ------------------------------------------------------------------------------

enum class Shown { none, some, all };

// One kv head of one batch entry: which of its (query, head) rows sees which key.
struct Visibility {
  const bool* mask;
  int64_t stride_head, stride_query, stride_key;
  int64_t group, rows, keys;
  int64_t first_limit;  // the last key that query 0 sees; every later query sees one more
  bool causal;

  Visibility(const AttentionParams& p, int64_t batch, int64_t kv_head)
      : mask(p.mask.data), stride_head(p.mask.stride[1]), stride_query(p.mask.stride[2]),
        stride_key(p.mask.stride[3]), group(p.heads_q / p.heads_kv), rows(p.queries * group),
        keys(p.keys), first_limit(p.keys - p.queries), causal(p.causal) {
    if (mask) mask += batch * p.mask.stride[0] + kv_head * group * stride_head;
  }

  // The last key that causality leaves to a row; may be negative.
  int64_t limit(int64_t row) const { return causal ? first_limit + row / group : keys - 1; }
  // Whether the mask treats all rows alike; such hidden keys are dropped when keys are packed.
  bool by_key() const { return mask && stride_query == 0 && (group == 1 || stride_head == 0); }
  bool hides_key(int64_t key) const { return by_key() && !mask[key * stride_key]; }
  const bool* row_mask(int64_t row, int64_t key) const {
    return mask + row / group * stride_query + row % group * stride_head + key * stride_key;
  }

  // How much of a rectangle is visible, but for keys that are hidden from all rows.
  Shown shown(int64_t first_row, int64_t last_row, int64_t first_key, int64_t last_key) const {
    if (first_key > limit(last_row)) return Shown::none;
    bool all = last_key <= limit(first_row);
    if (mask && !by_key()) {
      int64_t visible = 0;
      for (int64_t row = first_row; row <= last_row; ++row) {
        visible += count(row_mask(row, first_key), last_key - first_key + 1);
      }
      if (visible == 0) return Shown::none;
      all = all && visible == (last_row - first_row + 1) * (last_key - first_key + 1);
    }
    return all ? Shown::all : Shown::some;
  }

 private:
  int64_t count(const bool* first, int64_t keys_here) const {
    int visible = 0;
    if (stride_key == 1) {
      for (int64_t key = 0; key < keys_here; ++key) visible += first[key];
    } else {
      for (int64_t key = 0; key < keys_here; ++key) visible += first[key * stride_key];
    }
    return visible;
  }
};

// ---- Packing ------------------------------------------------------------------------------------

template <class T>
TOKRED_INLINE void unpack_row(const Accumulator<T>* from, int64_t dim, Accumulator<T> scale,
                              T* to) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store_as(to + d, load(from + d) * splat(scale));
  for (; d < dim; ++d) from_float(from[d] * scale, to[d]);
}

// row(lane), times `scale`, as the lanes of [dim][16]; a null row is 0.
template <class T, class Row>
TOKRED_INLINE void pack_panel(const Row& row, int64_t dim, Accumulator<T> scale,
                              Accumulator<T>* panel) {
  alignas(64) Accumulator<T> rows[kLanes * kMaxHeadDim];
  for (int lane = 0; lane < kLanes; ++lane) {
    Accumulator<T>* to = rows + lane * dim;
    if (const T* from = row(lane)) {
      pack_row(from, dim, to);
    } else {
      for (int64_t d = 0; d < dim; ++d) to[d] = 0;
    }
  }
  for (int64_t i = 0; i < kLanes * dim; ++i) rows[i] *= scale;
  transpose(rows, kLanes, dim, panel);
}

// The first `count` lanes of [dim][16], times `scale`, as the rows row(lane).
template <class T, class Row>
TOKRED_INLINE void unpack_panel(const Accumulator<T>* panel, int64_t count, int64_t dim,
                                Accumulator<T> scale, const Row& row) {
  alignas(64) Accumulator<T> rows[kLanes * kMaxHeadDim];
  transpose(panel, dim, kLanes, rows);
  for (int64_t lane = 0; lane < count; ++lane) unpack_row(rows + lane * dim, dim, scale, row(lane));
}

// Up to kBlock keys with their values and biases.
template <class T>
struct KeyBlock {
  using Acc = Accumulator<T>;
  int64_t count, first, last;
  alignas(64) Acc bias[kBlock];
  alignas(64) Acc offset[kBlock];  // of the key from the first
  alignas(64) Acc k[kBlock * kMaxHeadDim];
  alignas(64) Acc v[kBlock * kMaxHeadDim];

  // Takes the keys from `key` on that some row may see; returns where to go on.
  int64_t fill(const AttentionParams& p, const Visibility& see, int64_t batch, int64_t kv_head,
               int64_t key, int64_t end) {
    for (count = 0; key < end && count < kBlock; ++key) {
      if (see.hides_key(key)) continue;
      if (count == 0) first = key;
      last = key;
      bias[count] = key_bias<Acc>(p, batch, kv_head, key);
      offset[count] = static_cast<Acc>(key - first);
      pack_row(key_row<T>(p.k, batch, kv_head, key), p.head_dim, k + count * p.head_dim);
      pack_row(key_row<T>(p.v, batch, kv_head, key), p.value_dim, v + count * p.value_dim);
      ++count;
    }
    return key;
  }
};

// Sets the logits [key of the block][16 rows from first_row on] that are hidden to -inf.
template <class T>
TOKRED_INLINE void hide_keys(const Visibility& see, const KeyBlock<T>& block, int64_t first_row,
                             Accumulator<T>* logits) {
  using Acc = Accumulator<T>;
  const int64_t last_row = see.rows - 1;
  alignas(64) Acc limit[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t row = first_row + lane < last_row ? first_row + lane : last_row;
    limit[lane] = static_cast<Acc>(see.limit(row) - block.first);
    if (!see.mask || see.by_key()) continue;
    const bool* visible = see.row_mask(row, block.first);
    for (int64_t key = 0; key < block.count; ++key) {
      Acc& logit = logits[key * kLanes + lane];
      logit = visible[key * see.stride_key] ? logit : -kInfinity<Acc>;
    }
  }
  for (int64_t key = 0; key < block.count; ++key) {
    Acc* logit = logits + key * kLanes;
    store(logit, select_greater(splat(block.offset[key]), load(limit), splat(-kInfinity<Acc>),
                                load(logit)));
  }
}

// The same where the rows are the block and the lanes are the keys from first_key on.
template <class T>
TOKRED_INLINE void hide_rows(const Visibility& see, int64_t first_row, int64_t count,
                             int64_t first_key, Accumulator<T>* logits) {
  using Acc = Accumulator<T>;
  const int64_t keys = smaller(kLanes, see.keys - first_key);
  alignas(64) Acc lane_number[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lane_number[lane] = static_cast<Acc>(lane);
  for (int64_t row = 0; row < count; ++row) {
    Acc* logit = logits + row * kLanes;
    if (see.mask && !see.by_key()) {
      const bool* visible = see.row_mask(first_row + row, first_key);
      for (int64_t lane = 0; lane < keys; ++lane) {
        logit[lane] = visible[lane * see.stride_key] ? logit[lane] : -kInfinity<Acc>;
      }
    }
    const Acc limit = static_cast<Acc>(see.limit(first_row + row) - first_key);
    store(logit, select_greater(load(lane_number), splat(limit), splat(-kInfinity<Acc>),
                                load(logit)));
  }
}

// visit(panel, count, shown) for the panels that show(panel) does not call hidden, `count`
// neighbours together where a tile takes them.
template <class Acc, class Show, class Visit>
TOKRED_INLINE void visit_panels(int64_t panels, const Show& show, const Visit& visit) {
  Shown shown[kMaxPanels];
  for (int64_t panel = 0; panel < panels; ++panel) shown[panel] = show(panel);
  for (int64_t panel = 0, count; panel < panels; panel += count) {
    count = 1;
    if (shown[panel] == Shown::none) continue;
    while (count < kTilePanels<Acc> && panel + count < panels &&
           shown[panel + count] != Shown::none) {
      ++count;
    }
    visit(panel, count, shown + panel);
  }
}

}  // namespace tokred::TOKRED_ISA
