// Slots of a token map: a counting sort lists the members of each, and a Slot reads them.
#pragma once

#include "common/cpu/parallel.h"
#include "common/cpu/row.h"
#include "merge/params.h"

namespace tokred::TOKRED_ISA {

TOKRED_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
TOKRED_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// One output slot of one batch item.
template <class T>
struct Slot {
  using A = Accumulator<T>;
  const MergeParams& p;
  int64_t item;
  const int32_t* members;  // ascending positions
  int64_t count;

  Slot(const MergeParams& params, int64_t item, int64_t slot) : p(params), item(item) {
    const int32_t* indptr = p.indptr + item * (p.num_out + 1) + slot;
    members = p.members + item * p.tokens + indptr[0];
    count = indptr[1] - indptr[0];
  }

  const T* x(int64_t token) const {
    return static_cast<const T*>(p.x) + item * p.x_stride_batch + token * p.x_stride_token;
  }
  A entry(const TokenTable& table, int64_t token) const {
    if (!table.data) return A(1);
    return static_cast<const A*>(
        table.data)[item * table.stride_batch + token * table.stride_token];
  }
  A size(int64_t token) const { return entry(p.size, token); }
  A weight(int64_t token) const { return entry(p.weight, token); }
  A coefficient(int64_t token, bool use_size) const {
    return use_size ? weight(token) * size(token) : weight(token);
  }
  A total(bool use_size) const {
    A sum = A(0);
    for (int64_t m = 0; m < count; ++m) sum += coefficient(members[m], use_size);
    return sum;
  }
  A total_size() const {
    A sum = A(0);
    for (int64_t m = 0; m < count; ++m) sum += size(members[m]);
    return sum;
  }
  // The member of maximum weight, the first of equals; NaN only where all are.
  int64_t heaviest() const {
    int64_t best = members[0];
    for (int64_t m = 1; m < count; ++m) {
      const A challenger = weight(members[m]), champion = weight(best);
      if (challenger > champion || (champion != champion && challenger == challenger)) {
        best = members[m];
      }
    }
    return best;
  }
  // The member of maximum norm, the first of equals, and its squared norm. NaN counts as longest.
  int64_t longest(int64_t channels, A& squared) const {
    int64_t best = members[0];
    squared = squared_norm(x(best), channels);
    for (int64_t m = 1; m < count; ++m) {
      const A challenger = squared_norm(x(members[m]), channels);
      if (challenger > squared || challenger != challenger) {
        squared = challenger;
        best = members[m];
      }
    }
    return best;
  }
};

// The slot of a token; -1 where it has none.
TOKRED_INLINE int64_t slot_of(const MergeParams& p, int64_t item, int64_t token) {
  const int64_t slot = p.token_map[item * p.map_stride_batch + token * p.map_stride_token];
  return slot >= 0 && slot < p.num_out ? slot : -1;
}

// Counting sort of one item's tokens by slot, stable in position; entries without a slot are left
// out. Fills p.indptr and p.members.
TOKRED_INLINE void list_members(const MergeParams& p, const Parallel& parallel) {
  parallel_tasks(parallel, p.batch, [&](int64_t item, int64_t) {
    int32_t* indptr = p.indptr + item * (p.num_out + 1);
    int32_t* members = p.members + item * p.tokens;
    for (int64_t o = 0; o <= p.num_out; ++o) indptr[o] = 0;
    for (int64_t i = 0; i < p.tokens; ++i) {
      if (const int64_t slot = slot_of(p, item, i); slot >= 0) ++indptr[slot];
    }
    // Ends of the slots; filling from the back makes starts of them.
    for (int64_t o = 1; o <= p.num_out; ++o) indptr[o] += indptr[o - 1];
    for (int64_t i = p.tokens - 1; i >= 0; --i) {
      if (const int64_t slot = slot_of(p, item, i); slot >= 0) {
        members[--indptr[slot]] = static_cast<int32_t>(i);
      }
    }
  });
}

}  // namespace tokred::TOKRED_ISA
