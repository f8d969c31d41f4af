// The numbers that a float mask adds to the logits of (query, head) rows and keys, counted as
// Visibility counts them. They are added after softcap and key bias, and -inf hides what is NaN.
#pragma once

#include "attention/cpu/visibility.h"
#include "common/cpu/register_tile.h"
#include "common/cpu/row.h"

namespace tokred::TOKRED_ISA {

// A number added to a logit.
template <class Acc>
TOKRED_INLINE Vec<Acc> biased_logit(Vec<Acc> logit, Vec<Acc> bias) {
  return select_equal(bias, -kInfinity<Acc>, bias, logit + bias);
}

// Whether the numbers item[0 .. count - 1], ascending, are consecutive.
inline bool are_neighbours(const int64_t* item, int64_t count) {
  return item[count - 1] - item[0] == count - 1;
}

// To the logits [key of the list][16 rows from first_row on].
template <class Acc>
__attribute__((noinline)) static void bias_listed_keys(const Visibility& see, const int64_t* key,
                                                       int64_t count, int64_t first_row,
                                                       Acc* logits) {
  alignas(64) Acc table[kBlock * kLanes], rows[kLanes * kBlock];
  const bool whole = see.pair_bias.stride[3] == 1 && are_neighbours(key, count);
  visit_pair_bias<Acc>(see.pair_bias, [&]<class T>(const T* data) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const T* from = data + see.pair_offset(min(first_row + lane, see.rows - 1), 0);
      Acc* to = rows + lane * count;
      if (whole) {
        pack_row(from + key[0], count, to);
      } else {
        const int64_t stride = see.pair_bias.stride[3];
        for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[key[i] * stride]);
      }
    }
  });
  transpose(rows, kLanes, count, table);
  for (int64_t i = 0; i < count * kLanes; i += kLanes) {
    store(logits + i, biased_logit(load(logits + i), load(table + i)));
  }
}

// The same where the rows are the list and the lanes are the keys from first_key on.
template <class Acc>
__attribute__((noinline)) static void bias_listed_rows(const Visibility& see, const int64_t* row,
                                                       int64_t count, int64_t first_key,
                                                       Acc* logits) {
  const int64_t stride = see.pair_bias.stride[3], keys = min(see.keys - first_key, kLanes);
  visit_pair_bias<Acc>(see.pair_bias, [&]<class T>(const T* data) {
    for (int64_t i = 0; i < count; ++i, logits += kLanes) {
      const T* from = data + see.pair_offset(row[i], first_key);
      T lane[kLanes] = {};
      for (int64_t j = 0; stride != 1 && j < keys; ++j) lane[j] = from[j * stride];
      const Vec<Acc> bias = load_row(stride == 1 ? from : lane, keys);
      store(logits, biased_logit(load(logits), bias));
    }
  });
}

// To the logits of one row and the keys of a list.
template <class Acc>
__attribute__((noinline)) static void bias_row(const Visibility& see, int64_t row,
                                               const int32_t* key, int64_t count, bool ascending,
                                               Acc* logits) {
  visit_pair_bias<Acc>(see.pair_bias, [&]<class T>(const T* data) {
    const T* from = data + see.pair_offset(row, 0);
    const int64_t stride = see.pair_bias.stride[3];
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t here = min(count - i, kLanes);
      T lane[kLanes] = {};
      const bool whole = ascending && stride == 1 && key[i + here - 1] - key[i] == here - 1;
      for (int64_t j = 0; !whole && j < here; ++j) lane[j] = from[key[i + j] * stride];
      const Vec<Acc> bias = load_row(whole ? from + key[i] : lane, here);
      store(logits + i, biased_logit(load(logits + i), bias));
    }
  });
}

}  // namespace tokred::TOKRED_ISA
