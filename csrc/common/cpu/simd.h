// Sixteen lanes, always: one zmm, two ymm or four xmm / NEON registers, so that every result is
// bitwise the same on every instruction set. Fused multiply-adds are explicit (the build turns
// contraction off); every reduction is a fixed tree. Kernel files alone include it, outside of any
// namespace: it opens that of the instruction set it is compiled for.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#define TOKRED_INLINE static inline __attribute__((always_inline))

namespace tokred::TOKRED_ISA {

inline constexpr int kLanes = 16;

template <class T>
inline constexpr T kInfinity = static_cast<T>(__builtin_inf());

#if defined(__AVX512F__)
inline constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kRegisterBytes = 32;
#else
inline constexpr int kRegisterBytes = 16;
#endif

template <class T>
struct Native;
template <>
struct Native<float> {
  typedef float type __attribute__((vector_size(kRegisterBytes)));
  typedef int32_t bits __attribute__((vector_size(kRegisterBytes)));
};
template <>
struct Native<int32_t> {
  typedef int32_t type __attribute__((vector_size(kRegisterBytes)));
  typedef int32_t bits __attribute__((vector_size(kRegisterBytes)));
};
template <>
struct Native<double> {
  typedef double type __attribute__((vector_size(kRegisterBytes)));
  typedef int64_t bits __attribute__((vector_size(kRegisterBytes)));
};

template <class T>
struct Vec {
  using N = typename Native<T>::type;
  static constexpr int kWidth = kRegisterBytes / sizeof(T);  // lanes of one register
  static constexpr int kRegisters = kLanes / kWidth;
  N r[kRegisters];
};
using f32x16 = Vec<float>;
using i32x16 = Vec<int32_t>;
using f64x16 = Vec<double>;

template <class V, class F>
TOKRED_INLINE V map(F f) {
  V out;
#pragma GCC unroll 8
  for (int i = 0; i < V::kRegisters; ++i) out.r[i] = f(i);
  return out;
}

template <class T>
TOKRED_INLINE Vec<T> splat(T x) {
  // x - 0 is x; x + 0 would cost an addition, for the sake of -0.
  return map<Vec<T>>([&](int) { return x - typename Vec<T>::N{}; });
}
template <class T>
TOKRED_INLINE Vec<T> load(const T* p) {
  return map<Vec<T>>([&](int i) {
    typename Vec<T>::N v;
    std::memcpy(&v, p + i * Vec<T>::kWidth, sizeof v);
    return v;
  });
}
template <class T>
TOKRED_INLINE void store(T* p, Vec<T> v) {
#pragma GCC unroll 8
  for (int i = 0; i < Vec<T>::kRegisters; ++i) {
    std::memcpy(p + i * Vec<T>::kWidth, &v.r[i], sizeof v.r[i]);
  }
}

template <class T>
TOKRED_INLINE Vec<T> operator+(Vec<T> a, Vec<T> b) {
  return map<Vec<T>>([&](int i) { return a.r[i] + b.r[i]; });
}
template <class T>
TOKRED_INLINE Vec<T> operator-(Vec<T> a, Vec<T> b) {
  return map<Vec<T>>([&](int i) { return a.r[i] - b.r[i]; });
}
template <class T>
TOKRED_INLINE Vec<T> operator*(Vec<T> a, Vec<T> b) {
  return map<Vec<T>>([&](int i) { return a.r[i] * b.r[i]; });
}
template <class T>
TOKRED_INLINE Vec<T> operator/(Vec<T> a, Vec<T> b) {
  return map<Vec<T>>([&](int i) { return a.r[i] / b.r[i]; });
}

// a * b + c in each lane, rounded once on every instruction set.
template <class T>
using Register = typename Native<T>::type;
#ifdef __FMA__
TOKRED_INLINE Register<float> fma(Register<float> a, Register<float> b, Register<float> c) {
#ifdef __AVX512F__
  return (Register<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return (Register<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
}
TOKRED_INLINE Register<double> fma(Register<double> a, Register<double> b, Register<double> c) {
#ifdef __AVX512F__
  return (Register<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#else
  return (Register<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#endif
}
#else
// Where a multiply-add is a call of the C library, one function holds the calls of a register:
// inline, they would be most of the machine code, and of the time to compile it.
#ifdef __FP_FAST_FMAF
TOKRED_INLINE
#else
static inline __attribute__((noinline))
#endif
Register<float> fma(Register<float> a, Register<float> b, Register<float> c) {
  for (int i = 0; i < Vec<float>::kWidth; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}
#ifdef __FP_FAST_FMA
TOKRED_INLINE
#else
static inline __attribute__((noinline))
#endif
Register<double> fma(Register<double> a, Register<double> b, Register<double> c) {
  for (int i = 0; i < Vec<double>::kWidth; ++i) c[i] = __builtin_fma(a[i], b[i], c[i]);
  return c;
}
#endif
template <class T>
TOKRED_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return map<Vec<T>>([&](int i) { return fma(a.r[i], b.r[i], c.r[i]); });
}

// Lane-wise a > b ? x : y. False where either is NaN.
template <class T, class U>
TOKRED_INLINE Vec<U> select_greater(Vec<T> a, Vec<T> b, Vec<U> x, Vec<U> y) {
  static_assert(sizeof(T) == sizeof(U));
  return map<Vec<U>>([&](int i) { return a.r[i] > b.r[i] ? x.r[i] : y.r[i]; });
}
// The larger of a and b; b where either is NaN.
template <class T>
TOKRED_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
  return select_greater(a, b, a, b);
}
#ifdef __AVX2__
// One instruction of the same meaning, which the compiler does not find by itself.
TOKRED_INLINE f32x16 max(f32x16 a, f32x16 b) {
  return map<f32x16>([&](int i) {
#ifdef __AVX512F__
    return (f32x16::N)_mm512_max_ps((__m512)a.r[i], (__m512)b.r[i]);
#else
    return (f32x16::N)_mm256_max_ps((__m256)a.r[i], (__m256)b.r[i]);
#endif
  });
}
#endif
template <class T>
TOKRED_INLINE Vec<T> min(Vec<T> a, Vec<T> b) {
  return select_greater(b, a, a, b);
}
#ifdef __AVX2__
TOKRED_INLINE f32x16 min(f32x16 a, f32x16 b) {
  return map<f32x16>([&](int i) {
#ifdef __AVX512F__
    return (f32x16::N)_mm512_min_ps((__m512)a.r[i], (__m512)b.r[i]);
#else
    return (f32x16::N)_mm256_min_ps((__m256)a.r[i], (__m256)b.r[i]);
#endif
  });
}
#endif
// Square roots, correctly rounded.
TOKRED_INLINE f32x16 sqrt(f32x16 v) {
  return map<f32x16>([&](int i) {
#if defined(__AVX512F__)
    return (f32x16::N)_mm512_sqrt_ps((__m512)v.r[i]);
#elif defined(__AVX2__)
    return (f32x16::N)_mm256_sqrt_ps((__m256)v.r[i]);
#else
    f32x16::N out;
    for (int j = 0; j < f32x16::kWidth; ++j) out[j] = __builtin_sqrtf(v.r[i][j]);
    return out;
#endif
  });
}
// x where v is a number, y where it is NaN.
template <class T>
TOKRED_INLINE Vec<T> select_number(Vec<T> v, Vec<T> x, Vec<T> y) {
  return map<Vec<T>>([&](int i) { return v.r[i] == v.r[i] ? x.r[i] : y.r[i]; });
}

// Sum of the lanes as ((l + l+8) + (l+4 ..)) ..: halves are added until one lane is left.
template <class T>
TOKRED_INLINE T sum(Vec<T> v) {
  T lane[kLanes];
  store(lane, v);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

// The lanes of v, lane i exchanged with lane i ^ kDistance, for the distances 1, 2, 4, 8.
template <int kDistance, class T>
TOKRED_INLINE Vec<T> exchange_lanes(Vec<T> v) {
  constexpr int kWidth = Vec<T>::kWidth;
  if constexpr (kDistance >= kWidth) {
    return map<Vec<T>>([&](int i) { return v.r[i ^ (kDistance / kWidth)]; });
  } else {
    typename Native<T>::bits partner{};
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) partner[i] = i ^ kDistance;
    return map<Vec<T>>([&](int i) { return __builtin_shuffle(v.r[i], partner); });
  }
}

// f(.. f(lane, lane) ..) over the sixteen lanes, for an f of vectors that is associative and
// commutative. Of numbers that compare equal, such as 0 and -0, either may be the result.
template <class T, class F>
TOKRED_INLINE T fold_lanes(Vec<T> v, const F& f) {
  v = f(v, exchange_lanes<8>(v));
  v = f(v, exchange_lanes<4>(v));
  v = f(v, exchange_lanes<2>(v));
  return f(v, exchange_lanes<1>(v)).r[0][0];
}
template <class T>
TOKRED_INLINE T max_lane(Vec<T> v) {
  return fold_lanes(v, [](Vec<T> a, Vec<T> b) { return max(a, b); });
}
template <class T>
TOKRED_INLINE T min_lane(Vec<T> v) {
  return fold_lanes(v, [](Vec<T> a, Vec<T> b) { return min(a, b); });
}
TOKRED_INLINE int32_t sum_lanes(i32x16 v) {
  return fold_lanes(v, [](i32x16 a, i32x16 b) { return a + b; });
}

}  // namespace tokred::TOKRED_ISA
