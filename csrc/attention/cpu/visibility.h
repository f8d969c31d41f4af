// Which (query, head) row sees which key. The kernels ask for rectangles first, and look at single
// pairs only in rectangles that are visible in part.
#pragma once

#include "attention/params.h"
#include "common/cpu/simd.h"
#include "common/cpu/sizes.h"
#include "common/cpu/storage.h"

namespace tokred::TOKRED_ISA {

// Rows or keys of a streaming block: a multiple of every tile height. Part of the result's
// definition, because the softmax is rescaled once a block.
inline constexpr int kBlock = 96;

// The query heads that share one row order: those of a kv head, or one where blocks of queries and
// keys are masked by query head, so that heads do not wait for each other's keys.
inline int64_t row_group(const AttentionParams& p) {
  const bool by_head = p.blocks.mask.data && p.blocks.mask.stride[1] != 0;
  return by_head ? 1 : p.heads_q / p.heads_kv;
}

// f(data) with the numbers in their type: Acc, or a half-precision one.
template <class Acc, class F>
TOKRED_INLINE void visit_pair_bias(const PairBias& bias, const F& f) {
  if constexpr (sizeof(Acc) == sizeof(float)) {
    if (bias.dtype == DType::bf16) return f(static_cast<const bf16*>(bias.data));
    if (bias.dtype == DType::f16) return f(static_cast<const f16*>(bias.data));
  }
  f(static_cast<const Acc*>(bias.data));
}

template <class T>
TOKRED_INLINE bool is_minus_infinity(T x) {
  return to_float(x) == -kInfinity<Accumulator<T>>;
}

enum class Coverage { none, some, all };

inline constexpr Coverage both(Coverage a, Coverage b) {
  if (a == Coverage::none || b == Coverage::none) return Coverage::none;
  return a == Coverage::all ? b : Coverage::some;
}

// One row or column of a block mask: indices i, by blocks of `size`. Null data: all visible.
struct BlockLine {
  const bool* data = nullptr;
  int64_t stride = 0, size = 1;

  bool operator[](int64_t i) const { return !data || data[i / size * stride]; }
  // The first index of [i, end) whose block is visible, or end.
  int64_t next(int64_t i, int64_t end) const {
    if (!data || i >= end) return i;
    int64_t block = i / size;
    for (; i < end && !data[block * stride]; i = block * size) ++block;
    return min(i, end);
  }
  int64_t block_end(int64_t i, int64_t end) const {
    return data ? min((i / size + 1) * size, end) : end;
  }
};

// Collects indices of [i, end) in visible blocks that are not `hidden`; returns where to go on.
template <class Hidden>
TOKRED_INLINE int64_t choose_visible(const BlockLine& line, int64_t i, int64_t end,
                                     const Hidden& hidden, int64_t (&index)[kBlock],
                                     int64_t& count) {
  count = 0;
  while (count < kBlock && (i = line.next(i, end)) < end) {
    const int64_t block_end = line.block_end(i, end);
    for (; i < block_end && count < kBlock; ++i) {
      index[count] = i;
      count += !hidden(i);
    }
  }
  return i;
}

// Heads head * group .. head * group + group - 1 of one batch entry: row r is query r / group of
// the r % group-th of them.
struct Visibility {
  const bool* mask;
  int64_t stride_head, stride_query, stride_key;
  PairBias pair_bias;  // see pair_offset()
  int64_t group, rows, keys;
  int64_t first_limit;  // the last key that query 0 sees; every later query sees one more
  bool causal;
  PositionTables positions;
  const bool* blocks;   // of block_rows rows by block_keys keys
  int64_t stride_block_row, stride_block_key, block_rows = 1, block_keys = 1;
  int64_t first_pair;  // of pair_bias
  BlockLine key_blocks, row_blocks;  // the row or column of `blocks` that a strip lies in

  Visibility(const AttentionParams& p, int64_t batch, int64_t head, int64_t heads)
      : mask(p.mask.data), stride_head(p.mask.stride[1]), stride_query(p.mask.stride[2]),
        stride_key(p.mask.stride[3]), pair_bias(p.pair_bias), group(heads), rows(p.queries * group),
        keys(p.keys), first_limit(p.keys - p.queries), causal(p.causal), positions(p.positions),
        blocks(p.blocks.mask.data), stride_block_row(p.blocks.mask.stride[2]),
        stride_block_key(p.blocks.mask.stride[3]) {
    const int64_t first_head = head * group;
    if (mask) mask += batch * p.mask.stride[0] + first_head * stride_head;
    first_pair = batch * p.pair_bias.stride[0] + first_head * p.pair_bias.stride[1];
    if (positions.columns > 0) {
      positions.query += batch * positions.query_stride_batch;
      positions.key += batch * positions.key_stride_batch;
    }
    if (!blocks) return;
    blocks += batch * p.blocks.mask.stride[0] + first_head * p.blocks.mask.stride[1];
    block_rows = max(min(p.blocks.block_q, p.queries), 1) * group;
    block_keys = max(min(p.blocks.block_k, p.keys), 1);
  }
  Visibility(const AttentionParams& p, int64_t batch, int64_t kv_head)
      : Visibility(p, batch, kv_head, p.heads_q / p.heads_kv) {}

  // Rows (keys) are worked on in strips of so many. Where a block fills a panel they are the rows
  // (keys) of a block: all of a strip see (are seen by) the same blocks, and no others are packed.
  int64_t rows_in_strip() const { return strip(block_rows, rows); }
  int64_t keys_in_strip() const { return strip(block_keys, keys); }
  // This, for the strip that a row or key lies in.
  Visibility of_rows(int64_t row) const {
    Visibility see = *this;
    if (rows_in_strip() == rows) return see;
    see.key_blocks = {blocks + row / block_rows * stride_block_row, stride_block_key, block_keys};
    return see;
  }
  Visibility of_keys(int64_t key) const {
    Visibility see = *this;
    if (keys_in_strip() == keys) return see;
    see.row_blocks = {blocks + key / block_keys * stride_block_key, stride_block_row, block_rows};
    return see;
  }

  // The last key that causality leaves to a row; may be negative.
  int64_t limit(int64_t row) const { return causal ? first_limit + row / group : keys - 1; }
  // Whether the mask treats all rows alike; such hidden keys are dropped when keys are packed.
  bool by_key() const { return mask && stride_query == 0 && (group == 1 || stride_head == 0); }
  bool masks_pairs() const { return mask && !by_key(); }
  bool blocks_pairs() const { return blocks && !key_blocks.data && !row_blocks.data; }
  bool hides_key(int64_t key) const {
    return (by_key() && !mask[key * stride_key]) || !key_blocks[key];
  }
  const bool* row_mask(int64_t row, int64_t key) const {
    return mask + row / group * stride_query + row % group * stride_head + key * stride_key;
  }
  // Where pair_bias has the number of a pair.
  int64_t pair_offset(int64_t row, int64_t key) const {
    const int64_t (&stride)[4] = pair_bias.stride;
    return first_pair + row % group * stride[1] + row / group * stride[2] + key * stride[3];
  }
  // Whether that is -inf for a row and all keys first .. last.
  bool pair_bias_hides(int64_t row, int64_t first_key, int64_t last_key) const {
    const auto hides = [&]<class T>(const T* data) {
      const T* number = data + pair_offset(row, first_key);
      const int64_t stride = pair_bias.stride[3];
      int64_t key = first_key;
      for (; key <= last_key && is_minus_infinity(*number); ++key) number += stride;
      return key > last_key;
    };
    switch (pair_bias.dtype) {
      case DType::bf16: return hides(static_cast<const bf16*>(pair_bias.data));
      case DType::f16: return hides(static_cast<const f16*>(pair_bias.data));
      case DType::f64: return hides(static_cast<const double*>(pair_bias.data));
      default: return hides(static_cast<const float*>(pair_bias.data));
    }
  }
  const bool* block_row(int64_t row) const { return blocks + row / block_rows * stride_block_row; }
  const int32_t* query_position(int64_t row) const {
    return positions.query + row / group * positions.query_stride_token;
  }
  const int32_t* key_position(int64_t key) const {
    return positions.key + key * positions.key_stride_token;
  }

  // How much of a rectangle is visible, keys and rows that are not packed left aside.
  Coverage coverage(int64_t first_row, int64_t last_row, int64_t first_key,
                    int64_t last_key) const {
    if (first_key > limit(last_row)) return Coverage::none;
    Coverage result = last_key <= limit(first_row) ? Coverage::all : Coverage::some;
    if (!masks_pairs() && !pair_bias.data && !blocks_pairs() && positions.columns == 0) {
      return result;
    }
    // So long a rectangle has packed keys or rows far apart: counting all between them costs more
    // than it saves.
    if (last_key - first_key >= 4 * kBlock || last_row - first_row >= 4 * kBlock) {
      return Coverage::some;
    }
    if (masks_pairs()) {
      result = both(result, coverage_by_mask(first_row, last_row, first_key, last_key));
    }
    if (pair_bias.data) {
      bool hidden = true;
      for (int64_t row = first_row; hidden && row <= last_row; ++row) {
        hidden = pair_bias_hides(row, first_key, last_key);
      }
      if (hidden) return Coverage::none;
    }
    if (blocks_pairs()) {
      result = both(result, coverage_by_blocks(first_row, last_row, first_key, last_key));
    }
    for (int64_t column = 0; column < positions.columns; ++column) {
      result = both(result, coverage_by_position(first_row, last_row, first_key, last_key, column));
    }
    return result;
  }

 private:
  int64_t strip(int64_t block, int64_t all) const {
    return blocks && block >= kLanes ? min(block, all) : all;
  }

  Coverage coverage_by_mask(int64_t first_row, int64_t last_row, int64_t first_key,
                            int64_t last_key) const {
    int64_t visible = 0;
    for (int64_t row = first_row; row <= last_row; ++row) {
      visible += count(row_mask(row, first_key), stride_key, last_key - first_key + 1);
    }
    const int64_t pairs = (last_row - first_row + 1) * (last_key - first_key + 1);
    return visible == 0 ? Coverage::none : visible == pairs ? Coverage::all : Coverage::some;
  }

  Coverage coverage_by_blocks(int64_t first_row, int64_t last_row, int64_t first_key,
                              int64_t last_key) const {
    const int64_t first = first_key / block_keys, columns = last_key / block_keys - first + 1;
    int64_t visible = 0, pairs = 0;
    for (int64_t row = first_row / block_rows; row <= last_row / block_rows; ++row) {
      visible += count(blocks + row * stride_block_row + first * stride_block_key, stride_block_key,
                       columns);
      pairs += columns;
    }
    return visible == 0 ? Coverage::none : visible == pairs ? Coverage::all : Coverage::some;
  }

  Coverage coverage_by_position(int64_t first_row, int64_t last_row, int64_t first_key,
                                int64_t last_key, int64_t column) const {
    int32_t min_key = INT32_MAX, max_key = INT32_MIN;
    for (int64_t key = first_key; key <= last_key; ++key) {
      const int32_t position = key_position(key)[column];
      min_key = position < min_key ? position : min_key;
      max_key = position > max_key ? position : max_key;
    }
    int32_t min_query = INT32_MAX, max_query = INT32_MIN;
    for (int64_t row = first_row; row <= last_row; ++row) {
      const int32_t position = query_position(row)[column];
      min_query = position < min_query ? position : min_query;
      max_query = position > max_query ? position : max_query;
    }
    if (min_key > max_query) return Coverage::none;
    return max_key <= min_query ? Coverage::all : Coverage::some;
  }

  static int64_t count(const bool* first, int64_t stride, int64_t entries) {
    int visible = 0;
    if (stride == 1) {
      for (int64_t i = 0; i < entries; ++i) visible += first[i];
    } else {
      for (int64_t i = 0; i < entries; ++i) visible += first[i * stride];
    }
    return visible;
  }
};

// ---- Single pairs -------------------------------------------------------------------------------

// Sets the logits [item][16 lanes] to -inf where an item's number is above (kLess: below) a lane's.
template <bool kLess, class Acc>
TOKRED_INLINE void hide_by_number(const int32_t (&item)[kBlock], const int32_t (&lane)[kLanes],
                                  int64_t count, Acc* logits) {
  constexpr Acc kHidden = -kInfinity<Acc>;
  for (int64_t i = 0; i < count; ++i) {
    Acc* logit = logits + i * kLanes;
    if constexpr (sizeof(Acc) == sizeof(int32_t)) {
      const i32x16 items = splat(item[i]), lanes = load(lane);
      store(logit, select_greater(kLess ? lanes : items, kLess ? items : lanes, splat(kHidden),
                                  load(logit)));
    } else {
      for (int j = 0; j < kLanes; ++j) {
        const bool hidden = kLess ? item[i] < lane[j] : item[i] > lane[j];
        logit[j] = hidden ? kHidden : logit[j];
      }
    }
  }
}

// The same where a table of bools says false. It is filled before the selects, which then need no
// branches: a processor cannot predict masks.
template <class Acc>
TOKRED_INLINE void hide_by_table(const int32_t* visible, int64_t count, Acc* logits) {
  constexpr Acc kHidden = -kInfinity<Acc>;
  for (int64_t i = 0; i < count * kLanes; i += kLanes) {
    if constexpr (sizeof(Acc) == sizeof(int32_t)) {
      store(logits + i,
            select_greater(load(visible + i), splat(int32_t{0}), load(logits + i), splat(kHidden)));
    } else {
      for (int64_t j = i; j < i + kLanes; ++j) logits[j] = visible[j] ? logits[j] : kHidden;
    }
  }
}

// Sets the logits [key of the list][16 rows from first_row on] that are hidden to -inf.
template <class Acc>
inline void hide_listed_keys(const Visibility& see, const int64_t* key, int64_t count,
                             int64_t first_row, Acc* logits) {
  int32_t number[kBlock];
  alignas(64) int32_t lane_number[kLanes], visible[kBlock * kLanes];
  const auto row = [&](int lane) { return min(first_row + lane, see.rows - 1); };
  if (see.causal) {
    for (int64_t i = 0; i < count; ++i) number[i] = static_cast<int32_t>(key[i]);
    for (int j = 0; j < kLanes; ++j) lane_number[j] = static_cast<int32_t>(see.limit(row(j)));
    hide_by_number<false>(number, lane_number, count, logits);
  }
  for (int64_t column = 0; column < see.positions.columns; ++column) {
    for (int64_t i = 0; i < count; ++i) number[i] = see.key_position(key[i])[column];
    for (int j = 0; j < kLanes; ++j) lane_number[j] = see.query_position(row(j))[column];
    hide_by_number<false>(number, lane_number, count, logits);
  }
  int64_t offset[kBlock];
  const auto hide_by = [&](const auto& line) {
    for (int j = 0; j < kLanes; ++j) {
      const bool* source = line(row(j));
      for (int64_t i = 0; i < count; ++i) visible[i * kLanes + j] = source[offset[i]];
    }
    hide_by_table(visible, count, logits);
  };
  if (see.masks_pairs()) {
    for (int64_t i = 0; i < count; ++i) offset[i] = key[i] * see.stride_key;
    hide_by([&](int64_t r) { return see.row_mask(r, 0); });
  }
  if (see.blocks_pairs()) {
    for (int64_t i = 0; i < count; ++i) offset[i] = key[i] / see.block_keys * see.stride_block_key;
    hide_by([&](int64_t r) { return see.block_row(r); });
  }
}

// The same where the rows are the list and the lanes are the keys from first_key on.
template <class Acc>
inline void hide_listed_rows(const Visibility& see, const int64_t* row, int64_t count,
                             int64_t first_key, Acc* logits) {
  int32_t number[kBlock];
  alignas(64) int32_t lane_number[kLanes], visible[kBlock * kLanes];
  const auto key = [&](int lane) { return min(first_key + lane, see.keys - 1); };
  if (see.causal) {
    for (int64_t i = 0; i < count; ++i) number[i] = static_cast<int32_t>(see.limit(row[i]));
    for (int j = 0; j < kLanes; ++j) lane_number[j] = static_cast<int32_t>(key(j));
    hide_by_number<true>(number, lane_number, count, logits);
  }
  for (int64_t column = 0; column < see.positions.columns; ++column) {
    for (int64_t i = 0; i < count; ++i) number[i] = see.query_position(row[i])[column];
    for (int j = 0; j < kLanes; ++j) lane_number[j] = see.key_position(key(j))[column];
    hide_by_number<true>(number, lane_number, count, logits);
  }
  int64_t offset[kLanes];
  const auto hide_by = [&](const auto& line) {
    for (int64_t i = 0; i < count; ++i) {
      const bool* source = line(row[i]);
      for (int j = 0; j < kLanes; ++j) visible[i * kLanes + j] = source[offset[j]];
    }
    hide_by_table(visible, count, logits);
  };
  if (see.masks_pairs()) {
    for (int j = 0; j < kLanes; ++j) offset[j] = key(j) * see.stride_key;
    hide_by([&](int64_t r) { return see.row_mask(r, 0); });
  }
  if (see.blocks_pairs()) {
    for (int j = 0; j < kLanes; ++j) offset[j] = key(j) / see.block_keys * see.stride_block_key;
    hide_by([&](int64_t r) { return see.block_row(r); });
  }
}

}  // namespace tokred::TOKRED_ISA
