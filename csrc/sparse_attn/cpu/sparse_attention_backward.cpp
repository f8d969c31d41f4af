// Gradients of sparse_attention on the CPU, without atomics: first every list owns the grad_q of
// its queries, then every range of keys its grad_k, grad_v and grad_bias, to which the lists add in
// order. Both passes recompute the weights from lse.
#include "attention/cpu/gather.h"
#include "common/cpu/parallel.h"
#include "sparse_attn/params.h"

namespace tokred::TOKRED_ISA {
namespace {

// The rows of a task and, block by block, their weights and the gradients of their logits.
template <class T>
struct ListGradient {
  using Acc = Accumulator<T>;

  const AttentionBackwardParams& b;
  const AttentionParams& p;
  const ListRows at;
  const RowVisibility visibility;
  const int64_t key_stride, value_stride;
  alignas(64) Acc query[kMaxRows * kMaxWideDim];  // scaled
  alignas(64) Acc grad_out[kMaxRows * kMaxWideDim];
  Acc lse[kMaxRows], delta[kMaxRows];
  alignas(64) Acc weights[kMaxRows * kGather];
  alignas(64) Acc grad_logits[kMaxRows * kGather];
  alignas(64) Acc capped[kMaxRows * kGather];  // slopes of the softcap, then grad_products()
  GatheredKeys<T> block;

  ListGradient(const AttentionBackwardParams& params, const ListRows& rows)
      : b(params), p(b.forward), at(rows), visibility(p, at), key_stride(whole_lanes(p.head_dim)),
        value_stride(whole_lanes(p.value_dim)) {
    for (int64_t row = 0; row < at.rows; ++row) {
      pack_channels(rows_of<const T>(p.q)[at.first_row + row], p.head_dim,
                    static_cast<Acc>(p.scale), query + row * key_stride);
      pack_channels(rows_of<const T>(b.grad_out)[at.first_row + row], p.value_dim, Acc{1},
                    grad_out + row * value_stride);
      // With lse +inf, the weights of a row that saw nothing are exp(logit - inf) = 0.
      const Acc row_lse = *numbers<const Acc>(p.lse)[at.first_row + row];
      lse[row] = row_lse == -kInfinity<Acc> ? kInfinity<Acc> : row_lse;
    }
  }

  template <class U>
  Rows<U> rows_of(const HeadTensor& x) const {
    return query_rows<U>(x, at.batch, at.list_head, at.heads);
  }
  template <class U>
  Rows<U> numbers(const void* data) const {
    return rows_of<U>(contiguous(data, p.heads_q, p.queries, 1));
  }

  void make_delta() {
    for (int64_t i = 0; i < at.rows; ++i) {
      const int64_t row = at.first_row + i;
      const bool saw_nothing = lse[i] == kInfinity<Acc>;
      delta[i] = saw_nothing ? Acc{0}
                             : dot_row(rows_of<const T>(p.out_view())[row],
                                       rows_of<const T>(b.grad_out)[row], p.value_dim) -
                                   *numbers<const Acc>(b.grad_lse)[row];
      *numbers<Acc>(b.delta)[row] = delta[i];
    }
  }
  void load_delta() {
    for (int64_t i = 0; i < at.rows; ++i) {
      delta[i] = *numbers<const Acc>(b.delta)[at.first_row + i];
    }
  }

  // Those of the products q . k: what a softcap leaves of grad_logits.
  const Acc* grad_products() const { return p.softcap > 0 ? capped : grad_logits; }

  // visit() for every block of entries, once weights and grad_logits are its.
  template <class Visit>
  void visit_blocks(int64_t entries, const Visit& visit) {
    for (int64_t entry = 0; entry < entries;) {
      entry = block.choose(p, at, visibility, entry, entries);
      if (block.count == 0) continue;
      weigh();
      visit();
    }
  }

  __attribute__((noinline)) void weigh() {
    dot_rows<T>(query, key_stride, at.rows, block.k, block.count, p.head_dim, weights, kGather);
    block.finish_logits(visibility, at.rows, p.softcap, weights, capped);
    dot_rows<T>(grad_out, value_stride, at.rows, block.v, block.count, p.value_dim, grad_logits,
                kGather);
    for (int64_t row = 0; row < at.rows; ++row) {
      for (int64_t i = 0; i < block.count; i += kLanes) {
        Acc *weight = weights + row * kGather + i, *grad = grad_logits + row * kGather + i;
        store(weight, weight_of(load(weight), splat(lse[row])));
        store(grad, grad_of_logit(load(weight), load(grad), splat(delta[row])));
        if (p.softcap > 0) {
          Acc* slope = capped + row * kGather + i;
          store(slope, grad_of_product(load(grad), load(slope)));
        }
      }
    }
  }
};

template <class T>
void query_pass(const AttentionBackwardParams& b, const ListRows& at, int64_t entries) {
  using Acc = Accumulator<T>;
  ListGradient<T> list(b, at);
  list.make_delta();
  const AttentionParams& p = b.forward;
  const int64_t stride = list.key_stride;
  alignas(64) Acc grad[kMaxRows * kMaxWideDim], one[kMaxRows];
  for (int64_t row = 0; row < at.rows; ++row) one[row] = 1;
  const auto clear = [&] {
    for (int64_t i = 0; i < at.rows * stride; ++i) grad[i] = 0;
  };
  clear();
  list.visit_blocks(entries, [&] {
    add_rows<T>(list.grad_products(), kGather, at.rows, list.block.k, list.block.count, p.head_dim,
                one, grad, stride);
  });
  if (any_nan(grad, at.rows * stride)) {
    clear();
    list.visit_blocks(entries, [&] {
      for (int64_t row = 0; row < at.rows; ++row) {
        add_nonzero<T>(list.grad_products() + row * kGather, list.block.k, list.block.count,
                       p.head_dim, Acc{1}, grad + row * stride);
      }
    });
  }
  const auto rows =
      list.template rows_of<T>(contiguous(b.grad_q, p.heads_q, p.queries, p.head_dim));
  for (int64_t row = 0; row < at.rows; ++row) {
    for (int64_t c = 0; c < p.head_dim; c += kLanes) {
      store_channels(rows[at.first_row + row] + c,
                     load(grad + row * stride + c) * splat(static_cast<Acc>(p.scale)),
                     p.head_dim - c);
    }
  }
}

// How the keys of a kv head are cut into tasks. Results do not depend on it.
struct KeyRanges {
  int64_t count, keys;  // ranges of a kv head, keys of a range
  int64_t numbers;  // of a key: its gradient, its value's and its bias's
  int64_t workers;

  KeyRanges(const AttentionParams& p, const Parallel& parallel)
      : numbers(whole_lanes(p.head_dim) + whole_lanes(p.value_dim) + kLanes) {
    constexpr int64_t kFewestKeys = 64;
    const int64_t heads = max(p.batch * p.heads_kv, 1);
    const int64_t wanted = parallel.threads > 1 ? divide_up(4 * parallel.threads, heads) : 1;
    keys = max(divide_up(p.keys, wanted), kFewestKeys);
    count = divide_up(p.keys, keys);
    workers = min(parallel.threads, heads * count);
  }
};

// Adds what the list gives to the keys of a range, whose gradients lie at `sums`.
template <class T, bool kSkipZeros>
void add_list(ListGradient<T>& list, int64_t entries, const KeyRanges& ranges,
              Accumulator<T>* sums) {
  using Acc = Accumulator<T>;
  const int64_t rows = list.at.rows;
  const Acc *queries[kMaxRows], *grads_out[kMaxRows];
  for (int64_t row = 0; row < rows; ++row) {
    queries[row] = list.query + row * list.key_stride;
    grads_out[row] = list.grad_out + row * list.value_stride;
  }
  list.load_delta();
  list.visit_blocks(entries, [&] {
    for (int64_t i = 0; i < list.block.count; ++i) {
      Acc weight[kMaxRows], grad_product[kMaxRows];
      Acc* grad_key = sums + (list.block.key[i] - list.at.first_key) * ranges.numbers;
      Acc* grad_value = grad_key + list.key_stride;
      Acc* grad_bias = grad_value + list.value_stride;
      for (int64_t row = 0; row < rows; ++row) {
        weight[row] = list.weights[row * kGather + i];
        grad_product[row] = list.grad_products()[row * kGather + i];
        *grad_bias += list.grad_logits[row * kGather + i];
      }
      const Acc one = 1;
      if constexpr (kSkipZeros) {
        add_nonzero<Acc>(grad_product, queries, rows, list.key_stride, one, grad_key);
        add_nonzero<Acc>(weight, grads_out, rows, list.value_stride, one, grad_value);
      } else {
        add_rows<Acc>(grad_product, 0, 1, queries, rows, list.key_stride, &one, grad_key, 0);
        add_rows<Acc>(weight, 0, 1, grads_out, rows, list.value_stride, &one, grad_value, 0);
      }
    }
  });
}

template <class T>
void write_keys(const AttentionBackwardParams& b, int64_t first, int64_t count,
                const KeyRanges& ranges, const Accumulator<T>* sums) {
  using Acc = Accumulator<T>;
  const AttentionParams& p = b.forward;
  for (int64_t key = first; key < first + count; ++key, sums += ranges.numbers) {
    T* grad_k = static_cast<T*>(b.grad_k) + key * p.head_dim;
    T* grad_v = static_cast<T*>(b.grad_v) + key * p.value_dim;
    const Acc* values = sums + whole_lanes(p.head_dim);
    for (int64_t c = 0; c < p.head_dim; c += kLanes) {
      store_channels(grad_k + c, load(sums + c), p.head_dim - c);
    }
    for (int64_t c = 0; c < p.value_dim; c += kLanes) {
      store_channels(grad_v + c, load(values + c), p.value_dim - c);
    }
    if (b.grad_bias) static_cast<Acc*>(b.grad_bias)[key] = values[whole_lanes(p.value_dim)];
  }
}

template <class T, bool kSkipZeros>
void add_lists(const SparseAttentionBackwardParams& s, const ListTasks& list_tasks, int64_t head,
               int64_t first_key, int64_t end_key, const KeyRanges& ranges, Accumulator<T>* sums) {
  const AttentionParams& p = s.backward.forward;
  fill_zero(sums,
            (end_key - first_key) * ranges.numbers * static_cast<int64_t>(sizeof(Accumulator<T>)));
  // The tasks of the query heads that read this kv head follow each other.
  const int64_t tasks = list_tasks.count / (p.batch * p.heads_kv);
  for (int64_t task = head * tasks; task < (head + 1) * tasks; ++task) {
    ListRows at = list_tasks(p, s.lists, task);
    if (at.rows == 0) continue;
    at.first_key = first_key;
    at.end_key = end_key;
    ListGradient<T> list(s.backward, at);
    add_list<T, kSkipZeros>(list, s.lists.length, ranges, sums);
  }
}

template <class T>
void key_pass(const SparseAttentionBackwardParams& s, const ListTasks& list_tasks, int64_t head,
              int64_t first_key, int64_t end_key, const KeyRanges& ranges, Accumulator<T>* sums) {
  const AttentionParams& p = s.backward.forward;
  add_lists<T, false>(s, list_tasks, head, first_key, end_key, ranges, sums);
  if (any_nan(sums, (end_key - first_key) * ranges.numbers)) {
    add_lists<T, true>(s, list_tasks, head, first_key, end_key, ranges, sums);
  }
  write_keys<T>(s.backward, head * p.keys + first_key, end_key - first_key, ranges, sums);
}

}  // namespace

int64_t sparse_attention_backward_workspace(const SparseAttentionBackwardParams& s,
                                            const Parallel& parallel) {
  const AttentionParams& p = s.backward.forward;
  const KeyRanges ranges(p, parallel);
  return ranges.workers * ranges.keys * ranges.numbers * (p.dtype == DType::f64 ? 8 : 4);
}

void sparse_attention_backward(const SparseAttentionBackwardParams& s, const Parallel& parallel) {
  const AttentionParams& p = s.backward.forward;
  const ListTasks list_tasks(p, s.lists);
  const KeyRanges ranges(p, parallel);
  visit_dtype(p.dtype, [&]<class T>() {
    parallel_tasks(parallel, list_tasks.count, [&](int64_t task, int64_t) {
      const ListRows at = list_tasks(p, s.lists, task);
      if (at.rows > 0) query_pass<T>(s.backward, at, s.lists.length);
    });
    auto* sums = static_cast<Accumulator<T>*>(s.workspace);
    const int64_t tasks = p.batch * p.heads_kv * ranges.count;
    parallel_tasks(parallel, tasks, [&](int64_t task, int64_t worker) {
      const int64_t first = task % ranges.count * ranges.keys;
      key_pass<T>(s, list_tasks, task / ranges.count, first, min(first + ranges.keys, p.keys),
                  ranges, sums + worker * ranges.keys * ranges.numbers);
    });
  });
}

}  // namespace tokred::TOKRED_ISA
