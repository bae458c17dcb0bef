// Vectors of the widest registers this file is compiled for, and the 16-bit
// storage types.
//
// GCC's and clang's vector extensions, so that one source serves x86 and Arm;
// intrinsics only where the extension has no word for it (fused multiply-add,
// half precision). All private to the translation unit, as in bilinear.h.
#ifndef DDETR_MSDA_CPU_SIMD_H
#define DDETR_MSDA_CPU_SIMD_H

#include <stdint.h>
#include <string.h>

#include <cmath>
#include <limits>
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
// Loops that vectorise by themselves and run once per row: one copy of each
// keeps the build short.
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
    // Read as a float, the exponent is too small by 112; the product also
    // normalises subnormals.
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
        // Below 2^-14 the halves are the multiples of 2^-24, which is the spacing
        // of floats at 0.5.
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

DDETR_INLINE void store_rounded(FloatVec v, float* to) {
    memcpy(to, &v, sizeof(v));
}
DDETR_INLINE void store_rounded(DoubleVec v, double* to) {
    memcpy(to, &v, sizeof(v));
}
// The bits of each lane rounded to bfloat16, in the lower halves of the words.
DDETR_INLINE WordVec bfloat16_bits(FloatVec v) {
    const WordVec bits = bits_as<WordVec>(v);
    const WordVec is_nan = bits_as<WordVec>(v != v);
    const WordVec rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
    return (is_nan & (bits >> 16 | 0x40u)) | (~is_nan & rounded);
}
DDETR_INLINE void store_rounded(FloatVec v, Bfloat16* to) {
    const ShortVec bits = __builtin_convertvector(bfloat16_bits(v), ShortVec);
    memcpy(to, &bits, sizeof(bits));
}
DDETR_INLINE void store_rounded(FloatVec v, Half* to) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtps_ph(0xffff, bits_as<__m512>(v), 0));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(bits_as<__m256>(v), 0));
#else
    for (int i = 0; i < kLanes<float>; ++i) from_real(v[i], to + i);
#endif
}

// An output of as many bytes leaves the second-level cache before anyone reads it.
constexpr int64_t kLargeOutput = 4 << 20;

// Aligned memory that is written whole and not read soon: without a copy in the
// caches, which would have to be read before. Where there is no such store, a
// plain one.
template <typename V>
DDETR_INLINE void store_past_caches(V v, void* to) {
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(to), bits_as<__m512i>(v));
#endif
#if defined(__AVX2__)
    if constexpr (sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(to), bits_as<__m256i>(v));
#endif
    memcpy(to, &v, sizeof(v));
}

// To be called after them, before others read.
DDETR_INLINE void end_stores_past_caches() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
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

template <typename V>
DDETR_INLINE auto max_lanes(V v) {
    using R = typename std::remove_reference<decltype(v[0])>::type;
    constexpr int bytes = sizeof(V);
    if constexpr (bytes > 16) {
        using HalfVec __attribute__((vector_size(bytes / 2))) = R;
        HalfVec parts[2];
        memcpy(parts, &v, sizeof(v));
        return max_lanes<HalfVec>(parts[0] > parts[1] ? parts[0] : parts[1]);
    } else {
        const R a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
        return static_cast<R>(a > b ? a : b);
    }
}

// Sums of the lanes of four vectors, all in one fixed order.
DDETR_INLINE void sum_lanes_of_four(const DoubleVec* v, double* sums) {
    for (int i = 0; i < 4; ++i) sums[i] = sum_lanes(v[i]);
}
DDETR_INLINE void sum_lanes_of_four(const FloatVec* v, float* sums) {
#if defined(__AVX512F__) || defined(__AVX2__)
    // Numbers of two vectors side by side, then of four: every 128 bits then
    // hold a part of all four sums.
#if defined(__AVX512F__)
    const auto pair = [](FloatVec a, FloatVec b) {
        const __m512 x = bits_as<__m512>(a), y = bits_as<__m512>(b);
        return _mm512_maskz_unpacklo_ps(0xffff, x, y) + _mm512_maskz_unpackhi_ps(0xffff, x, y);
    };
    const __m512d first = _mm512_castps_pd(pair(v[0], v[1])), second = _mm512_castps_pd(pair(v[2], v[3]));
    const __m512 parts = _mm512_castpd_ps(_mm512_maskz_unpacklo_pd(0xff, first, second)) +
                         _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(0xff, first, second));
    __m256 half[2];
    memcpy(half, &parts, sizeof(half));
    const __m256 halves = half[0] + half[1];
#else
    const auto pair = [](FloatVec a, FloatVec b) {
        const __m256 x = bits_as<__m256>(a), y = bits_as<__m256>(b);
        return _mm256_unpacklo_ps(x, y) + _mm256_unpackhi_ps(x, y);
    };
    const __m256d first = _mm256_castps_pd(pair(v[0], v[1])), second = _mm256_castps_pd(pair(v[2], v[3]));
    const __m256 halves =
        _mm256_castpd_ps(_mm256_unpacklo_pd(first, second)) + _mm256_castpd_ps(_mm256_unpackhi_pd(first, second));
#endif
    _mm_storeu_ps(sums, _mm256_castps256_ps128(halves) + _mm256_extractf128_ps(halves, 1));
#else
    for (int i = 0; i < 4; ++i) sums[i] = sum_lanes(v[i]);
#endif
}

// exp(x) for x <= 0 to 2e-7 of the result, and 0 below -87; NaN stays NaN.
DDETR_INLINE FloatVec exp_of_negative(FloatVec x) {
    const FloatVec is_normal = x < -87.0f ? FloatVec{} : splat(1.0f);  // NaN counts as normal
    const FloatVec power = (x < -87.0f ? FloatVec{} : x) * 1.44269504f;
    // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
    const FloatVec shifted = power + 0x1.8p23f, f = power - (shifted - 0x1.8p23f);
    // 2^f on [-1/2, 1/2]: least largest relative error, 2e-9 before rounding
    FloatVec p = splat(1.53458110e-4f);
    p = multiply_add(p, f, splat(1.33999309e-3f));
    p = multiply_add(p, f, splat(9.61848907e-3f));
    p = multiply_add(p, f, splat(5.55032864e-2f));
    p = multiply_add(p, f, splat(2.40226462e-1f));
    p = multiply_add(p, f, splat(6.93147182e-1f));
    p = multiply_add(p, f, splat(1.0f));
    const WordVec exponent = (bits_as<WordVec>(shifted) + (127u - 0x4b400000u)) << 23;
    return p * (bits_as<FloatVec>(exponent) * is_normal);
}

// exp(x) / sum of exp(x); weights has room up to a multiple of 16.
DDETR_INLINE void softmax(const float* logits, int64_t count, float* weights) {
    constexpr int64_t lanes = kLanes<float>;
    memcpy(weights, logits, count * sizeof(float));
    const int64_t all = (count + lanes - 1) / lanes * lanes;
    for (int64_t i = count; i < all; ++i) weights[i] = -std::numeric_limits<float>::infinity();
    FloatVec most = load(weights);
    for (int64_t i = lanes; i < all; i += lanes) {
        const FloatVec x = load(weights + i);
        most = x > most ? x : most;
    }
    const FloatVec largest = splat(max_lanes(most));
    FloatVec sum = {};
    for (int64_t i = 0; i < all; i += lanes) {
        const FloatVec e = exp_of_negative(load(weights + i) - largest);
        sum += e;
        store<float>(e, weights + i);
    }
    const FloatVec scale = splat(1 / sum_lanes(sum));
    for (int64_t i = 0; i < all; i += lanes) store<float>(load(weights + i) * scale, weights + i);
}
DDETR_INLINE void softmax(const double* logits, int64_t count, double* weights) {
    double largest = -std::numeric_limits<double>::infinity(), sum = 0;
    for (int64_t i = 0; i < count; ++i) largest = logits[i] > largest ? logits[i] : largest;
    for (int64_t i = 0; i < count; ++i) sum += weights[i] = std::exp(logits[i] - largest);
    for (int64_t i = 0; i < count; ++i) weights[i] /= sum;
}

}  // namespace

#endif
