// sparse_attention on the CPU, and the same over all keys for the decoding calls of
// biased_attention.
#include "attention/cpu/decode.h"
#include "attention/cpu/splits.h"

namespace tokred::TOKRED_ISA {
namespace {

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

  // The entries [entry, end). A row that does not see a key gives it the weight 0, but 0 times an
  // infinite value is NaN: what comes out as NaN is done again with care for that.
  void run(int64_t entry, int64_t end, const Partial<Acc>& result) {
    attend<false>(entry, end, result);
    if (any_nan(result.out, at.rows * result.stride)) attend<true>(entry, end, result);
  }

 private:
  template <bool kCareful>
  void attend(int64_t entry, int64_t end, Partial<Acc> result) {
    result.clear();
    Gathered<T>*block = &blocks[0], *next = &blocks[1];
    entry = block->choose(p, at, sight, entry, end);
    Ahead<T>{block->k, block->count, p.head_dim}.take(block->count);
    Ahead<T>{block->v, block->count, p.value_dim}.take(block->count);
    while (block->count > 0) {
      entry = next->choose(p, at, sight, entry, end);
      if (at.indices) next->find_pages();
      attend<kCareful>(*block, *next, result);
      Gathered<T>* done = block;
      block = next;
      next = done;
    }
  }

  template <bool kCareful>
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
    exponentiate(at.rows, block.count, weights, shrink, result);
    if constexpr (kCareful) {
      for (int64_t row = 0; row < at.rows; ++row) {
        add_parts<T>(weights + row * kGather, block.v, block.count, p.value_dim, shrink[row],
                     result.out + row * result.stride);
      }
    } else {
      add_rows<T>(weights, kGather, at.rows, block.v, block.count, p.value_dim, shrink, result.out,
                  result.stride, Ahead<T>{next.v, next.count, p.value_dim});
    }
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
};

template <class T, bool kRotated>
__attribute__((noinline)) void run_split(const SparseAttentionParams& s, const ListRows& at,
                                         int64_t split,
                                         const Partial<Accumulator<T>>& result) {
  const int64_t entry = split * kSplit;
  ListForward<T, kRotated>(s, at).run(entry, smaller(entry + kSplit, s.lists.length), result);
}

template <class T, bool kRotated>
void run_lists(const SparseAttentionParams& s, const Parallel& parallel) {
  const AttentionParams& p = s.attention;
  using Acc = Accumulator<T>;
  run_splits<Acc>(p, s.lists, parallel,
                  [&](const ListRows& at, int64_t split, const Partial<Acc>& result) {
                    run_split<T, kRotated>(s, at, split, result);
                  },
                  [&](const ListRows& at, const Partial<Acc>& result) {
                    write_result<T>(p, at, result);
                  });
}

}  // namespace

int64_t sparse_attention_workspace(const SparseAttentionParams& s, const Parallel& parallel) {
  return s.attention.dtype == DType::f64 ? split_workspace<double>(s.attention, s.lists, parallel)
                                         : split_workspace<float>(s.attention, s.lists, parallel);
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
