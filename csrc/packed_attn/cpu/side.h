// One side of a cache, keys or values: where its tokens lie, and any of them as a row of f32.
#pragma once

#include "attention/cpu/visibility.h"
#include "common/cpu/row.h"
#include "kv_pack/cpu/groups.h"
#include "packed_attn/params.h"

namespace tokred::TOKRED_ISA {

// Where a token lies: a row of codes and its params, or, where params is null, a row of the window.
struct TokenAddress {
  const uint8_t* row;
  const uint16_t* params;
};

TOKRED_INLINE int64_t item_length(const int32_t* lengths, int64_t stride, int64_t item,
                                  int64_t tokens) {
  return lengths ? max(min(lengths[item * stride], tokens), 0) : tokens;
}

// The attention of an item, over the tokens that it holds.
inline AttentionParams item_params(const PackedAttentionParams& s, int64_t item) {
  AttentionParams p = s.attention;
  p.keys = item_length(s.lengths, s.lengths_stride, item, p.keys);
  return p;
}

// One kv head of an item that holds so many tokens.
class SideView {
 public:
  const PackFormat& stored;  // the format of packed rows
  const PackFormat format;   // as which they are read: of a codebook the levels
  const Levels levels;
  const DType dtype;  // of the window

  SideView(const PackedSide& side, const HeadTensor& window, const SlotTable& slots, DType type,
           int64_t tokens, int64_t item, int64_t head)
      : stored(side.packed.format), format(as_read(stored)), levels(side.packed, head), dtype(type),
        packed_(side.packed), window_rows_(side.window_rows), ring_(side.ring),
        capacity_(slots.data ? slots.capacity : packed_.rows),
        boundary_(ring_ ? packed_tokens(format.axis, window_rows_, tokens) : capacity_),
        slots_(slots.data ? slots.data + item * slots.stride_batch : nullptr),
        window_(static_cast<const uint8_t*>(window.data)) {
    const int64_t pool = slots.data ? 0 : item, size = dtype == DType::f32 ? 4 : 2;
    codes_ = packed_.codes + pool * packed_.codes_stride_batch + head * packed_.codes_stride_head;
    params_ =
        packed_.params + pool * packed_.params_stride_batch + head * packed_.params_stride_head;
    window_stride_ = window.stride_token * size;
    if (window_) window_ += (item * window.stride_batch + head * window.stride_head) * size;
  }

  // One byte for every channel of a row: codes of `format`.
  void read_codes(const uint8_t* row, uint8_t* code) const {
    bit_unpack(row, stored.head_dim, stored.bits, code);
    if (has_levels()) levels.look_up(code, stored.head_dim);
  }
  bool has_levels() const { return stored.scheme == PackScheme::codebook; }

  // False where a token lies nowhere.
  bool find(int64_t token, TokenAddress& address) const {
    if (token >= boundary_) {
      const int64_t row = ring_ ? token % window_rows_ : token - boundary_;
      if (row >= window_rows_) return false;
      address = {window_ + row * window_stride_, nullptr};
      return true;
    }
    return find_packed(token, address);
  }
  // How many packed tokens from `token` on, `most` at most, lie one after the other; see
  // packed_address(). 0 where they have to be looked up one by one.
  int64_t packed_run(int64_t token, int64_t most) const {
    if (slots_ || token >= boundary_) return 0;
    return max(min(most, min(boundary_, packed_.rows) - token), 0);
  }
  TokenAddress packed_address(int64_t row) const {
    const bool by_channel = format.axis == GroupAxis::channel;
    return {codes_ + row * row_stride(),
            params_ + (by_channel ? row : row / format.group_size) * params_stride()};
  }
  int64_t row_stride() const { return packed_.codes_stride_token; }
  int64_t params_stride() const { return packed_.params_stride_row; }

 private:
  bool find_packed(int64_t token, TokenAddress& address) const {
    if (token >= capacity_) return false;
    const int64_t row = slots_ ? slots_[token] : token;
    if (row < 0 || row >= packed_.rows) return false;
    address = packed_address(row);
    return true;
  }

  const PackedRows& packed_;
  const int64_t window_rows_;
  const bool ring_;
  const int64_t capacity_, boundary_;
  const int32_t* slots_;
  const uint8_t *codes_, *window_;
  const uint16_t* params_;
  int64_t window_stride_;
};

TOKRED_INLINE float param(const uint16_t* params, int64_t i) { return to_float(f16{params[i]}); }
TOKRED_INLINE f32x16 load_params(const uint16_t* params) {
  return load_as(reinterpret_cast<const f16*>(params));
}

// The bytes of one register of lanes.
TOKRED_INLINE i32x16::N widen(const uint8_t* p) {
#if defined(__AVX512F__)
  return (i32x16::N)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (i32x16::N)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  typedef uint8_t Bytes __attribute__((vector_size(i32x16::kWidth)));
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, i32x16::N);
#endif
}

// Numbers of e4m3fn times 2^-8: f16 with the same bits, but for the bias of the exponent.
TOKRED_INLINE f32x16::N widen_fp8(const uint8_t* p) {
#if defined(__AVX512F__)
  const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i half = _mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(x, 8), 1),
                                        _mm256_set1_epi16(static_cast<int16_t>(0xbf80u)));
  return (f32x16::N)_mm512_cvtph_ps(half);
#elif defined(__AVX2__)
  const __m128i x = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i half = _mm_and_si128(_mm_srai_epi16(_mm_slli_epi16(x, 8), 1),
                                     _mm_set1_epi16(static_cast<int16_t>(0xbf80u)));
  return (f32x16::N)_mm256_cvtph_ps(half);
#else
  // An f32 likewise is 2^-120 times the number.
  const i32x16::N bits = widen(p) << 24 >> 4 & static_cast<int32_t>(0x87f00000u);
  return (f32x16::N)bits * 0x1p112f;
#endif
}
TOKRED_INLINE f32x16 load_fp8(const uint8_t* p) {
  return map<f32x16>([&](int i) { return widen_fp8(p + i * f32x16::kWidth); });
}

TOKRED_INLINE f32x16 dequantize(PackScheme scheme, int32_t bits, f32x16 code, f32x16 scale,
                                f32x16 offset) {
  switch (scheme) {
    case PackScheme::asymmetric: return fma(scale, code, offset);
    case PackScheme::zero_point: return scale * (code - offset);
    case PackScheme::fp8: return scale * (code * splat(256.0f));
    default: return scale * (code - splat(middle_code(bits)));
  }
}

// A token as head_dim numbers, rotated where the format is.
inline void unpack_token(const SideView& side, const TokenAddress& address, float* out) {
  const PackFormat& f = side.format;
  if (!address.params) {
    visit_f32(side.dtype, [&]<class T>() {
      pack_row(reinterpret_cast<const T*>(address.row), f.head_dim, out);
    });
    return;
  }
  alignas(64) uint8_t codes[kMaxWideDim];
  side.read_codes(address.row, codes);
  const bool fp8 = f.scheme == PackScheme::fp8, by_channel = f.axis == GroupAxis::channel;
  const uint16_t* offsets = address.params + (has_offset(f.scheme) ? groups_per_row(f) : 0);
  f32x16 scale = splat(0.0f), offset = scale;
  for (int64_t d = 0; d < f.head_dim; d += kLanes) {
    if (!by_channel) {
      scale = load_params(address.params + d);
      offset = load_params(offsets + d);
    } else if (d % f.group_size == 0) {
      scale = splat(param(address.params, d / f.group_size));
      offset = splat(param(offsets, d / f.group_size));
    }
    const f32x16 code = fp8 ? load_fp8(codes + d) : to_f32(load_bytes(codes + d));
    store(out + d, dequantize(f.scheme, f.bits, code, scale, offset));
  }
}

}  // namespace tokred::TOKRED_ISA
