// biased_attention_mask_backward on the CPU: the gradient of a float mask, without atomics. A task
// owns some rows or keys of the mask and adds up, in order, the heads and batch entries that share
// them. Two products of B Hq L N D multiply-adds.
#include "common/cpu/copy.h"
#include "common/cpu/parallel.h"
#include "sparse_attn/cpu/query_gradient.h"

namespace tokred::TOKRED_ISA {
namespace {

// The queries [first_row, end_row) and keys [first_key, end_key) of one head of the mask. Where the
// queries share a row of the mask, a part has all of them.
struct MaskPart {
  int64_t batch, head, first_row, end_row, first_key, end_key;
};

template <class T>
struct MaskPass {
  using Acc = Accumulator<T>;
  static constexpr int64_t kWeights = QueryPass<T>::kWeights;

  const AttentionMaskBackwardParams& m;
  const AttentionParams& p;
  const MaskPart& part;
  alignas(64) Acc table[kLanes * kBlock];

  MaskPass(const AttentionMaskBackwardParams& params, const MaskPart& task)
      : m(params), p(params.backward.forward), part(task) {}

  bool shares_row() const { return m.queries != p.queries; }
  Acc* grad_row(int64_t row) const {
    row = shares_row() ? 0 : row;
    return static_cast<Acc*>(m.grad_mask) +
           ((part.batch * m.heads + part.head) * m.queries + row) * p.keys;
  }

  void run(const Tasks& rows) {
    const int64_t bytes = (part.end_key - part.first_key) * static_cast<int64_t>(sizeof(Acc));
    for (int64_t row = part.first_row; row < (shares_row() ? 1 : part.end_row); ++row) {
      fill_zero(grad_row(row) + part.first_key, bytes);
    }
    const bool all_batch = m.batch != p.batch, all_heads = m.heads != p.heads_q;
    for (int64_t b = all_batch ? 0 : part.batch; b < (all_batch ? p.batch : part.batch + 1); ++b) {
      for (int64_t h = all_heads ? 0 : part.head; h < (all_heads ? p.heads_q : part.head + 1);
           ++h) {
        if (!shares_row()) {
          add_rows(b, h, part.first_row, part.end_row);
          continue;
        }
        for (int64_t task = 0; task < rows.in_head; ++task) {
          const int64_t first = rows.first(task), end = rows.end(task);
          if (first < end) add_rows(b, h, first, end);
        }
      }
    }
  }

  void add_rows(int64_t batch, int64_t head, int64_t first, int64_t end) {
    QueryPass<T> pass(m.backward, batch, head, 1, first, end);
    pass.visit_grads(part.first_key, part.end_key, [&](int64_t panel, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        const Acc* grads = pass.weights + i * kWeights;
        if (shares_row()) {
          add_sums(pass.block, grads);
        } else {
          const int64_t row = pass.panel_row(panel + i);
          add_tile(pass.block, grads, row, pass.last_row(panel + i) - row + 1);
        }
      }
    });
  }

  // Adds to the shared row the sum over the sixteen rows of every key of the block.
  void add_sums(const KeyBlock<T>& block, const Acc* grads) const {
    Acc* to = grad_row(0);
    for (int64_t i = 0; i < block.count; ++i) {
      to[block.index[i]] += sum<Acc>(load(grads + i * kLanes));
    }
  }

  void add_tile(const KeyBlock<T>& block, const Acc* grads, int64_t row, int64_t rows) {
    const int64_t count = block.count;
    const bool whole = block.last - block.first == count - 1;
    transpose(grads, count, kLanes, table);
    for (int64_t lane = 0; lane < rows; ++lane) {
      const Acc* from = table + lane * count;
      Acc* to = grad_row(row + lane);
      if (!whole) {
        for (int64_t i = 0; i < count; ++i) to[block.index[i]] += from[i];
        continue;
      }
      to += block.first;
      for (int64_t i = 0; i < count; i += kLanes) {
        store_row(to + i, load_row(to + i, count - i) + load_row(from + i, count - i), count - i);
      }
    }
  }
};

}  // namespace

void biased_attention_mask_backward(const AttentionMaskBackwardParams& m,
                                    const Parallel& parallel) {
  constexpr int64_t kKeys = 4 * kBlock;  // of a task where all queries share a row
  const AttentionParams& p = m.backward.forward;
  const bool shares_row = m.queries != p.queries;
  const Tasks rows(p, p.queries, Visibility(p, 0, 0, 1).rows_in_strip(), parallel.threads);
  const int64_t in_head = shares_row ? divide_up(p.keys, kKeys) : rows.in_head;
  visit_dtype(p.dtype, [&]<class T>() {
    parallel_tasks(parallel, m.batch * m.heads * in_head, [&](int64_t task, int64_t) {
      const int64_t index = task / in_head, number = task % in_head;
      MaskPart part{index / m.heads, index % m.heads, 0, p.queries, 0, p.keys};
      if (shares_row) {
        part.first_key = number * kKeys;
        part.end_key = min(part.first_key + kKeys, p.keys);
      } else {
        part.first_row = rows.first(number);
        part.end_row = rows.end(number);
      }
      if (shares_row || part.first_row < part.end_row) MaskPass<T>(m, part).run(rows);
    });
  });
}

}  // namespace tokred::TOKRED_ISA
