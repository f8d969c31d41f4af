// inverse_transform_sample: adaptive token sampling by inverse transform sampling. A radix sort of
// every row, its cumulative sums as integers, and a binary search for every sample.
#include "common/cpu/copy.h"
#include "common/cpu/parallel.h"
#include "common/cpu/sort.h"
#include "topk/cpu/rows.h"

namespace tokred::TOKRED_ISA {
namespace {

struct Scratch {
  uint64_t* keys;   // [columns] score bits, position
  uint64_t* spare;  // [columns] of the sort, then cumulative sums
  double* curve;    // [columns] normalised sums
  uint8_t* picked;  // [columns]
};

Scratch allocate_scratch(Workspace& memory, const InverseTransformParams& p) {
  Scratch s;
  s.keys = memory.allocate<uint64_t>(p.columns);
  s.spare = memory.allocate<uint64_t>(p.columns);
  s.curve = memory.allocate<double>(p.columns);
  s.picked = memory.allocate<uint8_t>(p.columns);
  return s;
}
int64_t scratch_bytes(const InverseTransformParams& p) {
  return workspace_bytes([&](Workspace& memory) { allocate_scratch(memory, p); });
}

// Lists the unmasked entries of a row by ascending score; returns how many.
template <class T>
int64_t sort_row(const InverseTransformParams& p, int64_t r, Scratch& s) {
  const T* row = row_start<T>(p.scores, r);
  const uint8_t* mask = row_start<uint8_t>(p.mask, r);
  int64_t count = 0;
  for (int64_t i = 0; i < p.columns; ++i) {
    if (mask && !mask[i]) continue;
    const float x = to_float(row[i]);
    const float score = x > 0 ? (x < __FLT_MAX__ ? x : __FLT_MAX__) : 0.0f;
    uint32_t bits;  // ascending with the score, which is not negative
    std::memcpy(&bits, &score, 4);
    s.keys[count++] = static_cast<uint64_t>(bits) << 32 | static_cast<uint32_t>(i);
  }
  if (count > 0) radix_sort(s.keys, s.spare, count, 32, 32);
  return count;
}

TOKRED_INLINE double score_of(uint64_t key) {
  const auto bits = static_cast<uint32_t>(key >> 32);
  float score;
  std::memcpy(&score, &bits, 4);
  return score;
}

// Fills the curve; returns the position on it of the first sample.
double make_curve(const Scratch& s, int64_t count) {
  constexpr double kOne = static_cast<double>(int64_t{1} << kProbabilityBits);
  const double max_score = score_of(s.keys[count - 1]);
  const double divisor = max_score > 0 ? max_score : 1.0;
  uint64_t total = 0;
  for (int64_t j = 0; j < count; ++j) {
    // The entry of the minimum is where the curve starts.
    if (j > 0) total += static_cast<uint64_t>(score_of(s.keys[j]) / divisor * kOne);
    s.spare[j] = total;
  }
  const double span = total > 0 ? static_cast<double>(total) : 1.0;
  double start = 0.0;
  for (int64_t j = count - 1; j >= 0; --j) {
    s.curve[j] = static_cast<double>(s.spare[j]) / span;
    if (s.curve[j] > 0) start = s.curve[j];
  }
  return start;
}

// Binary search: the first of [0, end) for which `is` holds; from there on it must hold everywhere.
template <class Is>
TOKRED_INLINE int64_t first_where(int64_t end, const Is& is) {
  int64_t begin = 0;
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (is(middle)) {
      end = middle;
    } else {
      begin = middle + 1;
    }
  }
  return begin;
}

// The first entry of the curve at the minimum distance from `where`.
int64_t nearest(const double* curve, int64_t count, double where) {
  const int64_t above = first_where(count, [&](int64_t j) { return curve[j] >= where; });
  if (above == 0) return 0;
  double distance = where - curve[above - 1];
  if (above < count && curve[above] - where < distance) return above;
  // Distances fall up to here, and may be equal where they are rounded.
  return first_where(above - 1, [&](int64_t j) { return where - curve[j] <= distance; });
}

template <class T>
void sample_row(const InverseTransformParams& p, int64_t r, Scratch& s) {
  int32_t* indices = p.indices + r * p.num_samples;
  int64_t written = 0;
  if (const int64_t count = p.num_samples > 0 ? sort_row<T>(p, r, s) : 0; count > 0) {
    const double start = make_curve(s, count);
    const double steps = p.num_samples > 1 ? static_cast<double>(p.num_samples - 1) : 1.0;
    fill_zero(s.picked, count);
    const int64_t samples = start > 0 ? p.num_samples : 1;
    for (int64_t i = 0; i < samples; ++i) {
      const double where = start + static_cast<double>(i) * (1.0 - start) / steps;
      s.picked[nearest(s.curve, count, where)] = 1;
    }
    for (int64_t j = 0; j < count; ++j) {
      if (s.picked[j]) indices[written++] = static_cast<int32_t>(s.keys[j]);
    }
  }
  p.counts[r] = static_cast<int32_t>(written);
  for (; written < p.num_samples; ++written) indices[written] = -1;
}

}  // namespace

int64_t inverse_transform_sample_workspace(const InverseTransformParams& p,
                                           const Parallel& parallel) {
  return parallel.threads * scratch_bytes(p);
}

void inverse_transform_sample(const InverseTransformParams& p, const Parallel& parallel) {
  const int64_t step = rows_per_task(8 * (p.columns + p.num_samples));
  visit_f32(p.dtype, [&]<class T>() {
    parallel_tasks(parallel, divide_up(p.rows, step), [&](int64_t task, int64_t worker) {
      Workspace memory(static_cast<char*>(p.workspace) + worker * scratch_bytes(p));
      Scratch s = allocate_scratch(memory, p);
      const int64_t last = (task + 1) * step < p.rows ? (task + 1) * step : p.rows;
      for (int64_t r = task * step; r < last; ++r) sample_row<T>(p, r, s);
    });
  });
}

}  // namespace tokred::TOKRED_ISA
