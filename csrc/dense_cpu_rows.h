// Rows of a matrix product: what becomes of a tile's sums, and rows that lie close together times all panels.
#ifndef DDETR_DENSE_CPU_ROWS_H
#define DDETR_DENSE_CPU_ROWS_H

#include <initializer_list>

#include "dense_cpu_kernels.h"
#include "dense_cpu_tiles.h"

namespace {

using T = Engine::Element;
using Weight = Engine::Weight;
constexpr int64_t kPanel = Engine::kPanel, kTileRows = Engine::kTileRows;
constexpr int64_t kChunkTiles = 128 / kTileRows, kBlockRows = kChunkTiles * kTileRows;

DDETR_INLINE int64_t ceil_divide(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

DDETR_INLINE int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

DDETR_INLINE void store_element(FloatVec v, float* to) {
    store<float>(v, to);
}
DDETR_INLINE void store_element(FloatVec v, Bfloat16* to) {
#if defined(__AVX512BF16__)
    const __m256bh rounded = _mm512_cvtneps_pbh(bits_as<__m512>(v));
    memcpy(to, &rounded, sizeof(rounded));
#else
    for (int i = 0; i < kLanes<float>; ++i) from_real(v[i], to + i);
#endif
}

// Two vectors side by side, which is a panel.
DDETR_INLINE void store_pair(FloatVec a, FloatVec b, float* to, bool past_caches) {
    if (past_caches) {
        store_past_caches(a, to);
        store_past_caches(b, to + kLanes<float>);
        return;
    }
    store<float>(a, to);
    store<float>(b, to + kLanes<float>);
}
DDETR_INLINE void store_pair(FloatVec a, FloatVec b, Bfloat16* to, bool past_caches) {
#if defined(__AVX512BF16__)
    const __m512bh rounded = _mm512_cvtne2ps_pbh(bits_as<__m512>(b), bits_as<__m512>(a));
    if (past_caches) return store_past_caches(rounded, to);
    memcpy(to, &rounded, sizeof(rounded));
#else
    static_cast<void>(past_caches);
    store_element(a, to);
    store_element(b, to + kLanes<float>);
#endif
}

// Whether rows of panels are better written past the caches: nobody reads so much before it has left the second
// level, and every panel fills whole lines, as it lies at multiples of `steps` elements from the output's first.
template <typename Out>
DDETR_INLINE bool is_written_past_caches(const Out* output, int64_t count, std::initializer_list<int64_t> steps) {
    const int64_t line = 64, element = sizeof(Out);
    bool fills_lines = reinterpret_cast<uintptr_t>(output) % line == 0 && kPanel * element % line == 0;
    for (const int64_t step : steps) fills_lines = fills_lines && step * element % line == 0;
    return fills_lines && count * element >= kLargeOutput;
}

DDETR_INLINE FloatVec at_least_zero(FloatVec v) {
    return v < FloatVec{} ? FloatVec{} : v;  // NaN stays
}

// ---- what becomes of a tile's sums ----

constexpr const T* kNothing = nullptr;  // to add

// One row of a tile, `columns` of them: act(sums + bias + added).
template <typename Added = T, typename Out>
DDETR_INLINE void finish_row(const float* sums, const float* bias, const Added* added, bool relu, Out* to,
                             int64_t columns, bool past_caches = false) {
    if (columns == kPanel) {
        FloatVec v[2];
        for (int64_t i = 0; i < 2; ++i) {
            const int64_t c = i * kLanes<float>;
            v[i] = load(sums + c) + load(bias + c);
            if (added != nullptr) v[i] += load(added + c);
            if (relu) v[i] = at_least_zero(v[i]);
        }
        store_pair(v[0], v[1], to, past_caches);
        return;
    }
    for (int64_t c = 0; c < columns; ++c) {
        float v = sums[c] + bias[c];
        if (added != nullptr) v += to_real(added[c]);
        if (relu && v < 0) v = 0;
        from_real(v, to + c);
    }
}

// Multiplies `count` rows from `input` on with all panels; finish(panel, row, its sums) for each. An engine that
// splits its rows does so once, into `split`.
template <typename E = Engine, typename Finish>
DDETR_INLINE void multiply_rows(const T* input, int64_t row_step, int64_t count, const Weight* packed, int64_t depth,
                                int64_t columns, void* split, Finish finish) {
    alignas(64) float sums[kTileRows * kPanel];
    char* split_rows = static_cast<char*>(split);
    const int64_t split_bytes = depth * E::kSplitBytes;  // of a row
    if constexpr (E::kSplitBytes > 0) {
        for (int64_t row = 0; row < count; row += kTileRows) {
            E::split(input + row * row_step, row_step, smaller(kTileRows, count - row), kTileRows, depth,
                     split_rows + row * split_bytes);
        }
    }
    for (int64_t column = 0; column < columns; column += kPanel) {
        const Weight* panel = packed + column * depth;
        for (int64_t row = 0; row < count; row += kTileRows) {
            const int64_t rows = smaller(kTileRows, count - row);
            if constexpr (E::kSplitBytes > 0) {
                E::tile_of_split({split_rows + row * split_bytes, kTileRows, 1, 1, 1, 0, depth}, panel, rows, sums);
            } else {
                E::tile({input + row * row_step, row_step, 1, 1, 0, 0, depth}, panel, rows, sums);
            }
            for (int64_t r = 0; r < rows; ++r) finish(column, row + r, sums + r * kPanel);
        }
    }
}

}  // namespace

#endif
