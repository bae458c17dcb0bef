// Half precision numbers as CUDA names them, by arithmetic on bits.
#ifndef EMULATED_CUDA_FP16_H
#define EMULATED_CUDA_FP16_H

#include "cuda_runtime.h"

struct __half {
    uint16_t bits;
};
struct __half2 {
    __half x, y;
};

inline float __half2float(__half half) {
    const unsigned sign = (half.bits & 0x8000u) << 16, exponent = half.bits >> 10 & 31, fraction = half.bits & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    if (exponent == 0) return (sign ? -1.f : 1.f) * std::ldexp(static_cast<float>(fraction), -24);
    return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

inline __half __float2half_rn(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    const float size = std::fabs(x);
    if (std::isnan(x)) return {static_cast<uint16_t>(sign | 0x7e00u)};
    if (size >= 65520.f) return {static_cast<uint16_t>(sign | 0x7c00u)};  // half way past the largest
    int exponent = -14;
    if (size >= 0x1p-14f) std::frexp(size, &exponent), --exponent;
    // in units of the last place; nearbyint rounds ties to even
    const uint32_t units = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 10 - exponent)));
    const uint32_t biased = size >= 0x1p-14f ? static_cast<uint32_t>(exponent + 14) << 10 : 0;
    return {static_cast<uint16_t>(sign | (biased + units))};
}

inline float2 __half22float2(__half2 pair) {
    return {__half2float(pair.x), __half2float(pair.y)};
}
inline __half2 __floats2half2_rn(float x, float y) {
    return {__float2half_rn(x), __float2half_rn(y)};
}

#endif
