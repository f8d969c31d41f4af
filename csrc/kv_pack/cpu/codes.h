// Bit packing: rows of codes (kv_pack/layout.h) to and from one byte a channel, and bytes to and
// from sixteen lanes.
#pragma once

#include "attention/params.h"
#include "common/cpu/storage.h"
#include "kv_pack/layout.h"

namespace tokred::TOKRED_ISA {

typedef uint64_t Run16 __attribute__((vector_size(16)));  // the bytes of a run of sixteen

template <class Run>
TOKRED_INLINE Run load_run(const uint8_t* p) {
  Run run;
  std::memcpy(&run, p, sizeof run);
  return run;
}

// The same byte everywhere.
template <class Run>
TOKRED_INLINE Run all_bytes(uint8_t byte) {
  if constexpr (sizeof(Run) == 16) {
    return all_bytes<uint64_t>(byte) - Run{};
  } else {
    return static_cast<Run>(0x0101010101010101u * byte);
  }
}

// One run from the bits of its channels' bytes that `mask` names, after a shift to the right.
// A code never leaves its byte, so whole words shift.
template <int kBits, class Run>
TOKRED_INLINE void pack_run(const uint8_t* code, int down, uint8_t* row) {
  const Run mask = all_bytes<Run>((1 << kBits) - 1);
  Run run{};
#pragma GCC unroll 8
  for (int plane = 0; plane < 8 / kBits; ++plane) {
    const Run codes = load_run<Run>(code + plane * sizeof(Run)) >> down & mask;
    run = static_cast<Run>(run | codes << (kBits * plane));
  }
  std::memcpy(row, &run, sizeof run);
}
template <int kBits, class Run>
TOKRED_INLINE void unpack_run(const uint8_t* row, uint8_t* code) {
  const Run mask = all_bytes<Run>((1 << kBits) - 1), run = load_run<Run>(row);
#pragma GCC unroll 8
  for (int plane = 0; plane < 8 / kBits; ++plane) {
    const Run codes = static_cast<Run>(run >> (kBits * plane) & mask);
    std::memcpy(code + plane * sizeof(Run), &codes, sizeof codes);
  }
}

// f.template operator()<Run>(first channel, first byte) for every run of a row.
template <int kBits, class F>
TOKRED_INLINE void for_runs(int64_t head_dim, F f) {
  const int64_t bytes = code_bytes(head_dim, kBits);
  int64_t byte = 0;
  const auto next = [&]<class Run>() {
    f.template operator()<Run>(byte * 8 / kBits, byte);
    byte += static_cast<int64_t>(sizeof(Run));
  };
  while (byte + 16 <= bytes) next.template operator()<Run16>();
  if (bytes & 8) next.template operator()<uint64_t>();
  if (bytes & 4) next.template operator()<uint32_t>();
  if (bytes & 2) next.template operator()<uint16_t>();
}

// A row of kBits from the bits of every code from bit `down` on.
template <int kBits>
TOKRED_INLINE void pack_plain(const uint8_t* code, int down, int64_t head_dim, uint8_t* row) {
  for_runs<kBits>(head_dim, [&]<class Run>(int64_t channel, int64_t byte) {
    pack_run<kBits, Run>(code + channel, down, row + byte);
  });
}
template <int kBits>
TOKRED_INLINE void unpack_plain(const uint8_t* row, int64_t head_dim, uint8_t* code) {
  for_runs<kBits>(head_dim, [&]<class Run>(int64_t channel, int64_t byte) {
    unpack_run<kBits, Run>(row + byte, code + channel);
  });
}

// A row of codes, from one byte for every channel.
inline void bit_pack(const uint8_t* code, int64_t head_dim, int32_t bits, uint8_t* row) {
  switch (bits) {
    case 1: return pack_plain<1>(code, 0, head_dim, row);
    case 2: return pack_plain<2>(code, 0, head_dim, row);
    case 3:
      pack_plain<2>(code, 0, head_dim, row);
      return pack_plain<1>(code, 2, head_dim, row + high_bit_row(head_dim));
    case 4: return pack_plain<4>(code, 0, head_dim, row);
    default: std::memcpy(row, code, static_cast<size_t>(head_dim));
  }
}

// One byte for every channel, from a row of codes.
TOKRED_INLINE void bit_unpack(const uint8_t* row, int64_t head_dim, int32_t bits, uint8_t* code) {
  switch (bits) {
    case 1: return unpack_plain<1>(row, head_dim, code);
    case 2: return unpack_plain<2>(row, head_dim, code);
    case 3: {
      alignas(16) uint8_t high[kMaxWideDim];
      unpack_plain<2>(row, head_dim, code);
      unpack_plain<1>(row + high_bit_row(head_dim), head_dim, high);
      for (int64_t d = 0; d < head_dim; d += 16) {
        const Run16 both = load_run<Run16>(code + d) | load_run<Run16>(high + d) << 2;
        std::memcpy(code + d, &both, sizeof both);
      }
      return;
    }
    case 4: return unpack_plain<4>(row, head_dim, code);
    default: std::memcpy(code, row, static_cast<size_t>(head_dim));
  }
}

// To the nearest integer, halves to even; |x| <= 2^22.
TOKRED_INLINE i32x16 round_even(f32x16 x) {
  return map<i32x16>([&](int i) {
#if defined(__AVX512F__)
    return (i32x16::N)_mm512_cvtps_epi32((__m512)x.r[i]);
#elif defined(__AVX2__)
    return (i32x16::N)_mm256_cvtps_epi32((__m256)x.r[i]);
#else
    // An ulp is 1 there, and the integer lies in the low mantissa bits.
    const f32x16::N shift = 0x1.8p23f - f32x16::N{};
    return (i32x16::N)(x.r[i] + shift) - (i32x16::N)shift;
#endif
  });
}
TOKRED_INLINE f32x16 to_f32(i32x16 v) {
  return map<f32x16>([&](int i) { return __builtin_convertvector(v.r[i], f32x16::N); });
}

// Sixteen integers from 0 to 255, one byte each.
TOKRED_INLINE void store_bytes(uint8_t* p, i32x16 v) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)v.r[0]));
#elif defined(__AVX2__)
  const __m256i words = _mm256_packus_epi32((__m256i)v.r[0], (__m256i)v.r[1]);
  const __m128i mixed =
      _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_shuffle_epi32(mixed, 0xd8));
#else
  int32_t lane[kLanes];
  store(lane, v);
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(lane[i]);
#endif
}
TOKRED_INLINE i32x16 load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return {(i32x16::N)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
#elif defined(__AVX2__)
  return map<i32x16>([&](int i) {
    const auto* from = reinterpret_cast<const __m128i*>(p + 8 * i);
    return (i32x16::N)_mm256_cvtepu8_epi32(_mm_loadl_epi64(from));
  });
#else
  int32_t lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = p[i];
  return load(lane);
#endif
}

}  // namespace tokred::TOKRED_ISA
