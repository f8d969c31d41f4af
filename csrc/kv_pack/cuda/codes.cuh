// Codes of eight neighbouring channels, from bytes to numbers and back (see kv_pack/layout.h), for
// kernels that pack, unpack and read packed rows.
#pragma once

#include "common/cuda/numbers.cuh"
#include "kv_pack/params.h"

namespace tokred::cuda::packing {

// Bytes read and written a few at a time, whatever they hold.
using Word = uint32_t __attribute__((may_alias));
using HalfWord = uint16_t __attribute__((may_alias));

// Where the codes of channels 8 i .. 8 i + 7 lie in a row of 1, 2, 4 or 8 bits: in eight bytes from
// a bit on, or in the bytes of a shorter run, the later channels in higher bits.
struct CodePosition8 {
  int byte, shift, run;

  __device__ CodePosition8(int channel, int head_dim, int bits) : byte(0), shift(0), run(16) {
    const int bytes = head_dim * bits / 8;
    for (;; byte += run, channel -= run * 8 / bits) {
      while (run > bytes - byte) run /= 2;
      if (channel < run * 8 / bits) break;
    }
    byte += channel % run;
    shift = channel / run * bits;
  }
  // From and to one number.
  __device__ explicit CodePosition8(uint32_t all)
      : byte(static_cast<int>(all >> 8)), shift(static_cast<int>(all >> 5 & 7)),
        run(static_cast<int>(all & 31)) {}
  __device__ uint32_t all() const {
    return static_cast<uint32_t>(byte) << 8 | static_cast<uint32_t>(shift) << 5 |
           static_cast<uint32_t>(run);
  }
};

// `aligned`: p is a multiple of four bytes, or of two where the run is no longer.
__device__ __forceinline__ uint2 load_run(const uint8_t* p, int run, bool aligned) {
  uint2 word{0, 0};
  if (!aligned) {
    for (int i = 0; i < min(run, 8); ++i) {
      (i < 4 ? word.x : word.y) |= static_cast<uint32_t>(p[i]) << 8 * (i % 4);
    }
  } else if (run == 2) {
    word.x = *reinterpret_cast<const HalfWord*>(p);
  } else {
    word.x = *reinterpret_cast<const Word*>(p);
    if (run > 4) word.y = *reinterpret_cast<const Word*>(p + 4);
  }
  return word;
}

// The codes, a byte each.
__device__ __forceinline__ uint2 spread_run(uint2 word, const CodePosition8& position, int bits) {
  if (position.run == 2) {
    word.y = word.x >> 2 * bits;
    word.x |= word.x >> bits << 16;
    word.y |= word.y >> bits << 16;
  } else if (position.run == 4) {
    word.y = word.x >> bits;
  }
  const uint32_t mask = 0x01010101u * ((1u << bits) - 1);
  return {word.x >> position.shift & mask, word.y >> position.shift & mask};
}

// The codes of a lane's eight channels in row after row.
struct CodeReader {
  int bits, high_row;
  CodePosition8 low, high;  // three bits are two, and one of a second row

  __device__ CodeReader(const PackFormat& f, int channel)
      : bits(f.bits), high_row(static_cast<int>(high_bit_row(f.head_dim))),
        low(channel, static_cast<int>(f.head_dim), bits == 3 ? 2 : bits),
        high(channel, static_cast<int>(f.head_dim), bits == 3 ? 1 : bits) {}
  __device__ CodeReader(const PackFormat& f, uint2 positions)
      : bits(f.bits), high_row(static_cast<int>(high_bit_row(f.head_dim))), low(positions.x),
        high(positions.y) {}
  __device__ uint2 positions() const { return {low.all(), high.all()}; }

  // `aligned`: the row starts at a multiple of four bytes.
  __device__ __forceinline__ uint2 read(const uint8_t* row, bool aligned) const {
    const uint2 word = load_run(row + low.byte, low.run, aligned);
    if (bits != 3) return spread_run(word, low, bits);
    const uint2 two = spread_run(word, low, 2);
    const uint2 one = spread_run(load_run(row + high_row + high.byte, high.run, aligned), high, 1);
    return {two.x | one.x << 2, two.y | one.y << 2};
  }
};

// The levels of a head's codebook, as LevelBytes has them; of other schemes nothing.
struct LevelTable {
  uint32_t word[4];

  __device__ LevelTable(const PackedRows& p, int64_t head) {
    if (p.format.scheme != PackScheme::codebook) return;
    LevelBytes bytes = gaussian_levels(p.format.bits);
    if (p.levels) {
      bytes = {};
      const int8_t* row = p.levels + head * p.levels_stride_head;
#pragma unroll 1
      for (int c = 0; c < 1 << p.format.bits; ++c) bytes = with_level(bytes, c, row[c]);
    }
    word[0] = static_cast<uint32_t>(bytes.low);
    word[1] = static_cast<uint32_t>(bytes.low >> 32);
    word[2] = static_cast<uint32_t>(bytes.high);
    word[3] = static_cast<uint32_t>(bytes.high >> 32);
  }

  // The bytes of four codes, a byte each: of codes below 8 and of the others.
  __device__ __forceinline__ uint32_t look_up(uint32_t codes) const {
    uint32_t nibbles = codes & 0x07070707u;
    nibbles = __byte_perm(nibbles | nibbles >> 4, 0, 0x4420);
    const uint32_t low = __byte_perm(word[0], word[1], nibbles);
    const uint32_t high = __byte_perm(word[2], word[3], nibbles);
    const uint32_t mask = (codes >> 3 & 0x01010101u) * 0xff;
    return (low & ~mask) | (high & mask);
  }
  __device__ __forceinline__ uint2 look_up(uint2 codes) const {
    return {look_up(codes.x), look_up(codes.y)};
  }
  // The codes of eight numbers with this scale, a byte each; NaN counts as 0.
  __device__ __forceinline__ uint2 nearest(const float (&x)[8], float scale, int bits) const {
    float ratio[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float quotient = scale == 0.0f ? 0.0f : __fdiv_rn(x[i], scale);
      ratio[i] = quotient == quotient ? quotient : 0.0f;
    }
    uint2 codes{0, 0};
    uint32_t last = word[0] & 0xff;
#pragma unroll 1
    for (int c = 1; c < 1 << bits; ++c) {
      const uint32_t next = word_of(c / 4) >> 8 * (c % 4) & 0xff;
      const float midpoint = 0.5f * static_cast<float>(static_cast<int>(last + next) - 256);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t one = ratio[i] > midpoint ? 1u << 8 * (i % 4) : 0u;
        (i < 4 ? codes.x : codes.y) += one;
      }
      last = next;
    }
    return codes;
  }

 private:
  // Without an address the words stay in registers.
  __device__ __forceinline__ uint32_t word_of(int i) const {
    return i < 2 ? (i == 0 ? word[0] : word[1]) : i == 2 ? word[2] : word[3];
  }
};

// The number that an e4m3fn code is.
__device__ __forceinline__ float from_e4m3(uint32_t code) {
  const uint32_t magnitude = code & 0x7f;
  const float x = __uint_as_float(magnitude << 20) * 0x1p120f;
  const uint32_t bits = magnitude == 0x7f ? 0x7fc00000u : __float_as_uint(x);
  return __uint_as_float(bits | (code & 0x80) << 24);
}
// Of a finite x, |x| <= kFp8Max: to nearest, ties to even.
__device__ __forceinline__ uint32_t to_e4m3(float x) {
  const uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
  const uint32_t sign = bits >> 24 & 0x80;
  if (magnitude < 0x3c800000u) {  // 2^-6, the smallest normal number
    return sign | static_cast<uint32_t>(rintf(__uint_as_float(magnitude) * 512.0f));
  }
  return sign | ((magnitude + 0x7ffffu + (magnitude >> 20 & 1)) >> 20) - (120u << 3);
}

// Scale and offset of a group; the codes, as to_floats() has them, become the numbers
// scale (c - zero) + offset.
struct GroupParams {
  float scale, zero, offset;

  __device__ __forceinline__ GroupParams(PackScheme scheme, float scale, float second)
      : scale(scale), zero(scheme == PackScheme::zero_point ? second : 0.0f),
        offset(scheme == PackScheme::asymmetric ? second : -0.0f) {}

  // The product is exact but with zero_point, where adding -0 changes nothing.
  __device__ __forceinline__ float number(float code) const {
    return fmaf(scale, code - zero, offset);
  }
  __device__ __forceinline__ float number_from_zero(float code) const {
    return fmaf(scale, code, offset);
  }
};

__device__ __forceinline__ uint32_t byte_of(uint2 codes, int i) {
  return (i < 4 ? codes.x : codes.y) >> 8 * (i % 4) & 0xff;
}
// The codes as numbers; symmetric ones, and the bytes of levels, already less their middle.
__device__ __forceinline__ void to_floats(float (&x)[8], uint2 codes, const PackFormat& f) {
  if (f.scheme == PackScheme::fp8) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = from_e4m3(byte_of(codes, i));
    return;
  }
  // 2^23 + c has c in its low bits.
  const PackFormat read = as_read(f);
  const float middle =
      read.scheme == PackScheme::symmetric ? static_cast<float>(1 << (read.bits - 1)) : 0.0f;
  const float base = 0x1p23f + middle;
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = __uint_as_float(byte_of(codes, i) | 0x4b000000u) - base;
}

// The Hadamard rotation of common/hadamard.h of a row whose lanes have eight neighbouring channels
// each; all lanes of the warp call it.
__device__ __forceinline__ void rotate_row(float (&x)[8], int64_t head_dim) {
  const int size = static_cast<int>(hadamard_size(head_dim));
#pragma unroll
  for (int step = 1; step < 8; step *= 2) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i & step) continue;
      const float a = x[i], b = x[i + step];
      x[i] = a + b;
      x[i + step] = a - b;
    }
  }
#pragma unroll 1
  for (int step = 8; step < size; step *= 2) {
    const bool upper = static_cast<int>(threadIdx.x) & (step / 8);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float other = __shfl_xor_sync(0xffffffffu, x[i], step / 8);
      x[i] = upper ? other - x[i] : x[i] + other;
    }
  }
  const float factor = __fdiv_rn(1.0f, __fsqrt_rn(static_cast<float>(size)));
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = __fmul_rn(x[i], factor);
}

}  // namespace tokred::cuda::packing
