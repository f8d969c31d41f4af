// eviction_slot: the weights that a query gives to the keys of a head, summed over its group and
// added to what they had, in one pass; then the first key of minimum rank, sixteen at a time. Hq
// exponentials a key; a layer of 9 heads and 1024 keys reads 49 KB.
#include <limits>

#include "common/cpu/parallel.h"
#include "common/cpu/row.h"
#include "common/cpu/sizes.h"
#include "common/cpu/vexp.h"
#include "common/cpu/vtanh.h"
#include "topk/params.h"

namespace tokred::TOKRED_ISA {
namespace {

constexpr float kHidden = -kInfinity<float>;

const float* bias_of(const EvictionSlotParams& p, int64_t batch, int64_t head) {
  if (!p.bias) return nullptr;
  return p.bias + batch * p.bias_stride_batch + head * p.bias_stride_head;
}

// Whether the query's own token is hidden.
bool is_own_hidden(const EvictionSlotParams& p, int64_t batch, int64_t head) {
  if (!p.bias) return false;
  int64_t own = p.slots - 1;
  if (p.newest) own = p.newest[batch * p.newest_stride_batch + head * p.newest_stride_head];
  return own >= 0 && own < p.slots && !(bias_of(p, batch, head)[own] > kHidden);
}

// out[n]: the mean of the weights of the heads [first, end) of queries.
void receive(const EvictionSlotParams& p, int64_t batch, int64_t first, int64_t end, float* out) {
  const int64_t group = p.heads_q / p.heads;
  for (int64_t n = 0; n < p.slots; n += kLanes) {
    const int64_t count = min(p.slots - n, kLanes);
    f32x16 total = splat(0.0f);
    for (int64_t q = first; q < end; ++q) {
      const float lse = p.lse[batch * p.lse_stride_batch + q * p.lse_stride_head];
      if (lse == kHidden || is_own_hidden(p, batch, q / group)) continue;
      f32x16 x =
          load_row(p.logits + batch * p.logits_stride_batch + q * p.logits_stride_head + n, count);
      if (p.softcap > 0) x = tanh(x / splat(p.softcap)) * splat(p.softcap);
      x = x - splat(lse);
      if (const float* bias = bias_of(p, batch, q / group)) {
        const f32x16 added = load_row(bias + n, count);
        const f32x16 weight = exp(min(splat(88.0f), x + added));
        total = total + select_greater(added, splat(kHidden), weight, splat(0.0f));
      } else {
        total = total + exp(min(splat(88.0f), x));
      }
    }
    store_row(out + n, total / splat(static_cast<float>(end - first)), count);
  }
}

// Ranks of numbers, and the ranks of keys that must go and of keys that must stay.
template <class T>
constexpr T kStays = std::numeric_limits<T>::max();
template <>
constexpr float kStays<float> = kInfinity<float>;
template <class T>
constexpr T kGoes = std::numeric_limits<T>::min();
template <>
constexpr float kGoes<float> = kHidden;

TOKRED_INLINE f32x16 rank_of(f32x16 x, bool largest) {
  return select_number(x, largest ? splat(0.0f) - x : x, splat(kHidden));
}
TOKRED_INLINE i32x16 rank_of(i32x16 x, bool largest) {
  // The ends of the range are for keys that stay and keys that go.
  x = min(max(x, splat(kGoes<int32_t> + 1)), splat(kStays<int32_t> - 1));
  return largest ? splat(-1) - x : x;
}
TOKRED_INLINE i32x16 load_positions(const int32_t* p, int64_t count) {
  if (count >= kLanes) return load(p);
  int32_t lane[kLanes] = {};
  copy_bytes(lane, p, 4 * count);
  return load(lane);
}

// The first key of minimum rank. number(n, count): the numbers of sixteen keys, any beyond count.
template <class T, class F>
int32_t first_of_min_rank(const EvictionSlotParams& p, int64_t batch, int64_t head,
                          const F& number) {
  const int32_t* position =
      p.position + batch * p.position_stride_batch + head * p.position_stride_head;
  const float* bias = bias_of(p, batch, head);
  const int32_t start = p.start ? p.start[batch * p.start_stride] : 0;
  const auto last =
      static_cast<int32_t>(min(int64_t{start} + p.first - 1, std::numeric_limits<int32_t>::max()));
  alignas(64) int32_t lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  Vec<T> lowest = splat(kStays<T>);
  i32x16 slot = load(lane), key = slot;
  for (int64_t n = 0; n < p.slots; n += kLanes, key = key + splat(int32_t{kLanes})) {
    const int64_t count = min(p.slots - n, kLanes);
    Vec<T> rank = rank_of(number(n, count), p.largest);
    const i32x16 key_position = load_positions(position + n, count);
    if (p.first > 0) {
      const Vec<T> sink = select_greater(key_position, splat(last), rank, splat(kStays<T>));
      rank = select_greater(splat(start), key_position, rank, sink);
    }
    rank = select_greater(key_position, splat(p.recent_after), splat(kStays<T>), rank);
    if (bias) {
      rank = select_greater(load_row(bias + n, count), splat(kHidden), rank, splat(kGoes<T>));
    }
    if (count < kLanes) {
      alignas(64) T tail[kLanes];
      store(tail, rank);
      for (int64_t i = count; i < kLanes; ++i) tail[i] = kStays<T>;
      rank = load(tail);
    }
    slot = select_greater(lowest, rank, key, slot);
    lowest = select_greater(lowest, rank, rank, lowest);
  }
  alignas(64) T ranks[kLanes];
  store(ranks, lowest);
  store(lane, slot);
  int best = 0;
  for (int i = 1; i < kLanes; ++i) {
    if (ranks[i] < ranks[best] || (ranks[i] == ranks[best] && lane[i] < lane[best])) best = i;
  }
  return lane[best];
}

void choose(const EvictionSlotParams& p, int64_t batch, int64_t head) {
  const int64_t row = batch * p.heads + head;
  const float* scores =
      p.scores ? p.scores + batch * p.scores_stride_batch + head * p.scores_stride_head : nullptr;
  if (p.slots == 0) {
    p.slot[row] = -1;
  } else if (p.total) {
    float* total = p.total + row * p.slots;
    p.slot[row] = first_of_min_rank<float>(p, batch, head, [&](int64_t n, int64_t count) {
      f32x16 x = load_row(total + n, count);
      if (scores) {
        x = load_row(scores + n, count) + x;
        store_row(total + n, x, count);
      }
      return x;
    });
    total[p.slot[row]] = 0;
  } else if (scores) {
    p.slot[row] = first_of_min_rank<float>(
        p, batch, head, [&](int64_t n, int64_t count) { return load_row(scores + n, count); });
  } else {
    const int32_t* position =
        p.position + batch * p.position_stride_batch + head * p.position_stride_head;
    p.slot[row] = first_of_min_rank<int32_t>(p, batch, head, [&](int64_t n, int64_t count) {
      return load_positions(position + n, count);
    });
  }
}

}  // namespace

void eviction_slot(const EvictionSlotParams& p, const Parallel& parallel) {
  constexpr int64_t kTaskKeys = 4096;  // exponentials that are worth a task of their own
  const bool shared = p.shared && p.logits;
  const int64_t rows = shared ? p.batch : p.batch * p.heads, heads = shared ? p.heads : 1;
  const int64_t cost = (p.logits ? heads * (p.heads_q / p.heads) * 4 : heads) * p.slots;
  const int64_t step = kTaskKeys / (cost + 1) + 1;
  parallel_tasks(parallel, divide_up(rows, step), [&](int64_t task, int64_t) {
    for (int64_t row = task * step; row < min(rows, (task + 1) * step); ++row) {
      const int64_t batch = row * heads / p.heads, head = row * heads % p.heads;
      if (p.logits) {
        const int64_t group = p.heads_q / p.heads;
        float* total = p.total + row * heads * p.slots;
        receive(p, batch, head * group, (head + heads) * group, total);
        for (int64_t h = 1; h < heads; ++h) copy_bytes(total + h * p.slots, total, 4 * p.slots);
      }
      for (int64_t h = 0; h < heads; ++h) choose(p, batch, head + h);
    }
  });
}

}  // namespace tokred::TOKRED_ISA
