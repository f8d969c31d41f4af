// Gradients of biased_attention on the CPU, without atomics: blocks of rows stream past the keys,
// which own their grad_k, grad_v and grad_bias. One task a head takes its keys in order and adds to
// grad_q as well: five products. Where heads are too few for the threads, or grad_q in 16 bits
// cannot be summed in place, every row owns its grad_q in a pass before that, which recomputes the
// weights: seven products, the same bits.
#include "common/cpu/parallel.h"
#include "sparse_attn/cpu/key_gradient.h"
#include "sparse_attn/cpu/query_gradient.h"

namespace tokred::TOKRED_ISA {
namespace {

// Runs Pass over every task of `heads` heads.
template <class Pass>
void run_pass(const AttentionBackwardParams& b, int64_t heads, int64_t group, const Tasks& tasks,
              const Parallel& parallel) {
  parallel_tasks(parallel, b.forward.batch * heads * tasks.in_head, [&](int64_t task, int64_t) {
    const int64_t head = task / tasks.in_head, part = task % tasks.in_head;
    const int64_t first = tasks.first(part), end = tasks.end(part);
    if (first < end) Pass(b, head / heads, head % heads, group, first, end).run();
  });
}

// Everything of a kv head; whether some gradient is NaN.
template <class T, bool kSkipZeros>
bool run_head(const AttentionBackwardParams& b, int64_t batch, int64_t kv_head, int64_t group,
              const Tasks& tasks) {
  const AttentionParams& p = b.forward;
  const int64_t heads = p.heads_q / p.heads_kv, count = heads * p.queries * p.head_dim;
  T* grad_q = static_cast<T*>(b.grad_q) + (batch * p.heads_kv + kv_head) * count;
  fill_zero(grad_q, count * static_cast<int64_t>(sizeof(T)));
  const GradientRows<T> rows(b, batch, kv_head, heads);
  for (int64_t row = 0; row < p.queries * heads; ++row) {
    *rows.delta[row] = rows.make_delta(row, p.value_dim);
  }
  bool nan = false;
  for (int64_t part = 0; part < tasks.in_head; ++part) {
    const int64_t first = tasks.first(part), end = tasks.end(part);
    if (first >= end) continue;
    KeyPass<T, true> pass(b, batch, kv_head, group, first, end);
    pass.template add_rows<kSkipZeros>();
    nan = nan || pass.has_nan();
    pass.write();
  }
  for (int64_t i = 0; i < count; ++i) {
    nan |= grad_q[i] != grad_q[i];
    grad_q[i] *= static_cast<T>(p.scale);
  }
  return nan;
}

template <class T>
void run_heads(const AttentionBackwardParams& b, int64_t group, const Tasks& tasks,
               const Parallel& parallel) {
  const AttentionParams& p = b.forward;
  parallel_tasks(parallel, p.batch * p.heads_kv, [&](int64_t task, int64_t) {
    const int64_t batch = task / p.heads_kv, kv_head = task % p.heads_kv;
    if (run_head<T, false>(b, batch, kv_head, group, tasks)) {
      run_head<T, true>(b, batch, kv_head, group, tasks);
    }
  });
}

// Whether five products a head take no longer than seven of any part of a head.
bool whole_heads(const AttentionParams& p, const Parallel& parallel) {
  const int64_t heads = p.batch * p.heads_kv;
  return 5 * round_up(heads, parallel.threads) <= 7 * heads;
}

}  // namespace

void biased_attention_backward(const AttentionBackwardParams& b, const Parallel& parallel) {
  const AttentionParams& p = b.forward;
  const int64_t group = row_group(p), rows = p.queries * group;
  if (p.batch == 0 || p.heads_q == 0) return;
  const Visibility see(p, 0, 0, group);
  const auto key_tasks = [&](int64_t threads) {
    return Tasks(p, p.keys, see.keys_in_strip(), threads);
  };
  visit_dtype(p.dtype, [&]<class T>() {
    if constexpr (kSummedInPlace<T>) {
      if (whole_heads(p, parallel)) return run_heads<T>(b, group, key_tasks(1), parallel);
    }
    const Tasks row_tasks(p, rows, see.rows_in_strip(), parallel.threads);
    run_pass<QueryPass<T>>(b, p.heads_q / group, group, row_tasks, parallel);
    run_pass<KeyPass<T>>(b, p.heads_kv, group, key_tasks(parallel.threads), parallel);
  });
}

}  // namespace tokred::TOKRED_ISA
