// Vectors of the widest registers this file is compiled for, and the 16-bit storage types.
//
// GCC's and clang's vector extensions, so that one source serves x86 and Arm; intrinsics only where the extension has
// no word for it (fused multiply-add, half precision). All private to the translation unit, as in bilinear.h.
#ifndef DDETR_MSDA_CPU_SIMD_H
#define DDETR_MSDA_CPU_SIMD_H

#include <stdint.h>
#include <string.h>

#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#define DDETR_INLINE inline __attribute__((always_inline))
// Loops that vectorise by themselves and run once per row: one copy of each keeps the build short.
#define DDETR_NOINLINE __attribute__((noinline))

using FloatVec __attribute__((vector_size(kVectorBytes))) = float;
using DoubleVec __attribute__((vector_size(kVectorBytes))) = double;
using WordVec __attribute__((vector_size(kVectorBytes))) = uint32_t;
using ShortVec __attribute__((vector_size(kVectorBytes / 2))) = uint16_t;

// Storage types of 16 bits; sums are kept in float.
struct Half {
    uint16_t bits;
};
struct Bfloat16 {
    uint16_t bits;
};

template <typename T>
struct ComputeOf {
    using Real = float;
};
template <>
struct ComputeOf<double> {
    using Real = double;
};
template <typename T>
using Real = typename ComputeOf<T>::Real;

template <typename R>
struct VecOf {
    using Type = FloatVec;
};
template <>
struct VecOf<double> {
    using Type = DoubleVec;
};
template <typename R>
using Vec = typename VecOf<R>::Type;

template <typename R>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(R));

template <typename To, typename From>
DDETR_INLINE To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "same number of bytes");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

// ---- one number ----

DDETR_INLINE float to_real(float x) {
    return x;
}
DDETR_INLINE double to_real(double x) {
    return x;
}
DDETR_INLINE float to_real(Bfloat16 x) {
    return bits_as<float>(static_cast<uint32_t>(x.bits) << 16);
}
DDETR_INLINE float to_real(Half x) {
    // Read as a float, the exponent is too small by 112; the product also normalises subnormals.
    const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
    uint32_t bits = bits_as<uint32_t>(bits_as<float>(magnitude) * 0x1p112f);
    if (magnitude >= 0x0f800000u) bits |= 0x7f800000u;  // infinity and NaN
    return bits_as<float>(bits | (x.bits & 0x8000u) << 16);
}

DDETR_INLINE void from_real(float x, float* to) {
    *to = x;
}
DDETR_INLINE void from_real(double x, double* to) {
    *to = x;
}
DDETR_INLINE void from_real(float x, Bfloat16* to) {
    const uint32_t bits = bits_as<uint32_t>(x);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1);  // to nearest, ties to even
    to->bits = static_cast<uint16_t>(is_nan ? bits >> 16 | 0x40u : rounded >> 16);
}
DDETR_INLINE void from_real(float x, Half* to) {
    const uint32_t all = bits_as<uint32_t>(x), bits = all & 0x7fffffffu, sign = all >> 16 & 0x8000u;
    uint32_t half;
    if (bits > 0x7f800000u) {
        half = 0x7e00u;  // NaN
    } else if (bits >= 0x477ff000u) {
        half = 0x7c00u;  // 65520 and more round to infinity
    } else if (bits < 0x38800000u) {
        // Below 2^-14 the halves are the multiples of 2^-24, which is the spacing of floats at 0.5.
        half = bits_as<uint32_t>(bits_as<float>(bits) + 0.5f) - 0x3f000000u;
    } else {
        half = (bits + 0xfffu + (bits >> 13 & 1) - 0x38000000u) >> 13;
    }
    to->bits = static_cast<uint16_t>(sign | half);
}

// ---- a vector ----

DDETR_INLINE FloatVec load(const float* from) {
    FloatVec v;
    memcpy(&v, from, sizeof(v));
    return v;
}
DDETR_INLINE DoubleVec load(const double* from) {
    DoubleVec v;
    memcpy(&v, from, sizeof(v));
    return v;
}
DDETR_INLINE FloatVec load(const Bfloat16* from) {
    ShortVec bits;
    memcpy(&bits, from, sizeof(bits));
    return bits_as<FloatVec>(__builtin_convertvector(bits, WordVec) << 16);
}
DDETR_INLINE FloatVec load(const Half* from) {
#if defined(__AVX512F__)
    // the masked form: GCC 12's header makes the plain one look uninitialised
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return bits_as<FloatVec>(_mm512_maskz_cvtph_ps(0xffff, half));
#elif defined(__F16C__)
    return bits_as<FloatVec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    ShortVec half;
    memcpy(&half, from, sizeof(half));
    const WordVec bits = __builtin_convertvector(half, WordVec), magnitude = (bits & 0x7fffu) << 13;
    const WordVec scaled = bits_as<WordVec>(bits_as<FloatVec>(magnitude) * 0x1p112f);
    const WordVec is_special = bits_as<WordVec>(magnitude >= 0x0f800000u);
    return bits_as<FloatVec>(scaled | (is_special & 0x7f800000u) | (bits & 0x8000u) << 16);
#endif
}

template <typename R>
DDETR_INLINE void store(Vec<R> v, R* to) {
    memcpy(to, &v, sizeof(v));
}

template <typename R>
DDETR_INLINE Vec<R> splat(R x) {
    return x - Vec<R>{};
}

DDETR_INLINE FloatVec multiply_add(FloatVec a, FloatVec b, FloatVec c) {
#if defined(__AVX512F__)
    return bits_as<FloatVec>(_mm512_fmadd_ps(bits_as<__m512>(a), bits_as<__m512>(b), bits_as<__m512>(c)));
#elif defined(__AVX2__)
    return bits_as<FloatVec>(_mm256_fmadd_ps(bits_as<__m256>(a), bits_as<__m256>(b), bits_as<__m256>(c)));
#elif defined(__aarch64__)
    return bits_as<FloatVec>(vfmaq_f32(bits_as<float32x4_t>(c), bits_as<float32x4_t>(a), bits_as<float32x4_t>(b)));
#else
    return a * b + c;
#endif
}
DDETR_INLINE DoubleVec multiply_add(DoubleVec a, DoubleVec b, DoubleVec c) {
#if defined(__AVX512F__)
    return bits_as<DoubleVec>(_mm512_fmadd_pd(bits_as<__m512d>(a), bits_as<__m512d>(b), bits_as<__m512d>(c)));
#elif defined(__AVX2__)
    return bits_as<DoubleVec>(_mm256_fmadd_pd(bits_as<__m256d>(a), bits_as<__m256d>(b), bits_as<__m256d>(c)));
#elif defined(__aarch64__)
    return bits_as<DoubleVec>(vfmaq_f64(bits_as<float64x2_t>(c), bits_as<float64x2_t>(a), bits_as<float64x2_t>(b)));
#else
    return a * b + c;
#endif
}

// Sum of the lanes, halving: the order is fixed for a build.
template <typename V>
DDETR_INLINE auto sum_lanes(V v) {
    using R = typename std::remove_reference<decltype(v[0])>::type;
    constexpr int bytes = sizeof(V);
    if constexpr (bytes > 16) {
        using HalfVec __attribute__((vector_size(bytes / 2))) = R;
        HalfVec parts[2];
        memcpy(parts, &v, sizeof(v));
        return sum_lanes<HalfVec>(parts[0] + parts[1]);
    } else if constexpr (sizeof(R) == 4) {
        return static_cast<R>((v[0] + v[2]) + (v[1] + v[3]));
    } else {
        return static_cast<R>(v[0] + v[1]);
    }
}

}  // namespace

#endif
