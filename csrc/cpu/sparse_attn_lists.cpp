// sparse_attention on the CPU, and the same over all keys for the decoding calls of
// biased_attention. A list is cut into splits of kSplit entries, as in Flash-Decoding, whose
// partial results are merged in order; splits are tasks where there are few lists.
#include "parallel.h"
#include "sparse_attn_decode.h"
#include "sparse_attn_gather.h"

namespace tokred::TOKRED_ISA {
namespace {

inline constexpr int64_t kSplit = 1024;  // entries; part of the result's definition

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
      const Acc greatest = other.top[row] > top[row] ? other.top[row] : top[row];
      const Acc base = greatest > -kInfinity<Acc> ? greatest : 0;
      const Vec<Acc> here = exp(splat(top[row] - base)), there = exp(splat(other.top[row] - base));
      for (int64_t c = row * stride; c < (row + 1) * stride; c += kLanes) {
        store(out + c, fma(load(out + c), here, load(other.out + c) * there));
      }
      const Vec<Acc> sum = fma(splat(total[row]), here, splat(other.total[row]) * there);
      store_row(total + row, sum, 1);
      top[row] = greatest;
    }
  }
};

template <class T>
void write_result(const AttentionParams& p, const ListRows& at,
                  const Partial<Accumulator<T>>& result) {
  using Acc = Accumulator<T>;
  const HeadTensor out{p.out, p.out_stride_batch, p.out_stride_head, p.out_stride_token};
  const auto out_rows = query_rows<T>(out, at.batch, at.list_head, at.heads);
  const auto lse_rows = query_rows<Acc>(contiguous(p.lse, p.heads_q, p.queries, 1), at.batch,
                                        at.list_head, at.heads);
  for (int64_t row = 0; row < at.rows; ++row) {
    const Acc total = result.total[row];
    T* to = out_rows[at.first_row + row];
    for (int64_t c = 0; c < p.value_dim; c += kLanes) {
      const Vec<Acc> sum = load(result.out + row * result.stride + c);
      store_channels(to + c, total == 0 ? splat(Acc{0}) : sum / splat(total), p.value_dim - c);
    }
    *lse_rows[at.first_row + row] =
        total == 0 ? -kInfinity<Acc> : result.top[row] + std::log(total);
  }
}

template <class T, bool kRotated>
struct KeyOf {
  using type = T;
};
template <class T>
struct KeyOf<T, true> {
  using type = Accumulator<T>;
};

template <class T, bool kRotated>
struct ListForward {
  using Acc = Accumulator<T>;
  using Key = typename KeyOf<T, kRotated>::type;

  const AttentionParams& p;
  const Rotation& rotation;
  const ListRows at;
  const RowSight sight;
  const int64_t stride;                           // of a packed query
  alignas(64) Acc query[kMaxRows * kMaxHeadDim];  // scaled
  alignas(64) Acc weights[kMaxRows * kGather];
  alignas(64) Acc shrink[kMaxRows];
  Gathered<T> blocks[2];
  alignas(64) Acc rotated[kRotated ? kGather * kMaxHeadDim : 1];
  const Key* rotated_rows[kRotated ? kGather : 1];

  ListForward(const SparseAttentionParams& s, const ListRows& list_rows)
      : p(s.attention), rotation(s.rotation), at(list_rows), sight(p, at),
        stride(whole_lanes(p.head_dim)) {
    const auto rows = query_rows<const T>(p.q, at.batch, at.list_head, at.heads);
    for (int64_t row = 0; row < at.rows; ++row) {
      const T* from = rows[at.first_row + row];
      const Acc scale = static_cast<Acc>(p.scale);
      if constexpr (kRotated) {
        Acc natural[kMaxHeadDim];
        pack_row(from, p.head_dim, natural);
        pack_channels(natural, p.head_dim, scale, query + row * stride);
      } else {
        pack_channels(from, p.head_dim, scale, query + row * stride);
      }
    }
  }

  // The entries [entry, end).
  void run(int64_t entry, int64_t end, Partial<Acc> result) {
    result.clear();
    Gathered<T>*block = &blocks[0], *next = &blocks[1];
    entry = block->choose(p, at, sight, entry, end);
    Ahead<T>{block->k, block->count, p.head_dim}.take(block->count);
    Ahead<T>{block->v, block->count, p.value_dim}.take(block->count);
    while (block->count > 0) {
      entry = next->choose(p, at, sight, entry, end);
      if (at.indices) next->find_pages();
      attend(*block, *next, result);
      Gathered<T>* done = block;
      block = next;
      next = done;
    }
  }

  void attend(const Gathered<T>& block, const Gathered<T>& next, Partial<Acc>& result) {
    Ahead<T> keys{next.k, next.count, p.head_dim};
    if constexpr (kRotated) {
      rotate(block);
      keys.take(next.count);
      dot_rows<Key>(query, stride, at.rows, rotated_rows, block.count, p.head_dim, weights,
                    kGather);
    } else {
      dot_rows<T>(query, stride, at.rows, block.k, block.count, p.head_dim, weights, kGather,
                  keys);
    }
    block.finish_logits(at.rows, weights);
    exponentiate(block.count, result);
    add_rows<T>(weights, kGather, at.rows, block.v, block.count, p.value_dim, shrink, result.out,
                result.stride, Ahead<T>{next.v, next.count, p.value_dim});
  }

  void rotate(const Gathered<T>& block) {
    const int64_t half = p.head_dim / 2;
    Acc row[kMaxHeadDim];
    for (int64_t i = 0; i < whole_lanes(block.count); ++i) {
      rotated_rows[i] = rotated + i * p.head_dim;
      if (i >= block.count) continue;
      pack_row(block.k[i], p.head_dim, row);
      const float* cos = rotation.cos + block.entry[i] * rotation.cos_stride;
      const float* sin = rotation.sin + block.entry[i] * rotation.sin_stride;
      Acc* to = rotated + i * p.head_dim;
      for (int64_t d = 0; d < half; ++d) {
        to[d] = row[d] * cos[d] - row[d + half] * sin[d];
        to[d + half] = row[d + half] * cos[d] + row[d] * sin[d];
      }
    }
  }

  // Turns logits into weights exp(logit - top), after moving top.
  __attribute__((noinline)) void exponentiate(int64_t count, Partial<Acc>& result) {
    for (int64_t row = 0; row < at.rows; ++row) {
      Acc* logits = weights + row * kGather;
      Vec<Acc> most = splat(result.top[row]);
      for (int64_t i = 0; i < count; i += kLanes) most = max(load(logits + i), most);
      Acc lane[kLanes];
      store(lane, most);
      Acc top = lane[0];
      for (int i = 1; i < kLanes; ++i) top = lane[i] > top ? lane[i] : top;
      // A row that has seen nothing yet: exp(-inf - 0), not exp(-inf + inf).
      const Acc base = top > -kInfinity<Acc> ? top : 0;
      Vec<Acc> sum_of = splat(Acc{0});
      for (int64_t i = 0; i < count; i += kLanes) {
        const Vec<Acc> weight = exp(load(logits + i) - splat(base));
        store(logits + i, weight);
        sum_of = sum_of + weight;
      }
      store(lane, exp(splat(result.top[row] - base)));
      shrink[row] = lane[0];
      result.total[row] = result.total[row] * lane[0] + sum(sum_of);
      result.top[row] = top;
    }
  }
};

int64_t splits_of(const KeyLists& lists) { return greater(divide_up(lists.length, kSplit), 1); }

// Few lists are cut into tasks by their splits; of many, each is a task. The result is the same.
bool splits_are_tasks(const ListPlan& plan, const KeyLists& lists, int64_t threads) {
  return splits_of(lists) > 1 && plan.tasks < 4 * threads;
}

template <class T, bool kRotated>
__attribute__((noinline)) void run_split(const SparseAttentionParams& s, const ListRows& at,
                                         int64_t split,
                                         const Partial<Accumulator<T>>& result) {
  const int64_t entry = split * kSplit;
  ListForward<T, kRotated>(s, at).run(entry, smaller(entry + kSplit, s.lists.length), result);
}

template <class T, bool kRotated>
void run_lists(const SparseAttentionParams& s, const Parallel& parallel) {
  using Acc = Accumulator<T>;
  const AttentionParams& p = s.attention;
  const ListPlan plan(p, s.lists);
  const int64_t splits = splits_of(s.lists);
  if (!splits_are_tasks(plan, s.lists, parallel.threads)) {
    parallel_tasks(parallel, plan.tasks, [&](int64_t task, int64_t) {
      const ListRows at = plan(p, s.lists, task);
      if (at.rows == 0) return;
      alignas(64) Acc memory[2][Partial<Acc>::numbers(kMaxRows, kMaxHeadDim)];
      Partial<Acc> result(memory[0], at.rows, p.value_dim), next(memory[1], at.rows, p.value_dim);
      run_split<T, kRotated>(s, at, 0, result);
      for (int64_t split = 1; split < splits; ++split) {
        run_split<T, kRotated>(s, at, split, next);
        result.merge(next);
      }
      write_result<T>(p, at, result);
    });
    return;
  }
  const auto partial = [&](const ListRows& at, int64_t index) {
    const int64_t numbers = Partial<Acc>::numbers(plan.chunk_rows, p.value_dim);
    return Partial<Acc>(static_cast<Acc*>(p.workspace) + index * numbers, at.rows, p.value_dim);
  };
  parallel_tasks(parallel, plan.tasks * splits, [&](int64_t task, int64_t) {
    const ListRows at = plan(p, s.lists, task / splits);
    if (at.rows > 0) run_split<T, kRotated>(s, at, task % splits, partial(at, task));
  });
  parallel_tasks(parallel, plan.tasks, [&](int64_t task, int64_t) {
    const ListRows at = plan(p, s.lists, task);
    if (at.rows == 0) return;
    Partial<Acc> result = partial(at, task * splits);
    for (int64_t split = 1; split < splits; ++split) {
      result.merge(partial(at, task * splits + split));
    }
    write_result<T>(p, at, result);
  });
}

}  // namespace

int64_t sparse_attention_workspace(const SparseAttentionParams& s, const Parallel& parallel) {
  const AttentionParams& p = s.attention;
  const ListPlan plan(p, s.lists);
  if (!splits_are_tasks(plan, s.lists, parallel.threads)) return 0;
  const int64_t bytes = p.dtype == DType::f64 ? 8 : 4;
  return plan.tasks * splits_of(s.lists) *
         Partial<float>::numbers(plan.chunk_rows, p.value_dim) * bytes;
}

void sparse_attention(const SparseAttentionParams& s, const Parallel& parallel) {
  visit_dtype(s.attention.dtype, [&]<class T>() {
    if constexpr (sizeof(T) <= 4) {
      if (s.rotation.cos) return run_lists<T, true>(s, parallel);
    }
    run_lists<T, false>(s, parallel);
  });
}

}  // namespace tokred::TOKRED_ISA
