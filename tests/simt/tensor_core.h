// Sums of products with the truncation of tensor cores: these multiply exactly, but align the
// products of a step, and the sum so far, to the largest exponent among them, and cut off all bits
// from the second below an fp32 significand on. An A100 does so for eight products at a time, later
// devices for more of them with more bits (Fasi, Higham, Mikaitis and Pranesh, PeerJ Comput. Sci.
// 7:e330, 2021; Khattak and Mikaitis, arXiv 2512.07004).
#pragma once

#include <cstdint>
#include <cstring>

namespace simt {

// False: sums in fp32, rounded to nearest.
inline bool tensor_cores_truncate = true;

// sum[column] += left[k] * right[k][column] over four columns and sixteen k.
struct ProductStep {
  typedef float Floats __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  static constexpr int kTogether = 8,
                       kExtraBits = 1;  // products aligned at once; bits below fp32's
  // A column whose largest power of two is outside of these bounds is summed in fp32.
  static constexpr float kMin = 0x1p-100f, kMax = 0x1p126f;

  const float (&left)[16];
  const float (&right)[16][8];
  int first_column;

  static Ints bits_of(Floats x) { return reinterpret_cast<Ints>(x); }
  static Floats floats_of(Ints bits) { return reinterpret_cast<Floats>(bits); }
  static Floats power_of_two(Floats x) { return floats_of(bits_of(x) & 0x7f800000); }
  static Floats larger(Floats x, Floats y) { return x > y ? x : y; }

  Floats row(int k) const {
    Floats x;
    std::memcpy(&x, right[k] + first_column, sizeof x);
    return x;
  }

  // x plus eight products; clears `inside` for columns outside of kMin and kMax.
  Floats add_truncated(Floats x, int first, Ints& inside) const {
    Floats largest = power_of_two(x);
    inside &= largest < kMax;
    for (int k = first; k < first + kTogether; ++k) {
      const Floats power = power_of_two(Floats{} + left[k]) * power_of_two(row(k));
      inside &= power < kMax;  // false for NaN
      largest = larger(largest, power);
    }
    inside &= (largest == 0) | (largest >= kMin);
    // Numbers in units of the last bit that is kept: all sums are below 2^31.
    const Floats one = inside ? larger(largest, Floats{} + kMin) : Floats{} + 1.0f;
    const Floats units = static_cast<float>(1 << (23 + kExtraBits)) / one;
    const auto whole = [&](Floats y) {
      return __builtin_convertvector(floats_of(bits_of(y * units) & inside), Ints);
    };
    Ints total = whole(x);
    for (int k = first; k < first + kTogether; ++k) total += whole(left[k] * row(k));
    const Ints magnitude = total < 0 ? -total : total;
    const Floats rounded = __builtin_convertvector(magnitude, Floats);
    const Ints up = __builtin_convertvector(rounded, Ints) > magnitude;  // -1 where true
    return floats_of((bits_of(rounded) + up) | (total & INT32_MIN)) / units;
  }

  void add_to(float* sum) const {
    Floats x;
    std::memcpy(&x, sum, sizeof x);
    Ints inside = Ints{} - int{tensor_cores_truncate};
    const Floats half = add_truncated(x, 0, inside);
    const Floats truncated = add_truncated(half, kTogether, inside);
    for (int k = 0; k < 16; ++k) x += left[k] * row(k);
    x = inside ? truncated : x;
    std::memcpy(sum, &x, sizeof x);
  }
};

// The same of eight columns.
inline void add_products(float (&sum)[8], const float (&left)[16], const float (&right)[16][8]) {
  ProductStep{left, right, 0}.add_to(sum);
  ProductStep{left, right, 4}.add_to(sum + 4);
}

}  // namespace simt
