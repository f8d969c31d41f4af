// Packs blocks of rows: min and max of every group, then scales, then codes.
#pragma once

#include "common/cpu/hadamard.h"
#include "common/cpu/sizes.h"
#include "kv_pack/cpu/groups.h"
#include "kv_pack/cpu/tasks.h"

namespace tokred::TOKRED_ISA {

// Rows in place, or rotated copies, and the slots of the rows of codes that they become.
template <class T>
struct RowBlock {
  static constexpr int64_t kRows = 256;
  const T* row[kRows];
  int64_t slot[kRows];      // -1: none
  const char* next[kRows];  // a row of row_bytes of the next block, to prefetch
  int64_t row_bytes;
};

inline constexpr int64_t kBlockFloats = 16384;
constexpr int64_t rows_per_block(int64_t head_dim) {
  const int64_t rows = kBlockFloats / head_dim;
  return rows < RowBlock<float>::kRows ? rows : RowBlock<float>::kRows;
}

// The next block's rows are prefetched while this block's are coded.
template <class T>
TOKRED_INLINE void prefetch_next(const RowBlock<T>& block, int64_t i) {
  for (int64_t b = 0; b < block.row_bytes; b += 64) __builtin_prefetch(block.next[i] + b);
}

// Params of `groups` neighbouring groups of a row, from group `first` of the table on.
TOKRED_INLINE void store_params(const GroupTable& table, int64_t first, int64_t groups,
                                bool offsets, uint16_t* row) {
  for (int64_t g = 0; g < groups; ++g) row[g] = table.stored_scale[first + g].bits;
  if (!offsets) return;
  for (int64_t g = 0; g < groups; ++g) row[groups + g] = table.stored_offset[first + g].bits;
}

template <bool kFilter, class T>
TOKRED_INLINE f32x16 load_number(const T* p) {
  return kFilter ? only_finite(load_as(p)) : load_as(p);
}

// The ranges of rows whose groups lie along channels, into the table row by row.
template <bool kFilter, class T>
TOKRED_INLINE void channel_ranges(const RowBlock<T>& block, int64_t rows, const PackFormat& f,
                                  GroupTable& table) {
  int64_t g = 0;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t d = 0; d < f.head_dim; ++g) {
      f32x16 low = splat(INFINITY), high = splat(-INFINITY);
      for (const int64_t end = d + f.group_size; d < end; d += kLanes) {
        const f32x16 x = load_number<kFilter>(block.row[i] + d);
        low = min(x, low);
        high = max(x, high);
      }
      table.low[g] = min_lane(low);
      table.high[g] = max_lane(high);
    }
  }
}

// For codebooks the mean squares of the groups, which make_scales() expects in `high`.
template <class T>
TOKRED_INLINE void mean_squares(const RowBlock<T>& block, int64_t rows, const PackFormat& f,
                                GroupTable& table) {
  int64_t g = 0;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t d = 0; d < f.head_dim; d += f.group_size, ++g) {
      table.low[g] = 0.0f;
      table.high[g] =
          sum_squares(block.row[i] + d, f.group_size) / static_cast<float>(f.group_size);
    }
  }
  for (; g % kLanes; ++g) table.low[g] = table.high[g] = 0.0f;
}

// Packs up to kMaxGroups groups of rows along channels.
template <PackScheme kScheme, class T>
void pack_channels(const RowBlock<T>& block, int64_t rows, const PackedRows& p,
                   const PackedHead& to) {
  const PackFormat& f = p.format;
  const int64_t per_row = groups_per_row(f), groups = rows * per_row;
  const f32x16 top = splat(static_cast<float>((1 << f.bits) - 1));
  GroupTable table;
  if constexpr (kScheme == PackScheme::codebook) {
    mean_squares(block, rows, f, table);
  } else {
    channel_ranges<false>(block, rows, f, table);
    if (!ranges_are_finite(table, groups)) {
      channel_ranges<true>(block, rows, f, table);
    }
  }
  make_scales<kScheme>(table, groups, f.bits);
  alignas(64) uint8_t code[kMaxWideDim];
  for (int64_t i = 0, g = 0; i < rows; ++i) {
    const int64_t slot = block.slot[i];
    prefetch_next(block, i);
    if (slot >= 0) {
      store_params(table, g, per_row, has_offset(kScheme), to.params + slot * p.params_stride_row);
    }
    for (int64_t d = 0; d < f.head_dim; ++g) {
      const Scales scales{splat(table.divisor[g]), splat(table.offset[g])};
      for (const int64_t end = d + f.group_size; d < end; d += kLanes) {
        store_bytes(code + d, encode<kScheme>(scales, load_as(block.row[i] + d), top, to.levels));
      }
    }
    if (slot >= 0) {
      bit_pack(code, f.head_dim, f.bits, to.codes + slot * p.codes_stride_token);
    }
  }
}

// Widens the range of every channel by kRows rows.
template <bool kFilter, int kRows, class T>
TOKRED_INLINE void widen_ranges(const T* const* row, int64_t head_dim, GroupTable& table) {
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    f32x16 low = load(table.low + d), high = load(table.high + d);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const f32x16 x = load_number<kFilter>(row[i] + d);
      low = min(x, low);
      high = max(x, high);
    }
    store(table.low + d, low);
    store(table.high + d, high);
  }
}

// The codes of kRows rows whose channels are groups of their own.
template <PackScheme kScheme, int kRows, class T>
void code_rows(const RowBlock<T>& block, int64_t first, const GroupTable& table,
               const PackedRows& p, const PackedHead& to) {
  const PackFormat& f = p.format;
  const f32x16 top = splat(static_cast<float>((1 << f.bits) - 1));
  alignas(64) uint8_t code[kRows][kMaxWideDim];
  for (int64_t d = 0; d < f.head_dim; d += kLanes) {
    const Scales scales{load(table.divisor + d), load(table.offset + d)};
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const f32x16 x = load_as(block.row[first + i] + d);
      store_bytes(code[i] + d, encode<kScheme>(scales, x, top, to.levels));
    }
  }
  for (int i = 0; i < kRows; ++i) {
    const int64_t slot = block.slot[first + i];
    prefetch_next(block, first + i);
    if (slot < 0) continue;
    bit_pack(code[i], f.head_dim, f.bits, to.codes + slot * p.codes_stride_token);
  }
}

inline void clear_ranges(int64_t head_dim, GroupTable& table) {
  for (int64_t d = 0; d < head_dim; ++d) table.low[d] = INFINITY;
  for (int64_t d = 0; d < head_dim; ++d) table.high[d] = -INFINITY;
}
template <bool kFilter, class T>
void widen_ranges(const RowBlock<T>& block, int64_t rows, int64_t head_dim, GroupTable& table) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) widen_ranges<kFilter, 4>(block.row + i, head_dim, table);
  for (; i < rows; ++i) widen_ranges<kFilter, 1>(block.row + i, head_dim, table);
}

// Packs one group of tokens. each_block(f) calls f(rows) with one part of the group after another
// in `block`.
template <class T, class EachBlock>
void pack_group(const RowBlock<T>& block, const EachBlock& each_block, const PackedRows& p,
                const PackedHead& to) {
  const PackFormat& f = p.format;
  GroupTable table;
  clear_ranges(f.head_dim, table);
  each_block([&](int64_t rows) { widen_ranges<false>(block, rows, f.head_dim, table); });
  if (!ranges_are_finite(table, f.head_dim)) {
    clear_ranges(f.head_dim, table);
    each_block([&](int64_t rows) { widen_ranges<true>(block, rows, f.head_dim, table); });
  }
  visit_scheme(f.scheme,
               [&]<PackScheme kScheme>() { make_scales<kScheme>(table, f.head_dim, f.bits); });
  bool params_stored = false;
  each_block([&](int64_t rows) {
    if (!params_stored && block.slot[0] >= 0) {
      const int64_t row = block.slot[0] / f.group_size;
      store_params(table, 0, f.head_dim, has_offset(f.scheme),
                   to.params + row * p.params_stride_row);
    }
    params_stored = true;
    visit_scheme(f.scheme, [&]<PackScheme kScheme>() {
      int64_t i = 0;
      for (; i + 4 <= rows; i += 4) code_rows<kScheme, 4>(block, i, table, p, to);
      for (; i < rows; ++i) code_rows<kScheme, 1>(block, i, table, p, to);
    });
  });
}

// Packs the tokens [first, last), along tokens whole groups. load_row(t, i) points to the row of
// token t, the i-th of a block, slot(t) is its row of codes or -1, next(t) the address to prefetch.
template <class T, class LoadRow, class Slot, class Next>
void pack_tokens(const LoadRow& load_row, const Slot& slot, const Next& next, int64_t row_bytes,
                 int64_t first, int64_t last, const PackedRows& p, const PackedHead& to) {
  const PackFormat& f = p.format;
  RowBlock<T> block;
  block.row_bytes = row_bytes;
  const auto load_rows = [&](int64_t token, int64_t rows, int64_t step) {
    for (int64_t i = 0; i < rows; ++i) {
      block.row[i] = load_row(token + i, i);
      block.slot[i] = slot(token + i);
      block.next[i] = reinterpret_cast<const char*>(next(min(token + i + step, last - 1)));
    }
  };
  if (f.axis == GroupAxis::channel) {
    constexpr int64_t kStep = kMaxGroups / (kMaxWideDim / kPackMultiple);
    for (int64_t t = first; t < last; t += kStep) {
      const int64_t rows = min(kStep, last - t);
      load_rows(t, rows, kStep);
      visit_scheme(f.scheme,
                   [&]<PackScheme kScheme>() { pack_channels<kScheme>(block, rows, p, to); });
    }
    return;
  }
  const int64_t step = rows_per_block(f.head_dim);
  for (int64_t start = first; start < last; start += f.group_size) {
    int64_t loaded = -1;
    const auto each_block = [&](const auto& use) {
      for (int64_t t = start; t < start + f.group_size; t += step) {
        const int64_t rows = min(step, start + f.group_size - t);
        if (loaded != t) load_rows(t, rows, min(step, f.group_size));
        loaded = t;
        use(rows);
      }
    };
    pack_group(block, each_block, p, to);
  }
}

// A row in its own dtype, and whether it has still to be rotated.
template <class T>
struct SourceRow {
  const T* data;
  bool rotate;
};

// The same with source(t), a SourceRow. Rows of a rotated format are copied, the others stay in
// place.
template <class T, class Source, class Slot>
void pack_tokens(const Source& source, const Slot& slot, int64_t first, int64_t last,
                 const PackedRows& p, const PackedHead& to) {
  const int64_t head_dim = p.format.head_dim, bytes = head_dim * static_cast<int64_t>(sizeof(T));
  const auto in_place = [&](int64_t t, int64_t = 0) { return source(t).data; };
  if (!p.format.rotated) {
    return pack_tokens<T>(in_place, slot, in_place, bytes, first, last, p, to);
  }
  alignas(64) float copies[kBlockFloats];
  const auto load_row = [&](int64_t t, int64_t i) {
    const SourceRow<T> row = source(t);
    float* copy = copies + i * head_dim;
    pack_row(row.data, head_dim, copy);
    if (row.rotate) rotate_row(copy, head_dim);
    return static_cast<const float*>(copy);
  };
  pack_tokens<float>(load_row, slot, in_place, bytes, first, last, p, to);
}

}  // namespace tokred::TOKRED_ISA
