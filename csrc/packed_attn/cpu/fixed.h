// packed_attention: sixteen-bit fixed point, in which f16 and bf16 queries, and weights, are
// multiplied by codes. Products of two pairs share an instruction and nothing is rounded until they
// are summed, so it takes half the multiplications of f32. A step is a power of two, at most 2^-14
// of the largest number that shares it: of a bf16 row the channels down to 2^-7 of the largest one
// are exact, of an f16 row those down to 2^-4, and all others are off by half a step.
#pragma once

#include "attention/cpu/rows.h"
#include "common/cpu/dispatch.h"
#include "kv_pack/cpu/codes.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace tokred::TOKRED_ISA {

// A power of two that one unit stands for, and its inverse.
struct FixedStep {
  float step, inverse;
};

TOKRED_INLINE float power_of_two(int32_t biased_exponent) {
  const int32_t bits = biased_exponent << 23;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The larger magnitudes of both, as bits: these are in the order of the numbers.
TOKRED_INLINE i32x16 larger(i32x16 a, i32x16 b) {
  return map<i32x16>([&](int i) {
#if defined(__AVX512F__)
    return (i32x16::N)_mm512_max_epi32((__m512i)a.r[i], (__m512i)b.r[i]);
#elif defined(__AVX2__)
    return (i32x16::N)_mm256_max_epi32((__m256i)a.r[i], (__m256i)b.r[i]);
#else
    return a.r[i] > b.r[i] ? a.r[i] : b.r[i];
#endif
  });
}
TOKRED_INLINE i32x16 larger_magnitude(f32x16 x, i32x16 most) {
  return larger(map<i32x16>([&](int i) { return (i32x16::N)x.r[i] & INT32_MAX; }), most);
}

// The step of numbers with these magnitudes: the largest takes fifteen bits. NaN unless all are
// finite, and with it whatever they are multiplied by.
TOKRED_INLINE FixedStep fixed_step(i32x16 magnitudes) {
  constexpr auto larger_of = [](i32x16 a, i32x16 b) { return larger(a, b); };
  int32_t exponent = fold_lanes(magnitudes, larger_of) >> 23;
  if (exponent == 255) return {NAN, 0.0f};
  if (exponent < 15) exponent = 15;  // the inverse of a smaller step overflows
  return {power_of_two(exponent - 14), power_of_two(254 + 14 - exponent)};
}

// Fixed-point numbers lie in fours, eight bytes each, in the order that Products::place() makes.
typedef int16_t Units __attribute__((vector_size(kRegisterBytes < 32 ? 16 : 32)));

// Products of numbers and codes, in two ways that give the same exact sums. A lane of words is four
// codes, a byte each; the two halves of four numbers are 32 bits each.
//
// Pairs: products of sixteen bits, two at once; the halves are the numbers 0 and 2, 1 and 3.
struct PairProducts {
  using Sum = Register<int32_t>;

  static Units place(Units x) {
    Units at{};
#pragma GCC unroll 16
    for (int i = 0; i < static_cast<int>(sizeof at / 2); ++i) {
      at[i] = static_cast<int16_t>(i / 4 * 4 + i % 2 * 2 + i / 2 % 2);
    }
    return __builtin_shuffle(x, at);
  }
  static int32_t first_total(const int16_t*, int64_t, int32_t) { return 0; }
  static Sum start(int32_t) { return Sum{}; }
  // The codes that are multiplied with a half, from bit `shift` of their bytes on.
  template <int kBits, int kHalf>
  static Register<int32_t> codes(Register<int32_t> words, int shift) {
    constexpr int32_t kMask = ((1 << kBits) - 1) * 0x10001;
    return words >> (shift + 8 * kHalf) & kMask;
  }
  template <int kHalf>
  static Sum add(Register<int32_t> codes, Register<int32_t> half, Sum sum) {
#if defined(__AVX512F__)
    sum += (Register<int32_t>)_mm512_madd_epi16((__m512i)codes, (__m512i)half);
#elif defined(__AVX2__)
    // GCC would keep several products at once, and run out of registers.
    Register<int32_t> product;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
        : "+v"(sum), "=&v"(product)
        : "v"(codes), "v"(half));
#elif defined(__SSE2__)
    sum += (Register<int32_t>)_mm_madd_epi16((__m128i)codes, (__m128i)half);
#else
    sum += (codes << 16 >> 16) * (half << 16 >> 16) + (codes >> 16) * (half >> 16);
#endif
    return sum;
  }
  static Register<int32_t> total(Sum sum) { return sum; }
};

// total + the products of four bytes a lane, those of a unsigned, those of b signed.
TOKRED_INLINE Register<int32_t> add_byte_products(Register<int32_t> total, Register<int32_t> a,
                                                  Register<int32_t> b) {
#ifdef __AVX512F__
  // VNNI: every assembler knows it; the compiler would want all of the file to be for such
  // machines.
  asm("vpdpbusd %2, %1, %0" : "+v"(total) : "v"(a), "v"(b));
  return total;
#else
  for (int shift = 0; shift < 32; shift += 8) {
    total += (a >> shift & 255) * (b << (24 - shift) >> 24);
  }
  return total;
#endif
}

// Bytes: of a number 256 h + l, with h signed and l not, the halves are four h and four l. Products
// of four take one instruction each, and codes are unpacked four at a time. Codes of eight bits are
// multiplied with l as signed numbers, less 128; first_total() adds what that leaves out.
struct ByteProducts {
  struct Sum {
    Register<int32_t> high, low;
  };

  static Units place(Units x) {
    typedef int8_t Bytes __attribute__((vector_size(sizeof x)));
    Bytes at{};
#pragma GCC unroll 32
    for (int i = 0; i < static_cast<int>(sizeof at); ++i) {
      at[i] = static_cast<int8_t>(i / 8 * 8 + i % 4 * 2 + (i % 8 < 4));
    }
    return (Units)__builtin_shuffle((Bytes)x, at);
  }
  // The number that start() begins with, for `count` placed numbers, a multiple of 32, and codes of
  // `bits` bits.
  static int32_t first_total(const int16_t* numbers, int64_t count, int32_t bits) {
    if (bits < 8) return 0;
    Register<int32_t> low{}, total{};
#pragma GCC unroll 16
    for (int i = 1; i < i32x16::kWidth; i += 2) low[i] = 0x1010101;
    for (int64_t i = 0; i < count; i += kRegisterBytes / 2) {
      Register<int32_t> x;
      std::memcpy(&x, numbers + i, sizeof x);
      total = add_byte_products(total, x, low);
    }
    i32x16 all = {};
    all.r[0] = total;
    return 128 * sum_lanes(all);
  }
  static Sum start(int32_t first) { return {Register<int32_t>{}, first - Register<int32_t>{}}; }
  template <int kBits, int kHalf>
  static Register<int32_t> codes(Register<int32_t> words, int shift) {
    constexpr uint32_t kMask = ((1u << kBits) - 1) * 0x1010101u;
    const Register<int32_t> codes = words >> shift & static_cast<int32_t>(kMask);
    return kBits == 8 && kHalf == 1 ? codes ^ static_cast<int32_t>(0x80808080u) : codes;
  }
  template <int kHalf>
  static Sum add(Register<int32_t> codes, Register<int32_t> half, Sum sum) {
    if constexpr (kHalf == 0) sum.high = add_byte_products(sum.high, codes, half);
    if constexpr (kHalf == 1) sum.low = add_byte_products(sum.low, half, codes);
    return sum;
  }
  static Register<int32_t> total(Sum sum) { return (sum.high << 8) + sum.low; }
};

// Whether this machine has an instruction for ByteProducts; others are quicker with pairs.
inline bool multiplies_bytes() { return kRegisterBytes == 64 && has_vnni(); }

// f.template operator()<Products>().
template <class F>
TOKRED_INLINE void visit_products([[maybe_unused]] bool bytes, const F& f) {
#ifdef __AVX512F__
  if (bytes) return f.template operator()<ByteProducts>();
#endif
  f.template operator()<PairProducts>();
}

// Sixteen numbers of units, to the nearest; what would be 32768 is 32767.
template <class Products>
TOKRED_INLINE void store_units(int16_t* p, f32x16 units) {
  const i32x16 number = round_even(units);
  constexpr int kParts = 32 / sizeof(Units);
  Units part[kParts];
#if defined(__AVX512F__)
  part[0] = (Units)_mm512_cvtsepi32_epi16((__m512i)number.r[0]);
#elif defined(__AVX2__)
  const __m256i quarters = _mm256_packs_epi32((__m256i)number.r[0], (__m256i)number.r[1]);
  part[0] = (Units)_mm256_permute4x64_epi64(quarters, 0xd8);
#else
  int32_t lane[kLanes];
  store(lane, number);
  for (int i = 0; i < kLanes; ++i) {
    part[i / 8][i % 8] = static_cast<int16_t>(lane[i] < INT16_MAX ? lane[i] : INT16_MAX);
  }
#endif
  for (int i = 0; i < kParts; ++i) part[i] = Products::place(part[i]);
  std::memcpy(p, part, sizeof part);
}

// One half of four numbers, in all lanes.
TOKRED_INLINE Register<int32_t> load_half_of_four(const int16_t* p) {
  int32_t half;
  std::memcpy(&half, p, sizeof half);
  return half - Register<int32_t>{};
}

// sum[row][part] += the products of a row's four numbers with the codes from bit `shift` of their
// bytes on.
template <class Products, int kBits, int kRows, int kParts>
TOKRED_INLINE void add_words(const Register<int32_t> (&words)[kParts], int shift,
                             const int16_t* numbers, int64_t stride,
                             typename Products::Sum (&sum)[kRows][kParts]) {
  const auto add = [&]<int kHalf>() {
    Register<int32_t> codes[kParts];
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) {
      codes[part] = Products::template codes<kBits, kHalf>(words[part], shift);
    }
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const Register<int32_t> half = load_half_of_four(numbers + row * stride + 2 * kHalf);
#pragma GCC unroll 8
      for (int part = 0; part < kParts; ++part) {
        sum[row][part] = Products::template add<kHalf>(codes[part], half, sum[row][part]);
      }
    }
  };
  add.template operator()<0>();
  add.template operator()<1>();
}

}  // namespace tokred::TOKRED_ISA
