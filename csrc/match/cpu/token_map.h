// From the best match of every source to a token map: rank the sources, let the best leave, number
// the survivors. Integer work on one batch item; see BipartiteParams for the rules.
#pragma once

#include "common/cpu/simd.h"
#include "match/params.h"

namespace tokred::TOKRED_ISA {

// The position of row t of a set in batch item `item`, or -1 where the row points nowhere.
TOKRED_INLINE int64_t row_position(const TokenSet& set, int64_t item, int64_t t) {
  const int64_t position = set.rows ? set.rows[item * set.rows_stride_batch + t]
                                    : set.first + set.step * t;
  return position >= 0 && position < set.tokens ? position : -1;
}
TOKRED_INLINE bool row_masked(const TokenSet& set, int64_t item, int64_t position) {
  return set.mask && !set.mask[item * set.mask_stride_batch + position * set.mask_stride_token];
}

struct PlanScratch {
  uint32_t* key;      // [sources] rank keys
  int32_t* ranked;    // [sources] source rows in rank order
  int32_t* spare;     // [sources]
  int32_t* role;      // [N] kPrefix, kDestination, kSource or kOther
  int32_t* first;     // [N] position of the first member of the group that stands here
};
enum Role : int32_t { kOther, kPrefix, kDestination, kSource };

TOKRED_INLINE int64_t plan_scratch_bytes(int64_t sources, int64_t tokens) {
  return 4 * (3 * sources + 2 * tokens);
}
TOKRED_INLINE PlanScratch plan_scratch(void* memory, int64_t sources, int64_t tokens) {
  auto* words = static_cast<int32_t*>(memory);
  return {reinterpret_cast<uint32_t*>(words), words + sources, words + 2 * sources,
          words + 3 * sources, words + 3 * sources + tokens};
}

// Ascending keys are falling scores; the two greatest keys are for sources without a match.
TOKRED_INLINE uint32_t rank_key(float score, bool masked, bool matched) {
  if (!matched) return masked ? 0xfffffffeu : 0xffffffffu;
  uint32_t bits;
  std::memcpy(&bits, &score, 4);
  const uint32_t ascending = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return ~ascending;
}

// Sorts rows by key, stable, least significant byte first.
static void radix_sort(const uint32_t* key, int32_t*& rows, int32_t*& spare, int64_t count) {
  for (int shift = 0; shift < 32; shift += 8) {
    int64_t start[257] = {};
    for (int64_t i = 0; i < count; ++i) ++start[((key[rows[i]] >> shift) & 255) + 1];
    if (start[((key[rows[0]] >> shift) & 255) + 1] == count) continue;
    for (int digit = 0; digit < 256; ++digit) start[digit + 1] += start[digit];
    for (int64_t i = 0; i < count; ++i) {
      spare[start[(key[rows[i]] >> shift) & 255]++] = rows[i];
    }
    int32_t* sorted = spare;
    spare = rows;
    rows = sorted;
  }
}

static void assign_roles(const BipartiteParams& p, int64_t item, int32_t* role) {
  const TokenSet &a = p.match.a, &b = p.match.b;
  for (int64_t i = 0; i < p.tokens; ++i) role[i] = i < p.num_prefix ? kPrefix : kOther;
  for (int64_t t = 0; t < b.count; ++t) {
    const int64_t position = row_position(b, item, t);
    if (position >= 0 && role[position] == kOther) role[position] = kDestination;
  }
  for (int64_t t = 0; t < a.count; ++t) {
    const int64_t position = row_position(a, item, t);
    if (position >= 0 && role[position] == kOther) role[position] = kSource;
  }
}

// Fills s.ranked with the rows of the sources that may leave, best first; returns how many.
static int64_t rank_sources(const BipartiteParams& p, int64_t item, PlanScratch& s) {
  const TokenSet& a = p.match.a;
  const float* score = p.match.score + item * a.count;
  const int32_t* index = p.match.index + item * a.count;
  int64_t count = 0;
  for (int64_t i = 0; i < p.tokens; ++i) s.first[i] = 0;
  for (int64_t t = 0; t < a.count; ++t) {
    const int64_t position = row_position(a, item, t);
    if (position < 0 || s.role[position] != kSource || s.first[position]) continue;
    s.first[position] = 1;  // a repeated row counts once
    s.key[t] = rank_key(score[t], row_masked(a, item, position), index[t] >= 0);
    s.ranked[count++] = static_cast<int32_t>(t);
  }
  if (count > 0) radix_sort(s.key, s.ranked, s.spare, count);
  return count;
}

static int64_t count_leaving(const BipartiteParams& p, int64_t item, const PlanScratch& s,
                             int64_t count) {
  const int64_t limit = p.r < count ? p.r : count;
  if (!p.by_threshold) return limit;
  const float* score = p.match.score + item * p.match.a.count;
  const int32_t* index = p.match.index + item * p.match.a.count;
  int64_t leaving = 0;
  while (leaving < limit && index[s.ranked[leaving]] >= 0 &&
         score[s.ranked[leaving]] > p.threshold) {
    ++leaving;
  }
  return leaving;
}

// Gives the survivors their slots in ToMe's order; returns the number of slots.
static int64_t number_by_side(const BipartiteParams& p, int64_t item, const PlanScratch& s,
                              int64_t count, int64_t leaving, int32_t* map) {
  const TokenSet &a = p.match.a, &b = p.match.b;
  int64_t next = 0;
  const auto take = [&](int64_t position) {
    const bool dropped = p.by_threshold && row_masked(a, item, position);
    map[position] = dropped ? -1 : static_cast<int32_t>(next++);
  };
  constexpr Role kFirst[] = {kPrefix, kOther};
  for (Role role : kFirst) {
    for (int64_t i = 0; i < p.tokens; ++i) {
      if (s.role[i] == role) take(i);
    }
  }
  if (p.num_prefix == 0) {
    for (int64_t i = leaving; i < count; ++i) take(row_position(a, item, s.ranked[i]));
  } else {
    // Row order: mark who stays, then walk the rows once.
    for (int64_t i = 0; i < count; ++i) s.key[s.ranked[i]] = i >= leaving;
    for (int64_t i = 0; i < count; ++i) s.first[row_position(a, item, s.ranked[i])] = s.ranked[i];
    for (int64_t t = 0; t < a.count; ++t) {
      const int64_t position = row_position(a, item, t);
      if (position < 0 || s.role[position] != kSource || s.first[position] != t) continue;
      if (s.key[t]) take(position);
    }
  }
  for (int64_t i = 0; i < p.tokens; ++i) s.first[i] = 0;
  for (int64_t t = 0; t < b.count; ++t) {
    const int64_t position = row_position(b, item, t);
    if (position < 0 || s.role[position] != kDestination || s.first[position]) continue;
    s.first[position] = 1;
    take(position);
  }
  return next;
}

// Gives the groups their slots by the position of their first member; returns their number.
static int64_t number_by_position(const BipartiteParams& p, int64_t item, const PlanScratch& s,
                                  int64_t leaving, int32_t* map) {
  const TokenSet &a = p.match.a, &b = p.match.b;
  const int32_t* index = p.match.index + item * a.count;
  for (int64_t i = 0; i < p.tokens; ++i) {
    s.first[i] = p.by_threshold && row_masked(a, item, i) ? -1 : static_cast<int32_t>(i);
  }
  for (int64_t i = 0; i < leaving; ++i) {
    const int32_t t = s.ranked[i];
    const int64_t source = row_position(a, item, t);
    s.first[source] = -1;
    if (index[t] < 0) continue;
    int32_t& first = s.first[row_position(b, item, index[t])];
    if (source < first) first = static_cast<int32_t>(source);
  }
  // map first holds, at the first member's position, who owns the group; then the slots.
  for (int64_t i = 0; i < p.tokens; ++i) map[i] = -1;
  for (int64_t i = 0; i < p.tokens; ++i) {
    if (s.first[i] >= 0) map[s.first[i]] = static_cast<int32_t>(i);
  }
  int64_t next = 0;
  for (int64_t i = 0; i < p.tokens; ++i) {
    if (map[i] >= 0) s.first[map[i]] = static_cast<int32_t>(next++);
  }
  for (int64_t i = 0; i < p.tokens; ++i) map[i] = s.first[i];
  return next;
}

// Writes the token map of one batch item from its scores and indices.
static void plan_item(const BipartiteParams& p, int64_t item, PlanScratch s) {
  const TokenSet &a = p.match.a, &b = p.match.b;
  const int32_t* index = p.match.index + item * a.count;
  int32_t* map = p.token_map + item * p.tokens;
  assign_roles(p, item, s.role);
  const int64_t count = rank_sources(p, item, s);
  const int64_t leaving = count_leaving(p, item, s, count);
  const int64_t slots = p.order == Order::tome
                            ? number_by_side(p, item, s, count, leaving, map)
                            : number_by_position(p, item, s, leaving, map);
  for (int64_t i = 0; i < leaving; ++i) {
    const int32_t t = s.ranked[i];
    const int64_t to = index[t] < 0 ? -1 : row_position(b, item, index[t]);
    map[row_position(a, item, t)] = to < 0 ? -1 : map[to];
  }
  if (p.by_threshold) {
    p.num_out[item] = static_cast<int32_t>(slots);
    return;
  }
  const int64_t num_out = p.tokens - p.r;
  for (int64_t i = 0; i < p.tokens; ++i) {
    if (map[i] >= num_out) map[i] = -1;
  }
}

}  // namespace tokred::TOKRED_ISA
