// sparse_attention on the CPU, and the same over all keys for the decoding calls of
// biased_attention.
#include "attention/cpu/splits.h"

namespace tokred::TOKRED_ISA {
namespace {

template <class T>
void write_result(const AttentionParams& p, const ListRows& at,
                  const Partial<Accumulator<T>>& result) {
  using Acc = Accumulator<T>;
  const auto out_rows = query_rows<T>(p.out_view(), at.batch, at.list_head, at.heads);
  const auto lse_rows =
      query_rows<Acc>(contiguous(p.lse, p.heads_q, p.queries, 1), at.batch, at.list_head, at.heads);
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
  const RowVisibility visibility;
  const int64_t stride;                           // of a packed query
  alignas(64) Acc query[kMaxRows * kMaxWideDim];  // scaled
  alignas(64) Acc weights[kMaxRows * kGather];
  alignas(64) Acc shrink[kMaxRows];
  GatheredKeys<T> blocks[2];
  alignas(64) Acc rotated[kRotated ? kGather * kMaxWideDim : 1];
  const Key* rotated_rows[kRotated ? kGather : 1];

  ListForward(const SparseAttentionParams& s, const ListRows& list_rows)
      : p(s.attention), rotation(s.rotation), at(list_rows), visibility(p, at),
        stride(whole_lanes(p.head_dim)) {
    const auto rows = query_rows<const T>(p.q, at.batch, at.list_head, at.heads);
    for (int64_t row = 0; row < at.rows; ++row) {
      const T* from = rows[at.first_row + row];
      const Acc scale = static_cast<Acc>(p.scale);
      if constexpr (kRotated) {
        Acc natural[kMaxWideDim];
        pack_row(from, p.head_dim, natural);
        pack_channels(natural, p.head_dim, scale, query + row * stride);
      } else {
        pack_channels(from, p.head_dim, scale, query + row * stride);
      }
    }
  }

  // The entries [entry, end). A row that does not see a key gives it the weight 0, but 0 times an
  // infinite value is NaN: a result with NaN is computed again without such products.
  void run(int64_t entry, int64_t end, const Partial<Acc>& result) {
    attend<false>(entry, end, result);
    if (any_nan(result.out, at.rows * result.stride)) attend<true>(entry, end, result);
  }

 private:
  template <bool kSkipZeros>
  void attend(int64_t entry, int64_t end, Partial<Acc> result) {
    result.clear();
    GatheredKeys<T>*block = &blocks[0], *next = &blocks[1];
    entry = block->choose(p, at, visibility, entry, end);
    Prefetcher<T>{block->k, block->count, p.head_dim}.prefetch(block->count);
    Prefetcher<T>{block->v, block->count, p.value_dim}.prefetch(block->count);
    while (block->count > 0) {
      entry = next->choose(p, at, visibility, entry, end);
      if (at.indices) next->prefetch_pages();
      attend<kSkipZeros>(*block, *next, result);
      GatheredKeys<T>* done = block;
      block = next;
      next = done;
    }
  }

  template <bool kSkipZeros>
  void attend(const GatheredKeys<T>& block, const GatheredKeys<T>& next, Partial<Acc>& result) {
    Prefetcher<T> keys{next.k, next.count, p.head_dim};
    if constexpr (kRotated) {
      rotate(block);
      keys.prefetch(next.count);
      dot_rows<Key>(query, stride, at.rows, rotated_rows, block.count, p.head_dim, weights,
                    kGather);
    } else {
      dot_rows<T>(query, stride, at.rows, block.k, block.count, p.head_dim, weights, kGather, keys);
    }
    block.finish_logits(visibility, at.rows, p.softcap, weights);
    exponentiate(at.rows, block.count, weights, shrink, result);
    if constexpr (kSkipZeros) {
      for (int64_t row = 0; row < at.rows; ++row) {
        add_nonzero<T>(weights + row * kGather, block.v, block.count, p.value_dim, shrink[row],
                       result.out + row * result.stride);
      }
    } else {
      add_rows<T>(weights, kGather, at.rows, block.v, block.count, p.value_dim, shrink, result.out,
                  result.stride, Prefetcher<T>{next.v, next.count, p.value_dim});
    }
  }

  void rotate(const GatheredKeys<T>& block) {
    const int64_t half = p.head_dim / 2;
    Acc row[kMaxWideDim];
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
                                         int64_t split, const Partial<Accumulator<T>>& result) {
  const int64_t entry = split * kKeySplit;
  ListForward<T, kRotated>(s, at).run(entry, min(entry + kKeySplit, s.lists.length), result);
}

template <class T, bool kRotated>
void run_lists(const SparseAttentionParams& s, const Parallel& parallel) {
  const AttentionParams& p = s.attention;
  using Acc = Accumulator<T>;
  run_splits<Acc>(
      p, s.lists, parallel,
      [&](const ListRows& at, int64_t split, const Partial<Acc>& result) {
        run_split<T, kRotated>(s, at, split, result);
      },
      [&](const ListRows& at, const Partial<Acc>& result) { write_result<T>(p, at, result); });
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
