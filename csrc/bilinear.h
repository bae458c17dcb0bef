// The sampling arithmetic and the checks that the CPU and CUDA kernels share.
#ifndef DDETR_BILINEAR_H
#define DDETR_BILINEAR_H

#include <stdint.h>

#include "ddetr.h"

#ifdef __CUDACC__
#define DDETR_HD __host__ __device__ __forceinline__
#else
#define DDETR_HD inline __attribute__((always_inline))
#endif

// Everything here is private to its translation unit: msda_cpu.cpp is compiled
// once per instruction set, and the linker must not merge the copies.
namespace {

// Product rounded on its own. A fused x * width - 0.5 would put points that lie
// exactly on a pixel into the neighbouring cell, where the gradient of the
// location is another one; the host side is compiled without contraction.
DDETR_HD float rounded_product(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

DDETR_HD double rounded_product(double a, double b) {
#ifdef __CUDA_ARCH__
    return __dmul_rn(a, b);
#else
    return a * b;
#endif
}

// The cell of four pixels around a point: its upper left corner, and where in
// it the point lies.
template <typename Real>
struct Cell {
    bool is_used;          // false: the point contributes nothing; the rest is then of no
                           // meaning
    int32_t column, line;  // >= -1
    Real right,
        low;  // in [0,1): weights of the right column and of the lower line
};

// Where a point at a pixel falls in a map; sizes as Real, because callers keep
// them so.
template <typename Real>
DDETR_HD Cell<Real> locate_pixel(Real x, Real y, Real height, Real width) {
    // Comparisons with NaN are false, and a float outside the map must never
    // become an integer.
    const bool is_used = (x > Real(-1)) & (y > Real(-1)) & (x < width) & (y < height);
    const Real sx = is_used ? x : Real(0), sy = is_used ? y : Real(0);
    const int32_t tx = static_cast<int32_t>(sx),
                  ty = static_cast<int32_t>(sy);  // floor without a libm call
    const int32_t column = tx - (sx < static_cast<Real>(tx)), line = ty - (sy < static_cast<Real>(ty));
    return {is_used, column, line, sx - static_cast<Real>(column), sy - static_cast<Real>(line)};
}

// Where a location in [0,1] falls in a map.
template <typename Real>
DDETR_HD Cell<Real> locate(Real x_unit, Real y_unit, Real height, Real width) {
    const Real x = rounded_product(x_unit, width) - Real(0.5);
    const Real y = rounded_product(y_unit, height) - Real(0.5);
    return locate_pixel(x, y, height, width);
}

// a * b with a negative or overflowing result reported as -1, which spreads
// through further products.
inline int64_t checked_product(int64_t a, int64_t b) {
    int64_t product;
    if (a < 0 || b < 0 || __builtin_mul_overflow(a, b, &product)) return -1;
    return product;
}

// DDETR_OK where sizes, levels and dtype fit together and every index fits into
// 64 bits.
inline int32_t check_problem(const ddetr_msda_dims* dims, int32_t dtype, const int64_t* level_hw) {
    if (dims == nullptr || (level_hw == nullptr && dims->levels != 0)) return DDETR_ERROR_DIMS;
    const ddetr_msda_dims& n = *dims;
    const int64_t element_bytes = 16;  // no element, and no (x, y) pair, is larger
    const int64_t line = checked_product(checked_product(n.heads, n.channels), element_bytes);
    const int64_t value = checked_product(checked_product(n.batch, n.positions), line);
    const int64_t output = checked_product(checked_product(n.batch, n.queries), line);
    const int64_t samples = checked_product(checked_product(n.levels, n.points), checked_product(n.heads, 16));
    const int64_t locations = checked_product(checked_product(n.batch, n.queries), samples);
    // checked apart: a zero elsewhere must not hide a negative size
    const bool is_negative = (n.batch | n.positions | n.heads | n.channels | n.queries | n.levels | n.points) < 0;
    if (is_negative || value < 0 || output < 0 || locations < 0) return DDETR_ERROR_DIMS;
    if (dtype < DDETR_DTYPE_F32 || dtype > DDETR_DTYPE_BF16) return DDETR_ERROR_DTYPE;
    int64_t positions = 0;
    for (int64_t level = 0; level < n.levels; ++level) {
        const int64_t height = level_hw[2 * level], width = level_hw[2 * level + 1];
        const int64_t limit = INT32_MAX - 1;  // pixel coordinates are 32-bit
        if (height < 1 || width < 1 || height > limit || width > limit) return DDETR_ERROR_LEVELS;
        const int64_t area = checked_product(height, width);
        if (area < 0 || area > n.positions - positions) return DDETR_ERROR_LEVELS;
        positions += area;
    }
    return positions == n.positions ? DDETR_OK : DDETR_ERROR_LEVELS;
}

}  // namespace

#endif
