// combine_states on the CPU: attention over two disjoint sets of keys, merged by their lse.
#include "attention/cpu/tile.h"
#include "common/cpu/parallel.h"
#include "sparse_attn/params.h"

namespace tokred::TOKRED_ISA {
namespace {

// weight * row, 0 where the weight is 0: such a row is not looked at.
template <class T>
TOKRED_INLINE Vec<Accumulator<T>> weighted(Accumulator<T> weight, const T* row, int64_t count) {
  const auto zero = splat(Accumulator<T>{0});
  return weight == 0 ? zero : load_row(row, count) * splat(weight);
}

template <class T>
void combine_row(const CombineParams& p, int64_t row) {
  using Acc = Accumulator<T>;
  const int64_t query = row % p.queries, head = row / p.queries % p.heads;
  const int64_t batch = row / p.queries / p.heads;
  const Acc lse_a = static_cast<const Acc*>(p.lse_a)[row];
  const Acc lse_b = static_cast<const Acc*>(p.lse_b)[row];
  const Acc top = lse_a > lse_b ? lse_a : lse_b;
  const Acc base = top == -kInfinity<Acc> ? 0 : top;
  Acc weight_a[kLanes], weight_b[kLanes];
  store(weight_a, exp(splat(lse_a - base)));
  store(weight_b, exp(splat(lse_b - base)));
  const Acc total = weight_a[0] + weight_b[0];

  const T* a = key_row<T>(p.out_a, batch, head, query);
  const T* b = key_row<T>(p.out_b, batch, head, query);
  T* out = static_cast<T*>(p.out) + row * p.dim;
  for (int64_t d = 0; d < p.dim; d += kLanes) {
    const int64_t count = p.dim - d;
    const auto sum = weighted(weight_a[0], a + d, count) + weighted(weight_b[0], b + d, count);
    store_row(out + d, total == 0 ? sum : sum / splat(total), count);
  }
  static_cast<Acc*>(p.lse)[row] = total == 0 ? -kInfinity<Acc> : base + std::log(total);
}

}  // namespace

void combine_states(const CombineParams& p, const Parallel& parallel) {
  constexpr int64_t kRows = 64;  // of a task
  const int64_t rows = p.batch * p.heads * p.queries;
  visit_dtype(p.dtype, [&]<class T>() {
    parallel_tasks(parallel, divide_up(rows, kRows), [&](int64_t task, int64_t) {
      const int64_t end = min((task + 1) * kRows, rows);
      for (int64_t row = task * kRows; row < end; ++row) combine_row<T>(p, row);
    });
  });
}

}  // namespace tokred::TOKRED_ISA
