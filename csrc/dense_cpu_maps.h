// What goes over maps besides products: group norm, pixels, pooling.
#ifndef DDETR_DENSE_CPU_MAPS_H
#define DDETR_DENSE_CPU_MAPS_H

#include "dense_cpu_rows.h"

namespace {

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

#endif
