// Attention of few query rows by splits of their keys (Flash-Decoding): a list is cut into splits
// of kKeySplit entries, whose partial results are merged in order; splits are tasks where there are
// few lists.
#pragma once

#include "attention/cpu/gather.h"
#include "common/cpu/parallel.h"

namespace tokred::TOKRED_ISA {

inline constexpr int64_t kKeySplit = 1024;  // entries; part of the result's definition

// The partial result of some rows: out is a sum over keys of exp(logit - top) v.
template <class Acc>
struct Partial {
  int64_t rows, stride;  // a row of out is `stride` numbers: whole_lanes(value_dim)
  Acc *out, *top, *total;

  Partial(Acc* memory, int64_t row_count, int64_t value_dim)
      : rows(row_count), stride(whole_lanes(value_dim)), out(memory), top(out + rows * stride),
        total(top + rows) {}
  static constexpr int64_t numbers(int64_t rows, int64_t value_dim) {
    return rows * (whole_lanes(value_dim) + 2);
  }

  void clear() {
    fill_zero(out, rows * stride * static_cast<int64_t>(sizeof(Acc)));
    for (int64_t row = 0; row < rows; ++row) top[row] = -kInfinity<Acc>, total[row] = 0;
  }

  // Adds keys that follow.
  void merge(const Partial& other) {
    for (int64_t row = 0; row < rows; ++row) {
      const Acc joint = other.top[row] > top[row] ? other.top[row] : top[row];
      const Acc base = joint > -kInfinity<Acc> ? joint : 0;
      const Vec<Acc> here = exp(splat(top[row] - base)), there = exp(splat(other.top[row] - base));
      for (int64_t c = row * stride; c < (row + 1) * stride; c += kLanes) {
        store(out + c, fma(load(out + c), here, load(other.out + c) * there));
      }
      const Vec<Acc> sum = fma(splat(total[row]), here, splat(other.total[row]) * there);
      store_row(total + row, sum, 1);
      top[row] = joint;
    }
  }
};

// Logits [rows][kGather] to weights exp(logit - top), after moving top; the sums so far are to be
// multiplied by shrink[row].
template <class Acc>
__attribute__((noinline)) static void exponentiate(int64_t rows, int64_t count, Acc* weights,
                                                   Acc* shrink, const Partial<Acc>& result) {
  Acc base[kMaxRows];
  for (int64_t row = 0; row < rows; ++row) {
    const Acc* logits = weights + row * kGather;
    Vec<Acc> most = splat(result.top[row]);
    for (int64_t i = 0; i < count; i += kLanes) most = max(load(logits + i), most);
    const Acc top = max_lane(most);
    // A row that has seen nothing yet: exp(-inf - 0), not exp(-inf + inf).
    base[row] = top > -kInfinity<Acc> ? top : 0;
    shrink[row] = result.top[row] - base[row];
    result.top[row] = top;
  }
  for (int64_t row = 0; row < rows; row += kLanes) {
    store_row(shrink + row, exp(load_row(shrink + row, rows - row)), rows - row);
  }
  for (int64_t row = 0; row < rows; ++row) {
    Acc* logits = weights + row * kGather;
    Vec<Acc> sum_of = splat(Acc{0});
    for (int64_t i = 0; i < count; i += kLanes) {
      const Vec<Acc> weight = exp(load(logits + i) - splat(base[row]));
      store(logits + i, weight);
      sum_of = sum_of + weight;
    }
    result.total[row] = result.total[row] * shrink[row] + sum(sum_of);
  }
}

inline int64_t splits_of(const KeyLists& lists) {
  return max(divide_up(lists.length, kKeySplit), 1);
}
// Few lists are cut into tasks by their splits; of many, each is a task. The result is the same.
inline bool splits_are_tasks(const ListTasks& list_tasks, const KeyLists& lists, int64_t threads) {
  return splits_of(lists) > 1 && list_tasks.count < 4 * threads;
}
template <class Acc>
inline int64_t split_workspace(const AttentionParams& p, const KeyLists& lists,
                               const Parallel& parallel) {
  const ListTasks list_tasks(p, lists);
  if (!splits_are_tasks(list_tasks, lists, parallel.threads)) return 0;
  return list_tasks.count * splits_of(lists) *
         Partial<Acc>::numbers(list_tasks.chunk_rows, p.value_dim) *
         static_cast<int64_t>(sizeof(Acc));
}

// Calls run(rows, split, partial result) for all splits of all lists, merges the partial results,
// and calls write(rows, result). p.workspace has split_workspace() bytes.
template <class Acc, class Run, class Write>
void run_splits(const AttentionParams& p, const KeyLists& lists, const Parallel& parallel,
                const Run& run, const Write& write) {
  const ListTasks list_tasks(p, lists);
  const int64_t splits = splits_of(lists);
  if (!splits_are_tasks(list_tasks, lists, parallel.threads)) {
    parallel_tasks(parallel, list_tasks.count, [&](int64_t task, int64_t) {
      const ListRows at = list_tasks(p, lists, task);
      if (at.rows == 0) return;
      alignas(64) Acc memory[2][Partial<Acc>::numbers(kMaxRows, kMaxWideDim)];
      Partial<Acc> result(memory[0], at.rows, p.value_dim), next(memory[1], at.rows, p.value_dim);
      run(at, 0, result);
      for (int64_t split = 1; split < splits; ++split) {
        run(at, split, next);
        result.merge(next);
      }
      write(at, result);
    });
    return;
  }
  const auto partial = [&](const ListRows& at, int64_t index) {
    const int64_t numbers = Partial<Acc>::numbers(list_tasks.chunk_rows, p.value_dim);
    return Partial<Acc>(static_cast<Acc*>(p.workspace) + index * numbers, at.rows, p.value_dim);
  };
  parallel_tasks(parallel, list_tasks.count * splits, [&](int64_t task, int64_t) {
    const ListRows at = list_tasks(p, lists, task / splits);
    if (at.rows > 0) run(at, task % splits, partial(at, task));
  });
  parallel_tasks(parallel, list_tasks.count, [&](int64_t task, int64_t) {
    const ListRows at = list_tasks(p, lists, task);
    if (at.rows == 0) return;
    Partial<Acc> result = partial(at, task * splits);
    for (int64_t split = 1; split < splits; ++split) {
      result.merge(partial(at, task * splits + split));
    }
    write(at, result);
  });
}

}  // namespace tokred::TOKRED_ISA
