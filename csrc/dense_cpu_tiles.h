// The innermost loops of libddetr_cpu's dense layers: one tile of a matrix product, rows that step evenly through
// memory times one packed panel of weights. One of four engines, by the instruction set this is compiled for.
//
// A panel is kPanel columns of the weights, all their taps and channels in the order they are used:
// [depth][kPanel] floats, or [depth / 2][kPanel][2] bfloat16, the pairs that the dot-product instructions take, or
// of each 32 rows the parts of DDETR_ENGINE_F32_AMX one after the other: [depth / 32][part][32 / 2][kPanel][2].
#ifndef DDETR_DENSE_CPU_TILES_H
#define DDETR_DENSE_CPU_TILES_H

#include "msda_cpu_simd.h"

namespace {

// Which rows a tile multiplies: row r of tap (y, x) starts at first + y * tap_line + x * tap_pixel + r * row_step.
template <typename T>
struct Rows {
    const T* first;
    int64_t row_step, taps_y, taps_x, tap_line, tap_pixel;
    int64_t depth;               // elements of one tap
    const Rows* then = nullptr;  // more rows for the same sums, whose weights follow these rows'
};

// visit(a tap's first row, step from row to row, elements of the tap) in the order of the weights.
template <typename T, typename Visit>
DDETR_INLINE void visit_taps(const Rows<T>& rows, const Visit& visit) {
    for (const Rows<T>* from = &rows; from != nullptr; from = from->then) {
        for (int64_t y = 0; y < from->taps_y; ++y) {
            for (int64_t x = 0; x < from->taps_x; ++x) {
                visit(from->first + y * from->tap_line + x * from->tap_pixel, from->row_step, from->depth);
            }
        }
    }
}

// The sums of a tile, kPanel floats a row, are written to `sums`.
#if defined(DDETR_ENGINE_AMX) || defined(DDETR_ENGINE_SPLIT)

// The tile registers: 0 to 3 are sums, 4 and 5 rows, 6 and 7 weights.
struct TileRegisters {
    static constexpr int64_t kPanel = 32, kTileRows = 32, kDepthStep = 32;

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
    static void end() {
        _tile_release();
        end_stores_past_caches();
    }

    // GCC's tile intrinsics do not say that they read memory: what was written before must be there by now.
    static DDETR_INLINE void see_memory() { asm volatile("" ::: "memory"); }

    template <bool kHasLower>
    static DDETR_INLINE void clear_sums() {
        _tile_zero(0);
        _tile_zero(1);
        if (kHasLower) {
            _tile_zero(2);
            _tile_zero(3);
        }
    }

    template <bool kHasLower>
    static DDETR_INLINE void store_sums(float* sums) {
        _tile_stored(0, sums, kPanel * 4);
        _tile_stored(1, sums + 16, kPanel * 4);
        if (kHasLower) {
            _tile_stored(2, sums + 16 * kPanel, kPanel * 4);
            _tile_stored(3, sums + 16 * kPanel + 16, kPanel * 4);
        }
    }
};

#endif

#if defined(DDETR_ENGINE_AMX)

struct Engine : TileRegisters {
    using Element = Bfloat16;
    using Weight = Bfloat16;
    static constexpr int64_t kSplitBytes = 0;

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
    static DDETR_INLINE void two_by_two(const Rows<Bfloat16>& rows, const Bfloat16* panel, float* sums) {
        clear_sums<true>();
        visit_taps(rows, [&](const Bfloat16* upper, int64_t row_step, int64_t depth) {
            const Bfloat16* lower = upper + 16 * row_step;
            for (int64_t k = 0; k < depth; k += kDepthStep, panel += kDepthStep * kPanel) {
                _tile_loadd(6, panel, 128);
                _tile_loadd(4, upper + k, row_step * 2);
                _tile_loadd(7, panel + 32, 128);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(5, lower + k, row_step * 2);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        });
        store_sums<true>(sums);
    }

    static DDETR_INLINE void one_by_two(const Rows<Bfloat16>& rows, const Bfloat16* panel, float* sums) {
        clear_sums<false>();
        visit_taps(rows, [&](const Bfloat16* upper, int64_t row_step, int64_t depth) {
            for (int64_t k = 0; k < depth; k += kDepthStep, panel += kDepthStep * kPanel) {
                _tile_loadd(4, upper + k, row_step * 2);
                _tile_loadd(6, panel, 128);
                _tile_loadd(7, panel + 32, 128);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
            }
        });
        store_sums<false>(sums);
    }
};

#elif defined(DDETR_ENGINE_SPLIT)

// Floats as sums of three bfloat16 that lose nothing: a float has 24 digits, each part takes the next eight. Of the
// nine products of parts the six largest are added up, in float; the others are below the last digit of a product.
struct SplitWeight {
    uint16_t parts[3];
};

struct Engine : TileRegisters {
    using Element = float;
    using Weight = SplitWeight;
    static constexpr int64_t kSplitBytes = sizeof(SplitWeight);

    // Pixels split beforehand, of `taps_y` lines the ones that the taps of a tile's rows meet: of each line and each
    // 32 numbers their parts, one after the other, of each part all pixels.
    struct Split {
        const char* pixels;
        int64_t line_pixels;  // that there is room for
        int64_t taps_y, taps_x, row_pixels, tap_pixels;
        int64_t depth;
        const Split* then = nullptr;  // as of Rows

        int64_t line_bytes() const { return line_pixels * depth * kSplitBytes; }
    };

    static void split(const float* from, int64_t pixel_step, int64_t pixels, int64_t room, int64_t depth, char* to) {
        for (int64_t i = 0; i < pixels; ++i) {
            split_pixel(from + i * pixel_step, depth, to + i * kDepthStep * 2, room * kDepthStep * 2);
        }
    }

    static void tile(const Rows<float>& rows, const SplitWeight* panel, int64_t count, float* sums) {
        const char* weights = reinterpret_cast<const char*>(panel);
        multiply(count, sums, [&](const auto& add_steps) {
            alignas(64) char parts[kSlab * kTileRows * kSplitBytes];
            visit_taps(rows, [&](const float* at, int64_t row_step, int64_t depth) {
                for (int64_t slab = 0; slab < depth; slab += kSlab) {
                    const int64_t numbers = depth - slab < kSlab ? depth - slab : kSlab;
                    split(at + slab, row_step, count, kTileRows, numbers, parts);
                    add_steps(parts, kTileRows, 1, weights, numbers);
                    weights += numbers * kWeightBytes;
                }
            });
        });
    }

    static void tile_of_split(const Split& split, const SplitWeight* panel, int64_t count, float* sums) {
        const char* weights = reinterpret_cast<const char*>(panel);
        multiply(count, sums, [&](const auto& add_steps) {
            for (const Split* from = &split; from != nullptr; from = from->then) {
                for (int64_t y = 0; y < from->taps_y; ++y) {
                    for (int64_t x = 0; x < from->taps_x; ++x) {
                        const int64_t first = y * from->line_bytes() + x * from->tap_pixels * kDepthStep * 2;
                        add_steps(from->pixels + first, from->line_pixels, from->row_pixels, weights, from->depth);
                        weights += from->depth * kWeightBytes;
                    }
                }
            }
        });
    }

  private:
    static constexpr int64_t kSlab = 128;  // numbers of each row split at once: they stay in the first-level cache
    static constexpr int64_t kWeightBytes = kPanel * kSplitBytes, kPartBytes = kDepthStep * kPanel * 2;

    static DDETR_INLINE void split_pixel(const float* from, int64_t numbers, char* to, int64_t part_bytes) {
        const __m512i upper_halves = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33,
                                                      31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
        for (int64_t k = 0; k < numbers; k += kDepthStep) {
            FloatVec low = load(from + k), high = load(from + k + 16);
#pragma GCC unroll 3
            for (int part = 0; part < 3; ++part, to += part_bytes) {
                const __m512i upper =
                    _mm512_permutex2var_epi16(bits_as<__m512i>(low), upper_halves, bits_as<__m512i>(high));
                _mm512_storeu_si512(to, upper);
                low -= bits_as<FloatVec>(bits_as<WordVec>(low) & 0xffff0000u);
                high -= bits_as<FloatVec>(bits_as<WordVec>(high) & 0xffff0000u);
            }
        }
    }

    // Writes the sums that run(add_steps) has made of its steps.
    template <typename Run>
    static DDETR_INLINE void multiply(int64_t count, float* sums, const Run& run) {
        if (count < kTileRows) configure(count);
        if (count > 16) {
            clear_sums<true>();
            run(add_steps<true>);
            store_sums<true>(sums);
        } else {
            clear_sums<false>();
            run(add_steps<false>);
            store_sums<false>(sums);
        }
        see_memory();
        if (count < kTileRows) configure(kTileRows);
    }

    // Adds `depth` numbers of the rows times their weights; the rows are `row_pixels` apart among `room` pixels.
    template <bool kHasLower>
    static DDETR_NOINLINE void add_steps(const char* pixels, int64_t room, int64_t row_pixels, const char* weights,
                                         int64_t depth) {
        const int64_t part_bytes = room * kDepthStep * 2, row_bytes = row_pixels * kDepthStep * 2;
        see_memory();
        for (int64_t k = 0; k < depth; k += kDepthStep, pixels += 3 * part_bytes, weights += 3 * kPartBytes) {
            add_part<kHasLower, 3>(pixels, part_bytes, row_bytes, weights);
            add_part<kHasLower, 2>(pixels, part_bytes, row_bytes, weights + kPartBytes);
            add_part<kHasLower, 1>(pixels, part_bytes, row_bytes, weights + 2 * kPartBytes);
        }
        see_memory();
    }

    // A part of the weights times the first parts of the rows.
    template <bool kHasLower, int kRowParts>
    static DDETR_INLINE void add_part(const char* rows, int64_t part_bytes, int64_t row_bytes, const char* weights) {
        _tile_loadd(6, weights, 128);
        _tile_loadd(7, weights + 64, 128);
#pragma GCC unroll 3
        for (int part = 0; part < kRowParts; ++part, rows += part_bytes) {
            _tile_loadd(4, rows, row_bytes);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (kHasLower) {
                _tile_loadd(5, rows + 16 * row_bytes, row_bytes);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
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
    using Weight = DenseElement;
    static constexpr int64_t kSplitBytes = 0;
    // 24 sums, 2 vectors of weights and one of rows fill AVX-512's 32 registers; 12 sums AVX2's 16.
    static constexpr int64_t kPanel = 2 * kLanes<float>, kTileRows = kVectorBytes == 64 ? 12 : 6, kDepthStep = kPair;

    static void begin() {}
    static void end() { end_stores_past_caches(); }

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
        const Word* weights = reinterpret_cast<const Word*>(panel);
        // Not visit_taps: GCC would keep sums that a lambda captures in memory, at half the speed.
        for (const Rows<Element>* from = &rows; from != nullptr; from = from->then) {
            const int64_t step = from->row_step / kPair;
            for (int64_t y = 0; y < from->taps_y; ++y) {
                for (int64_t x = 0; x < from->taps_x; ++x) {
                    const Word* at[kPointers];
                    at[0] = reinterpret_cast<const Word*>(from->first + y * from->tap_line + x * from->tap_pixel +
                                                          row * from->row_step);
                    for (int i = 1; i < kPointers; ++i) at[i] = at[i - 1] + 3 * step;
                    for (int64_t k = from->depth / kPair; k > 0; --k, weights += kPanel) {
#pragma GCC unroll 16
                        for (int r = 0; r < kRows; ++r) {
                            const Word word = at[r / 3][(r % 3) * step];
                            sum[r][0] = add_product(word, weights, sum[r][0]);
                            sum[r][1] = add_product(word, weights + kLanes<float>, sum[r][1]);
                        }
                        for (int i = 0; i < kPointers; ++i) {
                            ++at[i];
                            asm(""
                                : "+r"(at[i]));  // a register of its own: GCC would gather the pointers in a vector
                        }
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
