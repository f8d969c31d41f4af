// Lists of positions, and gathering tokens by them. compact reads the row once and writes the list
// once; a gather moves 2 * K * row_bytes, past the cache where the results are large.
#include "common/cpu/parallel.h"
#include "common/cpu/row.h"
#include "topk/cpu/lanes.h"
#include "topk/cpu/rows.h"

namespace tokred::TOKRED_ISA {
namespace {

// The lanes of sixteen entries, of which `count` are there, that are selected.
TOKRED_INLINE uint32_t selected_mask(const uint8_t* row, int64_t count, float) {
  if (count >= kLanes) return nonzero_mask(row);
  uint8_t lane[kLanes] = {};
  std::memcpy(lane, row, static_cast<size_t>(count));
  return nonzero_mask(lane);
}
template <class T>
TOKRED_INLINE uint32_t selected_mask(const T* row, int64_t count, float threshold) {
  const uint32_t mask = greater_mask(load_row(row, count), splat(threshold));
  return count >= kLanes ? mask : mask & ((1u << count) - 1);
}

template <class T>
void compact_row(const CompactParams& p, int64_t r) {
  const T* row = row_start<T>(p.selected, r);
  const int64_t length = row_number(p.lengths, r, p.columns);
  int32_t* to = p.indices + r * p.capacity;
  int64_t written = 0;
  for (int64_t i = 0; i < length && written < p.capacity; i += kLanes) {
    const uint32_t mask = selected_mask(row + i, length - i, p.threshold);
    const i32x16 position = load(kLaneNumbers) + splat(static_cast<int32_t>(i));
    const int64_t room = p.capacity - written, count = bit_count(mask);
    if (room >= kLanes) {
      pack_lanes(to + written, position, mask);
      written += count;
    } else {
      int32_t lane[kLanes];
      pack_lanes(lane, position, mask);
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

// Copies the listed rows [first, last) of one batch item and head.
void gather_rows(const GatherParams& p, const GatherItem& item, int64_t batch, int64_t head,
                 int64_t first, int64_t last, bool stream) {
  const int32_t* indices =
      p.indices + batch * p.index_stride_batch + head * p.index_stride_head;
  const char* source = static_cast<const char*>(item.source) + batch * item.stride_batch +
                       head * item.stride_head;
  char* out =
      static_cast<char*>(item.out) + (batch * item.heads + head) * p.count * item.row_bytes;
  for (int64_t i = first; i < last; ++i) {
    const int64_t token = indices[i];
    if (token >= 0 && token < item.tokens) {
      copy_row(out + i * item.row_bytes, source + token * item.stride_token, item.row_bytes,
               stream);
    } else {
      fill_zero(out + i * item.row_bytes, item.row_bytes);
    }
  }
}

}  // namespace

void compact(const CompactParams& p, const Parallel& parallel) {
  if (p.is_bool) return compact_rows<uint8_t>(p, parallel);
  visit_f32(p.dtype, [&]<class T>() { compact_rows<T>(p, parallel); });
}

void gather_tokens(const GatherParams& p, const Parallel& parallel) {
  constexpr int64_t kTaskBytes = 64 << 10;
  int64_t first_task[kMaxGatherItems + 1] = {}, step[kMaxGatherItems];
  for (int64_t n = 0; n < p.items; ++n) {
    const GatherItem& item = p.item[n];
    step[n] = kTaskBytes / (item.row_bytes + 1) + 1;
    const int64_t chunks = divide_up(p.count, step[n]);
    first_task[n + 1] = first_task[n] + p.batch * item.heads * chunks;
  }
  parallel_tasks(parallel, first_task[p.items], [&](int64_t task, int64_t) {
    int64_t n = 0;
    while (task >= first_task[n + 1]) ++n;
    const GatherItem& item = p.item[n];
    const int64_t chunks = divide_up(p.count, step[n]);
    const int64_t within = task - first_task[n], list = within / chunks;
    const int64_t first = within % chunks * step[n];
    const int64_t last = first + step[n] < p.count ? first + step[n] : p.count;
    const bool stream = p.batch * item.heads * p.count * item.row_bytes >= kStreamBytes;
    gather_rows(p, item, list / item.heads, list % item.heads, first, last, stream);
    if (stream) stream_fence();
  });
}

}  // namespace tokred::TOKRED_ISA
