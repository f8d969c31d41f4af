// The (query, head) rows that share a list of keys, and the keys of a list that they see.
#pragma once

#include "attention/cpu/rows.h"
#include "attention/cpu/tile.h"

namespace tokred::TOKRED_ISA {

// Rows of a task, and keys of a batch. The latter is part of the result's definition, because the
// softmax is rescaled once a batch.
inline constexpr int64_t kMaxRows = 32;
inline constexpr int64_t kGather = 64;

// Some rows of one list, the work of a task. Row i is row first_row + i of the `heads` query heads
// from list_head * heads on, numbered as in Visibility.
struct ListRows {
  int64_t batch, list_head, heads, kv_head, first_row, rows;
  const int32_t* indices;  // null: entry i is key i
  int64_t first_key, end_key;  // others are skipped
};

// Whether rows are worked on one by one: those of a single query, whose keys are split over all
// threads however many heads share a key head, and up to kMaxDecodeRows rows of a kv head. More
// rows are worked on in panels. A function of the sizes of one sequence, so that a batch does not
// change the result.
inline bool is_decode(const AttentionParams& p) {
  constexpr int64_t kMaxDecodeRows = 8;
  const int64_t rows = p.queries * (p.heads_q / p.heads_kv);
  return (p.queries == 1 || rows <= kMaxDecodeRows) && !p.blocks.mask.data;
}

// How all rows are cut into tasks. Without indices there is one list for all, of every key.
struct ListTasks {
  int64_t heads;        // query heads of a kv head that share a list
  int64_t list_heads;   // heads * list_heads are all query heads
  int64_t block_rows;   // rows of a list; the last one may have fewer
  int64_t lists, chunks, chunk_rows, count;  // of a head, of a list, of a chunk, in all

  ListTasks(const AttentionParams& p, const KeyLists& lists_of)
      : heads(lists_of.heads == p.heads_q ? 1 : p.heads_q / p.heads_kv),
        list_heads(p.heads_q / heads), block_rows(max(min(lists_of.block_q, p.queries), 1) * heads),
        lists(divide_up(p.queries * heads, block_rows)), chunks(divide_up(block_rows, kMaxRows)),
        chunk_rows(min(block_rows, kMaxRows)), count(p.batch * list_heads * lists * chunks) {}

  // Tasks in the order of batch, head, list; `rows` may be 0.
  ListRows operator()(const AttentionParams& p, const KeyLists& of, int64_t task) const {
    const int64_t list = task / chunks % lists, head = task / chunks / lists;
    ListRows at;
    at.batch = head / list_heads;
    at.list_head = head % list_heads;
    at.heads = heads;
    at.kv_head = at.list_head * p.heads_kv / list_heads;
    at.first_row = list * block_rows + task % chunks * chunk_rows;
    const int64_t end = min((list + 1) * block_rows, p.queries * heads);
    at.rows = max(min(chunk_rows, end - at.first_row), 0);
    at.indices = !of.indices ? nullptr
                             : of.indices + at.batch * of.stride_batch +
                                   at.list_head * of.heads / list_heads * of.stride_head +
                                   list * of.stride_list;
    at.first_key = 0;
    at.end_key = p.keys;
    return at;
  }
};

// Which of a task's rows see a key, as bits.
class RowVisibility {
 public:
  RowVisibility(const AttentionParams& p, const ListRows& at)
      : see_(p, at.batch, at.list_head, at.heads), first_(at.first_row), rows_(at.rows),
        all_(static_cast<uint32_t>((uint64_t{1} << at.rows) - 1)), ascending_(!at.indices) {
    const bool one_query = first_ / at.heads == (first_ + rows_ - 1) / at.heads;
    one_mask_ = (one_query || see_.stride_query == 0) && (at.heads == 1 || see_.stride_head == 0);
    const int64_t (&stride)[4] = see_.pair_bias.stride;
    one_pair_bias_ = (one_query || stride[2] == 0) && (at.heads == 1 || stride[1] == 0);
  }

  uint32_t all() const { return all_; }
  bool hides_nothing() const {
    return !see_.mask && !see_.pair_bias.data && see_.positions.columns == 0 &&
           see_.limit(first_) >= see_.keys - 1;
  }
  uint32_t operator()(int64_t key) const {
    uint32_t seen = all_;
    if (key > see_.limit(first_)) {
      seen = keep(seen, [&](int64_t row) { return key <= see_.limit(row); });
    }
    if (see_.mask && one_mask_) {
      if (!*see_.row_mask(first_, key)) return 0;
    } else if (see_.mask) {
      seen = keep(seen, [&](int64_t row) { return *see_.row_mask(row, key); });
    }
    if (see_.pair_bias.data && one_pair_bias_) {
      if (see_.pair_bias_hides(first_, key, key)) return 0;
    } else if (see_.pair_bias.data) {
      seen = keep(seen, [&](int64_t row) { return !see_.pair_bias_hides(row, key, key); });
    }
    for (int64_t column = 0; column < see_.positions.columns; ++column) {
      const int32_t position = see_.key_position(key)[column];
      seen = keep(seen, [&](int64_t row) { return position <= see_.query_position(row)[column]; });
    }
    return seen;
  }
  // Adds to the logits of the row-th row what a float mask says of these keys.
  template <class Acc>
  void add_pair_bias(int64_t row, const int32_t* key, int64_t count, Acc* logits) const {
    if (see_.pair_bias.data) bias_row(see_, first_ + row, key, count, ascending_, logits);
  }

 private:
  template <class Sees>
  uint32_t keep(uint32_t seen, const Sees& sees) const {
    for (int64_t i = 0; i < rows_; ++i) {
      if (!sees(first_ + i)) seen &= ~(uint32_t{1} << i);
    }
    return seen;
  }

  Visibility see_;
  int64_t first_, rows_;
  uint32_t all_;
  bool ascending_, one_mask_, one_pair_bias_;
};

// Up to kGather entries of a list that some row sees and whose bias is not -inf.
template <class Acc>
struct KeyBatch {
  int64_t count = 0;
  bool plain, seen_by_all;  // without biases and hidden pairs
  uint32_t seen[kGather];
  int32_t key[kGather], entry[kGather];
  alignas(64) Acc bias[kGather];

  // Collects entries of [first, end), those for which find(key, number in the batch) is true, until
  // the batch is full; returns the entry to continue from.
  template <class Find>
  int64_t choose(const AttentionParams& p, const ListRows& at, const RowVisibility& visibility,
                 int64_t first, int64_t end, const Find& find) {
    count = 0;
    plain = !p.key_bias && visibility.hides_nothing();
    seen_by_all = true;
    if (p.keys == 0) return end;
    const int32_t* indices = at.indices;
    first = indices
                ? collect(
                      p, at, visibility, first, end, [=](int64_t i) { return indices[i]; }, find)
                : collect(p, at, visibility, first, end, [](int64_t i) { return i; }, find);
    for (int64_t i = count; count > 0 && i < whole_lanes(count); ++i) bias[i] = 0;
    return first;
  }

  // Products [row][kGather] to logits: softcap and biases, -inf where a row does not see a key and
  // behind the last. Where slopes is given a softcap leaves its derivatives there.
  void finish_logits(const RowVisibility& visibility, int64_t rows, double softcap, Acc* logits,
                     Acc* slopes = nullptr) const {
    for (int64_t row = 0; row < rows && softcap > 0; ++row) {
      cap_logits(
          logits + row * kGather, divide_up(count, kLanes), softcap,
          [](int64_t) { return splat(Acc{0}); }, slopes ? slopes + row * kGather : nullptr);
    }
    for (int64_t row = 0; row < rows; ++row, logits += kGather) {
      for (int64_t i = 0; i < count && !plain; i += kLanes) {
        store(logits + i, load(logits + i) + load(bias + i));
      }
      if (!plain) visibility.add_pair_bias(row, key, count, logits);
      for (int64_t i = count; i < whole_lanes(count); ++i) logits[i] = -kInfinity<Acc>;
      if (seen_by_all) continue;
      for (int64_t i = 0; i < count; ++i) {
        logits[i] = seen[i] >> row & 1 ? logits[i] : -kInfinity<Acc>;
      }
    }
  }

 private:
  template <class KeyOf, class Find>
  int64_t collect(const AttentionParams& p, const ListRows& at, const RowVisibility& visibility,
                  int64_t first, int64_t end, const KeyOf& key_of, const Find& find) {
    const int64_t first_key = at.first_key, end_key = at.end_key;
    int64_t found = 0;
    for (; first < end && found < kGather; ++first) {
      const int64_t number = key_of(first);
      if (number < first_key || number >= end_key) continue;
      if (!plain) {
        seen[found] = visibility(number);
        bias[found] = key_bias<Acc>(p, at.batch, at.kv_head, number);
        if (seen[found] == 0 || bias[found] == -kInfinity<Acc>) continue;
      }
      if (!find(number, found)) continue;
      if (!plain) seen_by_all = seen_by_all && seen[found] == visibility.all();
      key[found] = static_cast<int32_t>(number);
      entry[found] = static_cast<int32_t>(first);
      ++found;
    }
    count = found;
    return first;
  }
};

// The same with the rows of keys and values.
template <class T>
struct GatheredKeys : KeyBatch<Accumulator<T>> {
  using KeyBatch<Accumulator<T>>::count;
  const T* k[kGather];  // valid up to whole_lanes(count)
  const T* v[kGather];

  int64_t choose(const AttentionParams& p, const ListRows& at, const RowVisibility& visibility,
                 int64_t first, int64_t end) {
    const T* keys = key_row<T>(p.k, at.batch, at.kv_head, 0);
    const T* values = key_row<T>(p.v, at.batch, at.kv_head, 0);
    const int64_t key_stride = p.k.stride_token, value_stride = p.v.stride_token;
    first = KeyBatch<Accumulator<T>>::choose(p, at, visibility, first, end,
                                             [&](int64_t number, int64_t i) {
                                               k[i] = keys + number * key_stride;
                                               v[i] = values + number * value_stride;
                                               return true;
                                             });
    for (int64_t i = count; count > 0 && i < whole_lanes(count); ++i) {
      k[i] = k[count - 1];
      v[i] = v[count - 1];
    }
    return first;
  }

  // Scattered rows lie in pages of their own, and a prefetch waits until its page is translated.
  // Back to back, prefetches are translated at the same time.
  void prefetch_pages() const {
    for (int64_t i = 0; i < count; ++i) {
      prefetch_line(k[i]);
      prefetch_line(v[i]);
    }
  }
};

}  // namespace tokred::TOKRED_ISA
