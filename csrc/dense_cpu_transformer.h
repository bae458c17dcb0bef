// The transformer's layers: a block of rows goes through all of a layer before the next.
#ifndef DDETR_DENSE_CPU_TRANSFORMER_H
#define DDETR_DENSE_CPU_TRANSFORMER_H

#include "dense_cpu_rows.h"

namespace {

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
    const bool is_value_large =
        is_written_past_caches(static_cast<const T*>(layer.value), count_rows(layer) * channels,
                               {layer.value_output_group, layer.value_pixel});
    multiply_rows(static_cast<const T*>(layer.x) + begin * channels, channels, count,
                  static_cast<const Weight*>(layer.packed_value), channels, channels, split,
                  [&](int64_t column, int64_t row, const float* sums) {
                      T* to = static_cast<T*>(layer.value) + column / layer.value_group * layer.value_output_group +
                              column % layer.value_group + (begin + row) * layer.value_pixel;
                      finish_row(sums, layer.value_bias + column, kNothing, false, to,
                                 smaller(kPanel, channels - column), is_value_large);
                  });
    const int64_t columns = layer.projected_columns;
    const bool is_projected_large = is_written_past_caches(layer.projected, count_rows(layer) * columns, {columns});
    multiply_rows(queries, channels, count, static_cast<const Weight*>(layer.packed_projection), channels, columns,
                  split, [&](int64_t column, int64_t row, const float* sums) {
                      finish_row(sums, layer.projection_bias + column, kNothing, false,
                                 layer.projected + (begin + row) * columns + column,
                                 smaller(kPanel, columns - column), is_projected_large);
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

}  // namespace

#endif
