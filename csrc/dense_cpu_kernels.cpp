// The dense layers of libddetr_cpu, compiled once per engine with DDETR_DENSE_KERNELS naming the copy.
//
// A product runs panel by panel over a chunk of rows that stays in the second-level cache, tile by tile
// (dense_cpu_tiles.h); a tile's sums stay in the first level until bias, addend and activation are applied.
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

DDETR_INLINE FloatVec at_least_zero(FloatVec v) {
    return v < FloatVec{} ? FloatVec{} : v;  // NaN stays
}

// ---- what becomes of a tile's sums ----

constexpr const T* kNothing = nullptr;  // to add

// One row of a tile, `columns` of them: act(sums + bias + added).
template <typename Added = T, typename Out>
DDETR_INLINE void finish_row(const float* sums, const float* bias, const Added* added, bool relu, Out* to,
                             int64_t columns) {
    if (columns == kPanel) {
        for (int64_t c = 0; c < kPanel; c += kLanes<float>) {
            FloatVec v = load(sums + c) + load(bias + c);
            if (added != nullptr) v += load(added + c);
            if (relu) v = at_least_zero(v);
            store_element(v, to + c);
        }
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
            E::split(input + row * row_step, row_step, smaller(kTileRows, count - row), depth,
                     split_rows + row * split_bytes);
        }
    }
    for (int64_t column = 0; column < columns; column += kPanel) {
        const Weight* panel = packed + column * depth;
        for (int64_t row = 0; row < count; row += kTileRows) {
            const int64_t rows = smaller(kTileRows, count - row);
            if constexpr (E::kSplitBytes > 0) {
                E::tile_of_split(split_rows + row * split_bytes, depth, panel, rows, sums);
            } else {
                E::tile({input + row * row_step, row_step, 1, 1, 0, 0, depth}, panel, rows, sums);
            }
            for (int64_t r = 0; r < rows; ++r) finish(column, row + r, sums + r * kPanel);
        }
    }
}

// ---- products ----

// How a product's rows are cut. Where lines follow each other evenly they are taken as one, and the pixels between
// them, which belong to no output, are computed and dropped.
struct Cut {
    int64_t lines, width, tiles_per_line, chunks, groups, panels_per_group;
    bool is_folded;
    int64_t fold;

    explicit Cut(const ddetr_product& p) {
        fold = p.input_pixel > 0 && p.input_line % p.input_pixel == 0 ? p.input_line / p.input_pixel : 0;
        is_folded = p.lines > 1 && fold >= p.width && fold * 8 <= p.width * 9;
        lines = is_folded ? 1 : p.lines;
        width = is_folded ? (p.lines - 1) * fold + p.width : p.width;
        tiles_per_line = ceil_divide(width, kTileRows);
        chunks = ceil_divide(lines * tiles_per_line, kChunkTiles);
        const int64_t panels = ceil_divide(p.columns, kPanel), wanted = 16;
        groups = chunks >= wanted ? 1 : smaller(panels, ceil_divide(wanted, chunks));
        panels_per_group = ceil_divide(panels, groups);
        groups = ceil_divide(panels, panels_per_group);
    }
};

int64_t product_items(const ddetr_product& p) {
    const Cut cut(p);
    return cut.chunks * cut.groups;
}

template <typename Out>
DDETR_INLINE void finish_tile(const ddetr_product& p, const Cut& cut, int64_t line, int64_t first, int64_t count,
                              int64_t column, const float* sums) {
    int64_t y = line, x = first;
    if (cut.is_folded) {
        y = first / cut.fold;
        x = first % cut.fold;
    }
    const int64_t columns = smaller(kPanel, p.columns - column);
    Out* output = static_cast<Out*>(p.output) + column / p.group * p.output_group + column % p.group;
    const T* added = static_cast<const T*>(p.added);
    for (int64_t r = 0; r < count; ++r, ++x) {
        if (cut.is_folded && x == cut.fold) {
            x = 0;
            ++y;
        }
        if (x >= p.width) continue;
        finish_row(sums + r * kPanel, p.bias + column,
                   added == nullptr ? kNothing : added + y * p.added_line + x * p.added_pixel + column, p.relu != 0,
                   output + y * p.output_line + x * p.output_pixel, columns);
    }
}

// An engine that splits its rows does so once for all panels where `slot` has room for them; it is null where not.
template <typename E = Engine>
void run_product(const ddetr_product& p, int64_t item, void* slot) {
    alignas(64) float sums[kTileRows * kPanel];
    const Cut cut(p);
    const int64_t tile_begin = item / cut.groups * kChunkTiles;
    const int64_t tile_end = smaller(tile_begin + kChunkTiles, cut.lines * cut.tiles_per_line);
    const int64_t column_begin = item % cut.groups * cut.panels_per_group * kPanel;
    const int64_t column_end = smaller(column_begin + cut.panels_per_group * kPanel, p.columns);
    const int64_t depth = p.taps_y * p.taps_x * p.depth;
    const T* input = static_cast<const T*>(p.input);
    char* split_rows = p.taps_y * p.taps_x == 1 ? static_cast<char*>(slot) : nullptr;
    const int64_t split_bytes = kTileRows * depth * E::kSplitBytes;  // of a tile
    const auto visit_tiles = [&](const auto& visit) {
        for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
            const int64_t line = tile / cut.tiles_per_line, first = tile % cut.tiles_per_line * kTileRows;
            visit(line, first, smaller(kTileRows, cut.width - first),
                  input + line * p.input_line + first * p.input_pixel, (tile - tile_begin) * split_bytes);
        }
    };
    if constexpr (E::kSplitBytes > 0) {
        if (split_rows != nullptr) {
            visit_tiles([&](int64_t, int64_t, int64_t count, const T* at, int64_t split) {
                E::split(at, p.input_pixel, count, depth, split_rows + split);
            });
        }
    }
    for (int64_t column = column_begin; column < column_end; column += kPanel) {
        const Weight* panel = static_cast<const Weight*>(p.packed) + column * depth;
        visit_tiles([&](int64_t line, int64_t first, int64_t count, const T* at, int64_t split) {
            if constexpr (E::kSplitBytes > 0) {
                if (split_rows != nullptr) E::tile_of_split(split_rows + split, depth, panel, count, sums);
            }
            if (E::kSplitBytes == 0 || split_rows == nullptr) {
                E::tile({at, p.input_pixel, p.taps_y, p.taps_x, p.tap_line, p.tap_pixel, p.depth}, panel, count,
                        sums);
            }
            if (p.output_is_float) {
                finish_tile<float>(p, cut, line, first, count, column, sums);
            } else {
                finish_tile<T>(p, cut, line, first, count, column, sums);
            }
        });
    }
}

// ---- the transformer's layers ----

int64_t count_rows(const ddetr_attention_inputs& layer) {
    int64_t rows = 0;
    for (int64_t level = 0; level < layer.levels; ++level) {
        rows += layer.level_hw[2 * level] * layer.level_hw[2 * level + 1];
    }
    return rows;
}

int64_t attention_inputs_items(const ddetr_attention_inputs& layer) {
    return ceil_divide(count_rows(layer), kBlockRows);
}

// to = x + position, for rows [begin, end).
void add_positions(const ddetr_attention_inputs& layer, int64_t begin, int64_t end, T* to) {
    const int64_t channels = layer.channels, half = channels / 2;
    int64_t level = 0, start = 0, line_start = 0, column_start = 0, height = 0, width = 0;
    const auto enter = [&] {
        height = layer.level_hw[2 * level];
        width = layer.level_hw[2 * level + 1];
    };
    enter();
    const auto leave = [&] {
        start += height * width;
        line_start += height;
        column_start += width;
        ++level;
    };
    for (; begin >= start + height * width; enter()) leave();
    int64_t y = (begin - start) / width, x = (begin - start) % width;
    const T* from = static_cast<const T*>(layer.x) + begin * channels;
    for (int64_t row = begin; row < end; ++row, ++x, from += channels, to += channels) {
        if (x == width) {
            x = 0;
            ++y;
        }
        if (y == height) {
            leave();
            enter();
            y = 0;
        }
        const float* line = layer.line_positions + (line_start + y) * half;
        const float* column = layer.column_positions + (column_start + x) * half;
        for (int64_t c = 0; c < half; c += kLanes<float>) store_element(load(from + c) + load(line + c), to + c);
        for (int64_t c = 0; c < half; c += kLanes<float>) {
            store_element(load(from + half + c) + load(column + c), to + half + c);
        }
    }
}

void run_attention_inputs(const ddetr_attention_inputs& layer, int64_t item, void* slot) {
    const int64_t begin = item * kBlockRows, count = smaller(kBlockRows, count_rows(layer) - begin);
    const int64_t channels = layer.channels;
    T* queries = static_cast<T*>(slot);
    void* split = queries + kBlockRows * channels;
    add_positions(layer, begin, begin + count, queries);
    multiply_rows(static_cast<const T*>(layer.x) + begin * channels, channels, count,
                  static_cast<const Weight*>(layer.packed_value), channels, channels, split,
                  [&](int64_t column, int64_t row, const float* sums) {
                      T* to = static_cast<T*>(layer.value) + column / layer.value_group * layer.value_output_group +
                              column % layer.value_group + (begin + row) * layer.value_pixel;
                      finish_row(sums, layer.value_bias + column, kNothing, false, to,
                                 smaller(kPanel, channels - column));
                  });
    const int64_t columns = layer.projected_columns;
    multiply_rows(queries, channels, count, static_cast<const Weight*>(layer.packed_projection), channels, columns,
                  split, [&](int64_t column, int64_t row, const float* sums) {
                      finish_row(sums, layer.projection_bias + column, kNothing, false,
                                 layer.projected + (begin + row) * columns + column,
                                 smaller(kPanel, columns - column));
                  });
}

// Layer norm of one row of floats, which may be the output.
template <typename Out>
DDETR_INLINE void normalise_row(const float* row, int64_t channels, float epsilon, const float* weight,
                                const float* bias, Out* to) {
    FloatVec sums = {};
    for (int64_t c = 0; c < channels; c += kLanes<float>) sums += load(row + c);
    const float mean = sum_lanes(sums) / static_cast<float>(channels);
    FloatVec squares = {};
    for (int64_t c = 0; c < channels; c += kLanes<float>) {
        const FloatVec d = load(row + c) - mean;
        squares = multiply_add(d, d, squares);
    }
    const float scale = 1 / __builtin_sqrtf(sum_lanes(squares) / static_cast<float>(channels) + epsilon);
    for (int64_t c = 0; c < channels; c += kLanes<float>) {
        store_element((load(row + c) - mean) * scale * load(weight + c) + load(bias + c), to + c);
    }
}

int64_t feed_forward_items(const ddetr_feed_forward& layer) {
    return ceil_divide(layer.rows, kBlockRows);
}

// X: what the layer reads and writes, elements or floats.
template <typename X>
void run_feed_forward_of(const ddetr_feed_forward& layer, int64_t item, void* slot) {
    const int64_t begin = item * kBlockRows, count = smaller(kBlockRows, layer.rows - begin);
    const int64_t channels = layer.channels, hidden_channels = layer.hidden;
    float* y = static_cast<float*>(slot);
    T* y_elements = reinterpret_cast<T*>(y + kBlockRows * channels);
    T* hidden = y_elements + kBlockRows * channels;
    void* split = hidden + kBlockRows * hidden_channels;
    const X* x = static_cast<const X*>(layer.x) + begin * channels;
    multiply_rows(static_cast<const T*>(layer.sampled) + begin * channels, channels, count,
                  static_cast<const Weight*>(layer.packed_output), channels, channels, split,
                  [&](int64_t column, int64_t row, const float* sums) {
                      finish_row(sums, layer.output_bias + column, x + row * channels + column, false,
                                 y + row * channels + column, kPanel);
                  });
    for (int64_t row = 0; row < count; ++row) {
        float* at = y + row * channels;
        normalise_row(at, channels, layer.epsilon, layer.norm1_weight, layer.norm1_bias, at);
        T* to = y_elements + row * channels;
        for (int64_t c = 0; c < channels; c += kLanes<float>) store_element(load(at + c), to + c);
    }
    multiply_rows(y_elements, channels, count, static_cast<const Weight*>(layer.packed_1), channels, hidden_channels,
                  split, [&](int64_t column, int64_t row, const float* sums) {
                      finish_row(sums, layer.bias_1 + column, kNothing, true, hidden + row * hidden_channels + column,
                                 kPanel);
                  });
    multiply_rows(hidden, hidden_channels, count, static_cast<const Weight*>(layer.packed_2), hidden_channels,
                  channels, split, [&](int64_t column, int64_t row, const float* sums) {
                      float* at = y + row * channels + column;
                      for (int64_t c = 0; c < kPanel; c += kLanes<float>) {
                          store<float>(load(sums + c) + load(layer.bias_2 + column + c) + load(at + c), at + c);
                      }
                  });
    X* output = static_cast<X*>(layer.output) + begin * channels;
    for (int64_t row = 0; row < count; ++row) {
        normalise_row(y + row * channels, channels, layer.epsilon, layer.norm2_weight, layer.norm2_bias,
                      output + row * channels);
    }
}

void run_feed_forward(const ddetr_feed_forward& layer, int64_t item, void* slot) {
    if (layer.is_float) {
        run_feed_forward_of<float>(layer, item, slot);
    } else {
        run_feed_forward_of<T>(layer, item, slot);
    }
}

// ---- group norm: mean and sum of squared deviations of each channel over 64 rows, then of each group over all ----

int64_t group_norm_items(const GroupNormRows& job) {
    return ceil_divide(job.norm.rows, DDETR_STATISTIC_ROWS);
}

void run_group_statistics(const GroupNormRows& job, int64_t item, void*) {
    const int64_t channels = job.norm.channels, begin = item * DDETR_STATISTIC_ROWS;
    const int64_t count = smaller(DDETR_STATISTIC_ROWS, job.norm.rows - begin);
    const float* from = job.norm.input + begin * channels;
    float* means = job.partials + item * channels * 2;
    for (int64_t c = 0; c < channels; c += kLanes<float>) {
        FloatVec sum = {}, squares = {};
        for (int64_t row = 0; row < count; ++row) sum += load(from + row * channels + c);
        const FloatVec mean = sum / static_cast<float>(count);
        for (int64_t row = 0; row < count; ++row) {
            const FloatVec d = load(from + row * channels + c) - mean;
            squares = multiply_add(d, d, squares);
        }
        store<float>(mean, means + c);
        store<float>(squares, means + channels + c);
    }
}

// The slot holds scale and shift of every channel, the same in all.
void run_group_scale(const GroupNormRows& job, int64_t item, void* slot) {
    const int64_t channels = job.norm.channels, begin = item * DDETR_STATISTIC_ROWS;
    const int64_t end = smaller(begin + DDETR_STATISTIC_ROWS, job.norm.rows);
    const float *scale = static_cast<const float*>(slot), *shift = scale + channels;
    T* output = static_cast<T*>(job.norm.output);
    for (int64_t i = begin * channels; i < end * channels; i += channels) {
        for (int64_t c = 0; c < channels; c += kLanes<float>) {
            store_element(multiply_add(load(job.norm.input + i + c), load(scale + c), load(shift + c)),
                          output + i + c);
        }
    }
}

// ---- pixels and pooling, a line an item ----

int64_t pixel_items(const PixelRows& job) {
    return job.height;
}

void run_pixels(const PixelRows& job, int64_t line, void*) {
    T* to = static_cast<T*>(job.output) + line * job.output_line;
    const int64_t plane = job.height * job.width;
    const float* from = job.pixels + line * job.width;
    for (int64_t x = 0; x < job.width; ++x) {
        for (int64_t c = 0; c < 3; ++c) from_real(from[c * plane + x], to + 4 * x + c);
        from_real(0.0f, to + 4 * x + 3);
    }
}

int64_t pool_items(const PoolRows& job) {
    return job.lines;
}

DDETR_INLINE FloatVec larger(FloatVec a, FloatVec b) {
    return a > b ? a : b != b ? b : a != a ? a : b;
}

void run_max_pool(const PoolRows& job, int64_t line, void*) {
    const int64_t channels = job.channels;
    const T* first = static_cast<const T*>(job.input) + (2 * line - 1) * job.input_line - channels;
    T* to = static_cast<T*>(job.output) + line * job.output_line;
    for (int64_t x = 0; x < job.width; ++x, first += 2 * channels, to += channels) {
        for (int64_t c = 0; c < channels; c += kLanes<float>) {
            FloatVec best = {};
            for (int64_t y = 0; y < 3; ++y) {
                const T* at = first + y * job.input_line + c;
                best = larger(best, larger(load(at), larger(load(at + channels), load(at + 2 * channels))));
            }
            store_element(best, to + c);
        }
    }
}

}  // namespace

extern const DenseKernels DDETR_DENSE_KERNELS = {
    {kPanel, Engine::kDepthStep > 1 ? 2 : 1, Engine::kDepthStep, kBlockRows, static_cast<int64_t>(sizeof(T)),
     static_cast<int64_t>(sizeof(Weight))},
    Engine::begin,
    Engine::end,
    {product_items, run_product<>},
    {attention_inputs_items, run_attention_inputs},
    {feed_forward_items, run_feed_forward},
    {group_norm_items, run_group_statistics},
    {group_norm_items, run_group_scale},
    {pixel_items, run_pixels},
    {pool_items, run_max_pool},
};
