// The innermost loops of libddetr_cpu's dense layers: one tile of a matrix product, rows that step evenly through
// memory times one packed panel of weights. One of three engines, by the instruction set this is compiled for.
//
// A panel is kPanel columns of the weights, all their taps and channels in the order they are used:
// [depth][kPanel] floats, or [depth / 2][kPanel][2] bfloat16, the pairs that the dot-product instructions take.
#ifndef DDETR_DENSE_CPU_TILES_H
#define DDETR_DENSE_CPU_TILES_H

#include "msda_cpu_simd.h"

namespace {

// Which rows a tile multiplies: row r of tap (y, x) starts at first + y * tap_line + x * tap_pixel + r * row_step.
template <typename T>
struct Rows {
    const T* first;
    int64_t row_step, taps_y, taps_x, tap_line, tap_pixel;
    int64_t depth;  // elements of one tap
};

// The sums of a tile, kPanel floats a row, are written to `sums`.
#if defined(DDETR_ENGINE_AMX)

struct Engine {
    using Element = Bfloat16;
    static constexpr int64_t kPanel = 32, kTileRows = 32, kDepthStep = 32;

    // Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 weights.
    static void configure(int64_t rows) {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t lines[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        const uint8_t upper = static_cast<uint8_t>(rows < 16 ? rows : 16);
        const uint8_t lower = static_cast<uint8_t>(rows > 16 ? rows - 16 : 1);
        config.lines[0] = config.lines[1] = config.lines[4] = upper;
        config.lines[2] = config.lines[3] = config.lines[5] = lower;
        see_memory();
        _tile_loadconfig(&config);
    }

    static void begin() { configure(kTileRows); }
    static void end() { _tile_release(); }

    static void tile(const Rows<Bfloat16>& rows, const Bfloat16* panel, int64_t count, float* sums) {
        see_memory();
        if (count < kTileRows) configure(count);
        if (count > 16) {
            two_by_two(rows, panel, sums);
        } else {
            one_by_two(rows, panel, sums);
        }
        if (count < kTileRows) configure(kTileRows);
    }

  private:
    // GCC's tile intrinsics do not say that they read memory: what was written before must be there by now.
    static DDETR_INLINE void see_memory() { asm volatile("" ::: "memory"); }

    static DDETR_INLINE void two_by_two(const Rows<Bfloat16>& rows, const Bfloat16* panel, float* sums) {
        const int64_t step = rows.row_step * 2;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t y = 0; y < rows.taps_y; ++y) {
            for (int64_t x = 0; x < rows.taps_x; ++x) {
                const Bfloat16* upper = rows.first + y * rows.tap_line + x * rows.tap_pixel;
                const Bfloat16* lower = upper + 16 * rows.row_step;
                for (int64_t k = 0; k < rows.depth; k += kDepthStep, panel += kDepthStep * kPanel) {
                    _tile_loadd(6, panel, 128);
                    _tile_loadd(4, upper + k, step);
                    _tile_loadd(7, panel + 32, 128);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_loadd(5, lower + k, step);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
            }
        }
        _tile_stored(0, sums, kPanel * 4);
        _tile_stored(1, sums + 16, kPanel * 4);
        _tile_stored(2, sums + 16 * kPanel, kPanel * 4);
        _tile_stored(3, sums + 16 * kPanel + 16, kPanel * 4);
    }

    static DDETR_INLINE void one_by_two(const Rows<Bfloat16>& rows, const Bfloat16* panel, float* sums) {
        const int64_t step = rows.row_step * 2;
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t y = 0; y < rows.taps_y; ++y) {
            for (int64_t x = 0; x < rows.taps_x; ++x) {
                const Bfloat16* upper = rows.first + y * rows.tap_line + x * rows.tap_pixel;
                for (int64_t k = 0; k < rows.depth; k += kDepthStep, panel += kDepthStep * kPanel) {
                    _tile_loadd(4, upper + k, step);
                    _tile_loadd(6, panel, 128);
                    _tile_loadd(7, panel + 32, 128);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_dpbf16ps(1, 4, 7);
                }
            }
        }
        _tile_stored(0, sums, kPanel * 4);
        _tile_stored(1, sums + 16, kPanel * 4);
    }
};

#else

#if defined(DDETR_ENGINE_BF16)
using DenseElement = Bfloat16;
constexpr int64_t kPair = 2;
#else
using DenseElement = float;
constexpr int64_t kPair = 1;
#endif

struct Engine {
    using Element = DenseElement;
    // 24 sums, 2 vectors of weights and one of rows fill AVX-512's 32 registers; 12 sums AVX2's 16.
    static constexpr int64_t kPanel = 2 * kLanes<float>, kTileRows = kVectorBytes == 64 ? 12 : 6, kDepthStep = kPair;

    static void begin() {}
    static void end() {}

    static void tile(const Rows<Element>& rows, const Element* panel, int64_t count, float* sums) {
        if (count == kTileRows) return product<kTileRows>(rows, panel, 0, sums);
        int64_t row = 0;
        for (; count - row >= 8; row += 8) product<8>(rows, panel, row, sums);
        for (; count - row >= 4; row += 4) product<4>(rows, panel, row, sums);
        for (; row < count; ++row) product<1>(rows, panel, row, sums);
    }

  private:
    static DDETR_INLINE FloatVec add_product(float row, const float* panel, FloatVec sum) {
        return multiply_add(splat<float>(row), load(panel), sum);
    }
#if defined(DDETR_ENGINE_BF16)
    static DDETR_INLINE FloatVec add_product(uint32_t row, const uint32_t* panel, FloatVec sum) {
        const __m512i pair = _mm512_set1_epi32(static_cast<int32_t>(row)), weights = _mm512_loadu_si512(panel);
        return bits_as<FloatVec>(
            _mm512_dpbf16_ps(bits_as<__m512>(sum), bits_as<__m512bh>(pair), bits_as<__m512bh>(weights)));
    }
    using Word = uint32_t;
#else
    using Word = float;
#endif

    template <int kRows>
    static DDETR_NOINLINE void product(const Rows<Element>& rows, const Element* panel, int64_t row, float* sums) {
        // Every third row has a pointer of its own, the others are at one and two steps from it: an addressing mode.
        constexpr int kPointers = (kRows + 2) / 3;
        FloatVec sum[kRows][2] = {};
        const int64_t step = rows.row_step / kPair;
        const Word* weights = reinterpret_cast<const Word*>(panel);
        for (int64_t y = 0; y < rows.taps_y; ++y) {
            for (int64_t x = 0; x < rows.taps_x; ++x) {
                const Word* at[kPointers];
                at[0] = reinterpret_cast<const Word*>(rows.first + y * rows.tap_line + x * rows.tap_pixel +
                                                      row * rows.row_step);
                for (int i = 1; i < kPointers; ++i) at[i] = at[i - 1] + 3 * step;
                for (int64_t k = rows.depth / kPair; k > 0; --k, weights += kPanel) {
#pragma GCC unroll 16
                    for (int r = 0; r < kRows; ++r) {
                        const Word word = at[r / 3][(r % 3) * step];
                        sum[r][0] = add_product(word, weights, sum[r][0]);
                        sum[r][1] = add_product(word, weights + kLanes<float>, sum[r][1]);
                    }
                    for (int i = 0; i < kPointers; ++i) {
                        ++at[i];
                        asm("" : "+r"(at[i]));  // in a register of its own: GCC would gather the pointers in a vector
                    }
                }
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
            store(sum[r][0], sums + (row + r) * kPanel);
            store(sum[r][1], sums + (row + r) * kPanel + kLanes<float>);
        }
    }
};

#endif

}  // namespace

#endif
