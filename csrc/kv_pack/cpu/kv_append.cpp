// kv_append: grows a packed cache in place. Tokens that leave the window, and new ones without room
// in it, are packed as kv_pack packs; the other new ones are written to the window.
#include "kv_pack/cpu/rows.h"
#include "kv_pack/cpu/tasks.h"

namespace tokred::TOKRED_ISA {
namespace {

// How one batch item grows.
struct Growth {
  int64_t before;  // T, tokens that it holds
  int64_t first, last;  // the tokens to be packed
};
Growth growth(const KvAppendParams& p, int64_t batch) {
  const int64_t before = p.lengths ? p.lengths[batch * p.lengths_stride] : p.length;
  const GroupAxis axis = p.packed.format.axis;
  const int64_t last = packed_tokens(axis, p.window_rows, before + p.tokens);
  if (before < 0 || last > p.slots.capacity) return {-1, 0, 0};
  return {before, packed_tokens(axis, p.window_rows, before), last};
}

template <class T>
struct Append {
  const KvAppendParams& p;
  int64_t batch, head;
  Growth item;
  const T* x = head_start<T>(p.x, batch, head);
  T* window = const_cast<T*>(head_start<T>(p.window, batch, head));

  T* window_row(int64_t token) const {
    return window + token % p.window_rows * p.window.stride_token;
  }
  const T* new_row(int64_t token) const { return x + (token - item.before) * p.x.stride_token; }

  // The tokens [first, last) of those to be packed.
  void pack(int64_t first, int64_t last) const {
    const bool rotate = p.packed.format.rotated;
    const int32_t* slots = p.slots.data ? p.slots.data + batch * p.slots.stride_batch : nullptr;
    pack_tokens<T>(
        [&](int64_t t) {
          return t < item.before ? SourceRow<T>{window_row(t), false}
                                 : SourceRow<T>{new_row(t), rotate};
        },
        [&](int64_t t) {
          const int64_t slot = slots ? slots[t] : t;
          return slot < p.packed.rows && slot >= 0 ? slot : int64_t{-1};
        },
        first, last, p.packed, packed_head(p.packed, p.slots.data ? 0 : batch, head));
  }

  // The new tokens that are not packed.
  void fill_window() const {
    const int64_t head_dim = p.packed.format.head_dim;
    const int64_t end = item.before + p.tokens;
    for (int64_t t = item.last > item.before ? item.last : item.before; t < end; ++t) {
      alignas(64) float row[kMaxWideDim];
      if (p.packed.format.rotated) {
        pack_row(new_row(t), head_dim, row);
        rotate_row(row, head_dim);
        for (int64_t d = 0; d < head_dim; d += kLanes) store_as(window_row(t) + d, load(row + d));
      } else {
        copy_bytes(window_row(t), new_row(t), head_dim * static_cast<int64_t>(sizeof(T)));
      }
    }
  }
};

// Rows of the window are written when everything is packed: they may hold what is to be packed.
template <class T>
void append(const KvAppendParams& p, const Parallel& parallel) {
  const int64_t step = tokens_per_task(p.packed.format), heads = p.batch * p.heads;
  int64_t max_packed = 0,
          rows = 0;  // to be packed of one item, and to be written in all
  for (int64_t b = 0; b < p.batch; ++b) {
    const Growth item = growth(p, b);
    max_packed = max(max_packed, item.last - item.first);
    rows += item.last - item.first + p.tokens;
  }
  const Parallel threads = threads_for(rows * p.heads * p.packed.format.head_dim, parallel);
  const int64_t parts = max_packed > step ? divide_up(max_packed, step) : 1;
  const auto work = [&](int64_t row) {
    const int64_t batch = row / p.heads;
    return Append<T>{p, batch, row % p.heads, growth(p, batch)};
  };
  parallel_tasks(threads, heads * parts, [&](int64_t task, int64_t) {
    const Append<T> item = work(task / parts);
    if (item.item.before < 0) return;
    const int64_t first = item.item.first + task % parts * step;
    const int64_t last = first + step < item.item.last ? first + step : item.item.last;
    if (first < last) item.pack(first, last);
    if (parts == 1) item.fill_window();
  });
  if (parts == 1 || p.window_rows == 0) return;
  parallel_tasks(threads, heads, [&](int64_t task, int64_t) {
    const Append<T> item = work(task);
    if (item.item.before >= 0) item.fill_window();
  });
}

}  // namespace

void kv_append(const KvAppendParams& p, const Parallel& parallel) {
  visit_f32(p.dtype, [&]<class T>() { append<T>(p, parallel); });
}

}  // namespace tokred::TOKRED_ISA
