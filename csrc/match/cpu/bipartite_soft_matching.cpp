// bipartite_soft_matching and threshold_matching: from the best match of every source to a token
// map. Sources are ranked by a radix sort, the best leave, the survivors are numbered. Integer
// work, one batch item a task; see BipartiteParams for the rules.
#include "common/cpu/parallel.h"
#include "common/cpu/sort.h"
#include "common/cpu/workspace.h"
#include "match/cpu/token_set.h"

namespace tokred::TOKRED_ISA {

int64_t match_workspace(const MatchParams&, const Parallel&);
void match(const MatchParams&, const Parallel&);

namespace {

enum Role : int32_t { kOther, kPrefix, kDestination, kSource };

// One worker's memory.
struct Scratch {
  uint64_t* keys;   // [sources] of the sources that may leave, in rank order: rank key, row
  uint64_t* spare;  // [sources] of the sort
  uint8_t* stays;   // [sources] by row: whether it survives
  int32_t* role;    // [N] a Role
  int32_t* first;  // [N] position of the first member of the group that stands here

  int32_t row_at(int64_t rank) const { return static_cast<int32_t>(keys[rank]); }
};
Scratch allocate_scratch(Workspace& memory, const BipartiteParams& p) {
  Scratch s;
  s.keys = memory.allocate<uint64_t>(p.match.a.count);
  s.spare = memory.allocate<uint64_t>(p.match.a.count);
  s.stays = memory.allocate<uint8_t>(p.match.a.count);
  s.role = memory.allocate<int32_t>(p.tokens);
  s.first = memory.allocate<int32_t>(p.tokens);
  return s;
}
int64_t scratch_bytes(const BipartiteParams& p) {
  return workspace_bytes([&](Workspace& memory) { allocate_scratch(memory, p); });
}

// Keys ascend as scores descend; the two largest are for sources without a match.
uint32_t rank_key(float score, bool masked, bool matched) {
  if (!matched) return masked ? 0xfffffffeu : 0xffffffffu;
  return descending_key(score);
}

void assign_roles(const BipartiteParams& p, int64_t item, int32_t* role) {
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

// Ranks the sources that may leave, the best first; returns their number.
int64_t rank_sources(const BipartiteParams& p, int64_t item, Scratch& s) {
  const TokenSet& a = p.match.a;
  const float* score = p.match.score + item * a.count;
  const int32_t* index = p.match.index + item * a.count;
  int64_t count = 0;
  for (int64_t i = 0; i < p.tokens; ++i) s.first[i] = 0;
  for (int64_t t = 0; t < a.count; ++t) {
    const int64_t position = row_position(a, item, t);
    if (position < 0 || s.role[position] != kSource || s.first[position]) continue;
    s.first[position] = 1;  // a repeated row counts once
    const uint32_t key = rank_key(score[t], row_masked(a, item, position), index[t] >= 0);
    s.keys[count++] = static_cast<uint64_t>(key) << 32 | static_cast<uint32_t>(t);
  }
  if (count > 0) radix_sort(s.keys, s.spare, count, 32, 32);
  return count;
}

int64_t count_leaving(const BipartiteParams& p, int64_t item, const Scratch& s, int64_t count) {
  const int64_t limit = p.r < count ? p.r : count;
  if (!p.by_threshold) return limit;
  const float* score = p.match.score + item * p.match.a.count;
  const int32_t* index = p.match.index + item * p.match.a.count;
  int64_t leaving = 0;
  while (leaving < limit && index[s.row_at(leaving)] >= 0 &&
         score[s.row_at(leaving)] > p.threshold) {
    ++leaving;
  }
  return leaving;
}

// Gives the survivors their slots in ToMe's order; returns the number of slots.
int64_t number_by_side(const BipartiteParams& p, int64_t item, const Scratch& s, int64_t count,
                       int64_t leaving, int32_t* map) {
  const TokenSet &a = p.match.a, &b = p.match.b;
  int64_t next = 0;
  const auto number = [&](int64_t position) {
    const bool dropped = p.by_threshold && row_masked(a, item, position);
    map[position] = dropped ? -1 : static_cast<int32_t>(next++);
  };
  constexpr Role kFirst[] = {kPrefix, kOther};
  for (Role role : kFirst) {
    for (int64_t i = 0; i < p.tokens; ++i) {
      if (s.role[i] == role) number(i);
    }
  }
  if (p.num_prefix == 0) {
    for (int64_t i = leaving; i < count; ++i) number(row_position(a, item, s.row_at(i)));
  } else {
    // Row order: mark the survivors, then walk the rows once.
    for (int64_t i = 0; i < count; ++i) s.stays[s.row_at(i)] = i >= leaving;
    for (int64_t i = 0; i < count; ++i) s.first[row_position(a, item, s.row_at(i))] = s.row_at(i);
    for (int64_t t = 0; t < a.count; ++t) {
      const int64_t position = row_position(a, item, t);
      if (position < 0 || s.role[position] != kSource || s.first[position] != t) continue;
      if (s.stays[t]) number(position);
    }
  }
  for (int64_t i = 0; i < p.tokens; ++i) s.first[i] = 0;
  for (int64_t t = 0; t < b.count; ++t) {
    const int64_t position = row_position(b, item, t);
    if (position < 0 || s.role[position] != kDestination || s.first[position]) continue;
    s.first[position] = 1;
    number(position);
  }
  return next;
}

// Gives the groups their slots by the position of their first member; returns their number.
int64_t number_by_position(const BipartiteParams& p, int64_t item, const Scratch& s,
                           int64_t leaving, int32_t* map) {
  const TokenSet &a = p.match.a, &b = p.match.b;
  const int32_t* index = p.match.index + item * a.count;
  for (int64_t i = 0; i < p.tokens; ++i) {
    s.first[i] = p.by_threshold && row_masked(a, item, i) ? -1 : static_cast<int32_t>(i);
  }
  for (int64_t i = 0; i < leaving; ++i) {
    const int32_t t = s.row_at(i);
    const int64_t source = row_position(a, item, t);
    s.first[source] = -1;
    if (index[t] < 0) continue;
    int32_t& first = s.first[row_position(b, item, index[t])];
    if (source < first) first = static_cast<int32_t>(source);
  }
  // At the position of a group's first member, map holds the group's owner; then the slots.
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
void map_tokens(const BipartiteParams& p, int64_t item, Scratch& s) {
  const TokenSet &a = p.match.a, &b = p.match.b;
  const int32_t* index = p.match.index + item * a.count;
  int32_t* map = p.token_map + item * p.tokens;
  assign_roles(p, item, s.role);
  const int64_t count = rank_sources(p, item, s);
  const int64_t leaving = count_leaving(p, item, s, count);
  const int64_t slots = p.order == Order::tome ? number_by_side(p, item, s, count, leaving, map)
                                               : number_by_position(p, item, s, leaving, map);
  for (int64_t i = 0; i < leaving; ++i) {
    const int32_t t = s.row_at(i);
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

}  // namespace

int64_t bipartite_soft_matching_workspace(const BipartiteParams& p, const Parallel& parallel) {
  const int64_t scores = match_workspace(p.match, parallel);
  const int64_t maps = parallel.threads * scratch_bytes(p);
  return scores > maps ? scores : maps;
}

void bipartite_soft_matching(const BipartiteParams& p, const Parallel& parallel) {
  if (p.match.a.count > 0) match(p.match, parallel);
  parallel_tasks(parallel, p.match.batch, [&](int64_t item, int64_t worker) {
    Workspace memory(static_cast<char*>(p.match.workspace) + worker * scratch_bytes(p));
    Scratch s = allocate_scratch(memory, p);
    map_tokens(p, item, s);
  });
}

}  // namespace tokred::TOKRED_ISA
