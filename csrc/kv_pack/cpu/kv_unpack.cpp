// kv_unpack and kv_unpack_into: from rows of codes back to numbers. Every code is read and every
// number written once.
#include "common/cpu/hadamard.h"
#include "kv_pack/cpu/groups.h"
#include "kv_pack/cpu/tasks.h"

namespace tokred::TOKRED_ISA {
namespace {

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
  f32x16 shared = splat(kScheme == PackScheme::symmetric  ? middle_code(f.bits)
                        : kScheme == PackScheme::codebook ? middle_code(8)
                                                          : 0.0f);
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
                               const f16* params, const PackFormat& f, const Levels& levels,
                               T* out) {
  alignas(64) float number[kMaxWideDim];
  alignas(64) uint8_t code[kMaxWideDim];
  for (int64_t i = 0; i < rows; ++i, codes += stride, out += f.head_dim) {
    bit_unpack(codes, f.head_dim, f.bits, code);
    if constexpr (kScheme == PackScheme::codebook) levels.look_up(code, f.head_dim);
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
    unpack_rows<kScheme>(codes, stride, step, reinterpret_cast<const f16*>(params), f, from.levels,
                         out);
    codes += step * stride;
    out += step * f.head_dim;
  }
}

}  // namespace

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

}  // namespace tokred::TOKRED_ISA
