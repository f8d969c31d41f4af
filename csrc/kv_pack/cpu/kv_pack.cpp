// Packing, unpacking and appending keys and values: all that is needed is read once and written
// once.
#include "common/cpu/parallel.h"
#include "common/cpu/sizes.h"
#include "kv_pack/cpu/rows.h"

namespace tokred::TOKRED_ISA {
namespace {

// Tokens of a task: about kTaskFloats numbers, along tokens whole groups.
int64_t tokens_per_task(const PackFormat& f) {
  constexpr int64_t kTaskFloats = 16384;
  const int64_t tokens = kTaskFloats / f.head_dim;
  if (f.axis == GroupAxis::channel) return tokens;
  return tokens > f.group_size ? tokens / f.group_size * f.group_size : f.group_size;
}

// Waking threads takes longer than packing a few thousand numbers.
Parallel threads_for(int64_t numbers, Parallel parallel) {
  if (numbers < 32768) parallel.threads = 1;
  return parallel;
}

template <class T>
const T* head_start(const HeadTensor& x, int64_t batch, int64_t head) {
  return static_cast<const T*>(x.data) + batch * x.stride_batch + head * x.stride_head;
}

template <class T>
void pack_part(const KvPackParams& p, int64_t batch, int64_t head, int64_t first, int64_t last) {
  const T* x = head_start<T>(p.x, batch, head);
  pack_tokens<T>(
      [&](int64_t t) {
        return SourceRow<T>{x + t * p.x.stride_token, p.packed.format.rotated};
      },
      [](int64_t t) { return t; }, first, last, p.packed, packed_head(p.packed, batch, head));
}

// Scales and offsets of sixteen channels of a row of params, or of the channels of one group.
template <PackScheme kScheme>
TOKRED_INLINE Scales load_scales(const f16* scale, const f16* offset, const PackFormat& f) {
  if constexpr (kScheme == PackScheme::symmetric) {
    return {load_as(scale), splat(middle_code(f.bits))};
  } else if constexpr (has_offset(kScheme)) {
    return {load_as(scale), load_as(offset)};
  } else {
    return {load_as(scale), splat(0.0f)};
  }
}
template <PackScheme kScheme>
TOKRED_INLINE Scales splat_scales(const f16* scale, const f16* offset, const PackFormat& f) {
  f32x16 shared = splat(kScheme == PackScheme::symmetric ? middle_code(f.bits) : 0.0f);
  if constexpr (has_offset(kScheme)) shared = splat(to_float(*offset));
  return {splat(to_float(*scale)), shared};
}

// The numbers of a row of codes, one byte each, and of its row of params.
template <PackScheme kScheme, class T>
TOKRED_INLINE void decode_row(const uint8_t* code, const f16* params, const PackFormat& f, T* to) {
  if (f.axis == GroupAxis::token) {
    for (int64_t d = 0; d < f.head_dim; d += kLanes) {
      const Scales s = load_scales<kScheme>(params + d, params + f.head_dim + d, f);
      store_as(to + d, decode<kScheme>(load_bytes(code + d), s));
    }
    return;
  }
  const f16* offset = params + groups_per_row(f);
  for (int64_t d = 0; d < f.head_dim; ++params, ++offset) {
    const Scales s = splat_scales<kScheme>(params, offset, f);
    for (const int64_t end = d + f.group_size; d < end; d += kLanes) {
      store_as(to + d, decode<kScheme>(load_bytes(code + d), s));
    }
  }
}

// Rows that share a row of params, or one row along channels.
template <PackScheme kScheme, class T>
TOKRED_INLINE void unpack_rows(const uint8_t* codes, int64_t stride, int64_t rows,
                               const f16* params, const PackFormat& f, T* out) {
  alignas(64) float number[kMaxHeadDim];
  alignas(64) uint8_t code[kMaxHeadDim];
  for (int64_t i = 0; i < rows; ++i, codes += stride, out += f.head_dim) {
    split_codes(codes, f.head_dim, f.bits, code);
    if (!f.rotated) {
      decode_row<kScheme>(code, params, f, out);
      continue;
    }
    decode_row<kScheme>(code, params, f, number);
    rotate_row(number, f.head_dim);
    for (int64_t d = 0; d < f.head_dim; d += kLanes) store_as(out + d, load(number + d));
  }
}

template <PackScheme kScheme, class T>
void unpack_part(const KvUnpackParams& p, int64_t batch, int64_t head, int64_t first,
                 int64_t last) {
  const PackedHead from = packed_head(p.packed, batch, head);
  const PackFormat& f = p.packed.format;
  const int64_t stride = p.packed.codes_stride_token;
  const int64_t step = f.axis == GroupAxis::token ? f.group_size : 1;
  const uint8_t* codes = from.codes + first * stride;
  const uint16_t* params = from.params + first / step * p.packed.params_stride_row;
  T* out = const_cast<T*>(head_start<T>(p.out, batch, head)) + first * f.head_dim;
  for (int64_t t = first; t < last; t += step, params += p.packed.params_stride_row) {
    unpack_rows<kScheme>(codes, stride, step, reinterpret_cast<const f16*>(params), f, out);
    codes += step * stride;
    out += step * f.head_dim;
  }
}

// What one item of kv_append holds and gets.
struct Growth {
  int64_t before;       // T, tokens that it holds
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
          const int64_t place = slots ? slots[t] : t;
          return place < p.packed.rows && place >= 0 ? place : int64_t{-1};
        },
        first, last, p.packed, packed_head(p.packed, p.slots.data ? 0 : batch, head));
  }

  // The new tokens that are not packed.
  void fill_window() const {
    const int64_t head_dim = p.packed.format.head_dim;
    const int64_t end = item.before + p.tokens;
    for (int64_t t = item.last > item.before ? item.last : item.before; t < end; ++t) {
      alignas(64) float row[kMaxHeadDim];
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
  int64_t most = 0, rows = 0;  // to be packed of one item, and to be written in all
  for (int64_t b = 0; b < p.batch; ++b) {
    const Growth item = growth(p, b);
    most = item.last - item.first > most ? item.last - item.first : most;
    rows += item.last - item.first + p.tokens;
  }
  const Parallel threads = threads_for(rows * p.heads * p.packed.format.head_dim, parallel);
  const int64_t parts = most > step ? divide_up(most, step) : 1;
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

// f(batch, head, first, last) for the tokens of every task.
template <class F>
void for_parts(const PackedRows& packed, int64_t batch, int64_t heads, const Parallel& parallel,
               const F& f) {
  const int64_t step = tokens_per_task(packed.format), parts = divide_up(packed.rows, step);
  const int64_t numbers = batch * heads * packed.rows * packed.format.head_dim;
  const Parallel threads = threads_for(numbers, parallel);
  parallel_tasks(threads, batch * heads * parts, [&](int64_t task, int64_t) {
    const int64_t row = task / parts, first = task % parts * step;
    const int64_t last = first + step < packed.rows ? first + step : packed.rows;
    f(row / heads, row % heads, first, last);
  });
}

}  // namespace

void kv_pack(const KvPackParams& p, const Parallel& parallel) {
  visit_f32(p.dtype, [&]<class T>() {
    for_parts(p.packed, p.batch, p.heads, parallel,
              [&](int64_t batch, int64_t head, int64_t first, int64_t last) {
                pack_part<T>(p, batch, head, first, last);
              });
  });
}

void kv_unpack(const KvUnpackParams& p, const Parallel& parallel) {
  visit_f32(p.dtype, [&]<class T>() {
    visit_scheme(p.packed.format.scheme, [&]<PackScheme kScheme>() {
      for_parts(p.packed, p.batch, p.heads, parallel,
                [&](int64_t batch, int64_t head, int64_t first, int64_t last) {
                  unpack_part<kScheme, T>(p, batch, head, first, last);
                });
    });
  });
}

void kv_append(const KvAppendParams& p, const Parallel& parallel) {
  visit_f32(p.dtype, [&]<class T>() { append<T>(p, parallel); });
}

}  // namespace tokred::TOKRED_ISA
