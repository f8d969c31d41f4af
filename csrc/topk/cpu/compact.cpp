// compact: stream compaction of positions, or of the entries of a list. A row is read once, sixteen
// entries a step, and its list is written once.
#include "common/cpu/copy.h"
#include "common/cpu/parallel.h"
#include "common/cpu/row.h"
#include "topk/cpu/lanes.h"
#include "topk/cpu/rows.h"

namespace tokred::TOKRED_ISA {
namespace {

// The selected lanes of sixteen entries, of which the first `count` exist.
TOKRED_INLINE uint32_t selected_mask(const uint8_t* row, int64_t count, float) {
  if (count >= kLanes) return nonzero_mask(row);
  uint8_t lane[kLanes] = {};
  std::memcpy(lane, row, static_cast<size_t>(count));
  return nonzero_mask(lane);
}
TOKRED_INLINE uint32_t selected_mask(const int32_t* row, int64_t count, float) {
  if (count >= kLanes) return ~negative_mask(load(row)) & 0xffff;
  int32_t lane[kLanes] = {};
  copy_bytes(lane, row, 4 * count);
  return ~negative_mask(load(lane)) & ((1u << count) - 1);
}
template <class T>
TOKRED_INLINE uint32_t selected_mask(const T* row, int64_t count, float threshold) {
  const uint32_t mask = greater_mask(load_row(row, count), splat(threshold));
  return count >= kLanes ? mask : mask & ((1u << count) - 1);
}

// What is written for sixteen entries from i: where they are, or of a list what they are.
template <class T>
TOKRED_INLINE i32x16 entries(const T*, int64_t i, int64_t) {
  return load(kLaneNumbers) + splat(static_cast<int32_t>(i));
}
TOKRED_INLINE i32x16 entries(const int32_t* row, int64_t i, int64_t length) {
  if (length - i >= kLanes) return load(row + i);
  int32_t lane[kLanes] = {};
  copy_bytes(lane, row + i, 4 * (length - i));
  return load(lane);
}

template <class T>
void compact_row(const CompactParams& p, int64_t r) {
  const T* row = row_start<T>(p.selected, r);
  const int64_t length = row_number(p.lengths, r, p.columns);
  int32_t* to = p.indices + r * p.capacity;
  int64_t written = 0;
  for (int64_t i = 0; i < length && written < p.capacity; i += kLanes) {
    const uint32_t mask = selected_mask(row + i, length - i, p.threshold);
    const i32x16 entry = entries(row, i, length);
    const int64_t room = p.capacity - written, count = bit_count(mask);
    if (room >= kLanes) {
      pack_lanes(to + written, entry, mask);
      written += count;
    } else {
      int32_t lane[kLanes];
      pack_lanes(lane, entry, mask);
      const int64_t fits = count < room ? count : room;
      copy_bytes(to + written, lane, 4 * fits);
      written += fits;
    }
  }
  p.counts[r] = static_cast<int32_t>(written);
  for (; written < p.capacity; ++written) to[written] = -1;
}

template <class T>
void compact_rows(const CompactParams& p, const Parallel& parallel) {
  const int64_t step = rows_per_task(p.columns + p.capacity);
  parallel_tasks(parallel, divide_up(p.rows, step), [&](int64_t task, int64_t) {
    const int64_t last = (task + 1) * step < p.rows ? (task + 1) * step : p.rows;
    for (int64_t r = task * step; r < last; ++r) compact_row<T>(p, r);
  });
}

}  // namespace

void compact(const CompactParams& p, const Parallel& parallel) {
  if (p.is_bool) return compact_rows<uint8_t>(p, parallel);
  if (p.is_list) return compact_rows<int32_t>(p, parallel);
  visit_f32(p.dtype, [&]<class T>() { compact_rows<T>(p, parallel); });
}

}  // namespace tokred::TOKRED_ISA
