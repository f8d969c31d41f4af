// adjacent_runs: cosines of neighbouring tokens, by tasks of rows, then one walk over each item
// that cuts it into runs. Every row is read once from memory and again from the cache.
#include "common/cpu/parallel.h"
#include "common/cpu/row.h"
#include "merge/params.h"

namespace tokred::TOKRED_ISA {
namespace {

constexpr int64_t kRowsPerTask = 128;

bool is_live(const AdjacentRunsParams& p, int64_t item, int64_t token) {
  return !p.mask || p.mask[item * p.mask_stride_batch + token * p.mask_stride_token];
}

template <class T>
float cosine(const T* x, const T* y, int64_t channels) {
  f32x16 dot = splat(0.0f), xx = splat(0.0f), yy = splat(0.0f);
  for (int64_t c = 0; c < channels; c += kLanes) {
    const f32x16 a = load_row(x + c, channels - c), b = load_row(y + c, channels - c);
    dot = fma(a, b, dot);
    xx = fma(a, a, xx);
    yy = fma(b, b, yy);
  }
  return sum(dot) * inverse_norm(sum(xx)) * inverse_norm(sum(yy));
}

template <class T>
void write_cosines(const AdjacentRunsParams& p, const Parallel& parallel) {
  const int64_t chunks = (p.tokens + kRowsPerTask - 1) / kRowsPerTask;
  parallel_tasks(parallel, p.batch * chunks, [&](int64_t task, int64_t) {
    const int64_t item = task / chunks, first = task % chunks * kRowsPerTask;
    const int64_t last = first + kRowsPerTask < p.tokens ? first + kRowsPerTask : p.tokens;
    for (int64_t t = first; t < last; ++t) {
      const bool both = t > 0 && is_live(p, item, t) && is_live(p, item, t - 1);
      const T* x = static_cast<const T*>(p.x) + item * p.x_stride_batch;
      const T* y = static_cast<const T*>(p.y) + item * p.y_stride_batch;
      p.cosine[item * p.tokens + t] =
          both ? cosine(x + (t - 1) * p.x_stride_token, y + t * p.y_stride_token, p.channels)
               : 0.0f;
    }
  });
}

void cut(const AdjacentRunsParams& p, int64_t item) {
  int32_t* ids = p.ids + item * p.tokens;
  int32_t* start = p.start + item * p.tokens;
  int32_t* length = p.length + item * p.tokens;
  int64_t live_tokens = 0;
  for (int64_t t = 0; t < p.tokens; ++t) live_tokens += is_live(p, item, t);
  int64_t runs = 0, rank = 0;
  bool before = false;  // the token before is neither masked nor protected
  for (int64_t t = 0; t < p.tokens; ++t) {
    if (!is_live(p, item, t)) {
      ids[t] = -1;
      before = false;
      continue;
    }
    const bool free = rank >= p.num_sinks && rank < live_tokens - p.num_locals;
    ++rank;
    const bool joins = before && free && p.cosine[item * p.tokens + t] >= p.threshold &&
                       length[runs - 1] < p.max_length;
    if (!joins) {
      start[runs] = static_cast<int32_t>(t);
      length[runs++] = 0;
    }
    ++length[runs - 1];
    ids[t] = static_cast<int32_t>(runs - 1);
    before = free;
  }
  p.count[item] = static_cast<int32_t>(runs);
  for (; runs < p.tokens; ++runs) start[runs] = length[runs] = -1;
}

}  // namespace

void adjacent_runs(const AdjacentRunsParams& p, const Parallel& parallel) {
  visit_f32(p.dtype, [&]<class T>() { write_cosines<T>(p, parallel); });
  parallel_tasks(parallel, p.batch, [&](int64_t item, int64_t) { cut(p, item); });
}

}  // namespace tokred::TOKRED_ISA
