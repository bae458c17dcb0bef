// The arithmetic of libddetr_cpu, compiled once per instruction set with DDETR_KERNELS naming the copy.
//
// A row is one (batch, head, query) forward and one (batch, head) backward. Heads are the outer loop: what a head
// reads of value then stays in the cache. Forward, all points of a row are located first (a loop that vectorises over
// points), then their neighbours are added up (a loop that vectorises over channels).
#include "msda_cpu_kernels.h"

#include <type_traits>

#include "bilinear.h"
#include "msda_cpu_simd.h"

namespace {

// Points handled at once; 8 levels of 8 points. More are taken in blocks.
constexpr int64_t kBlock = 64;

enum PointState : int32_t { kUnused = 0, kInside = 1, kAtBorder = 2 };

// The level of each point of a block.
template <typename R>
struct PointLevels {
    R height[kBlock], width[kBlock];
    int32_t lines[kBlock], columns[kBlock];
    int64_t start[kBlock];

    DDETR_NOINLINE PointLevels(const CpuProblem& problem, int64_t first_point, int64_t points) {
        int64_t level = 0, position = 0;
        for (int64_t i = 0; i < points; ++i) {
            for (const int64_t wanted = (first_point + i) / problem.dims.points; level < wanted; ++level) {
                position += problem.level_hw[2 * level] * problem.level_hw[2 * level + 1];
            }
            lines[i] = static_cast<int32_t>(problem.level_hw[2 * level]);
            columns[i] = static_cast<int32_t>(problem.level_hw[2 * level + 1]);
            height[i] = static_cast<R>(lines[i]);
            width[i] = static_cast<R>(columns[i]);
            start[i] = position;
        }
    }
};

// Where the points of one query and head fall.
template <typename R>
struct Located {
    R right[kBlock], low[kBlock];
    int32_t column[kBlock], line[kBlock], state[kBlock];
    int64_t position[kBlock];  // of the upper left neighbour, inside the map or not

    DDETR_NOINLINE void locate_points(const PointLevels<R>& levels, const R* __restrict xy, int64_t points) {
        for (int64_t i = 0; i < points; ++i) {
            const Cell<R> cell = locate(xy[2 * i], xy[2 * i + 1], levels.height[i], levels.width[i]);
            const int32_t columns = levels.columns[i], lines = levels.lines[i];
            const bool is_inside =
                (cell.column >= 0) & (cell.line >= 0) & (cell.column + 1 < columns) & (cell.line + 1 < lines);
            state[i] = cell.is_used ? (is_inside ? kInside : kAtBorder) : kUnused;
            column[i] = cell.column;
            line[i] = cell.line;
            right[i] = cell.right;
            low[i] = cell.low;
            position[i] = levels.start[i] + static_cast<int64_t>(cell.line) * columns + cell.column;
        }
    }

    // Whether neighbour n of point i lies in the map; 0 upper left, 1 upper right, 2 lower left, 3 lower right.
    bool has_neighbour(const PointLevels<R>& levels, int64_t i, int n) const {
        const int32_t c = column[i] + (n & 1), r = line[i] + (n >> 1);
        return (c >= 0) & (r >= 0) & (c < levels.columns[i]) & (r < levels.lines[i]);
    }
};

// Weight times bilinear weight of the four neighbours.
template <typename R>
struct Factors {
    R of[4][kBlock];

    DDETR_NOINLINE void combine(const Located<R>& at, const R* __restrict weights, int64_t points) {
        for (int64_t i = 0; i < points; ++i) {
            const R upper = weights[i] * (1 - at.low[i]), lower = weights[i] * at.low[i];
            of[0][i] = upper * (1 - at.right[i]);
            of[1][i] = upper * at.right[i];
            of[2][i] = lower * (1 - at.right[i]);
            of[3][i] = lower * at.right[i];
        }
    }
};

// Distance of the four neighbours from the first, in elements.
template <typename R>
DDETR_INLINE void neighbour_offsets(const PointLevels<R>& levels, int64_t i, int64_t stride, int64_t offset[4]) {
    offset[0] = 0;
    offset[1] = stride;
    offset[2] = levels.columns[i] * stride;
    offset[3] = offset[2] + stride;
}

// ---- forward ----

// The sums of kChannels channels of one row, in registers while a block of points is added.
template <int kChannels, typename T>
struct VectorSums {
    using R = Real<T>;
    static constexpr int kVectors = kChannels / kLanes<R>;
    Vec<R> sums[kVectors] = {};

    DDETR_INLINE void add_row(R factor, const T* row) {
        const Vec<R> factors = splat<R>(factor);
        for (int v = 0; v < kVectors; ++v) {
            sums[v] = multiply_add(factors, load(row + v * kLanes<R>), sums[v]);
        }
    }

    DDETR_INLINE void write(T* to) const {
        R channels[kChannels];
        for (int v = 0; v < kVectors; ++v) store(sums[v], channels + v * kLanes<R>);
        for (int c = 0; c < kChannels; ++c) from_real(channels[c], to + c);
    }
};

// The same for the channels left over, fewer than a vector sum takes.
template <int kLimit, typename T>
struct ScalarSums {
    using R = Real<T>;
    int64_t channels;
    R sums[kLimit] = {};

    DDETR_INLINE void add_row(R factor, const T* row) {
        for (int64_t c = 0; c < channels; ++c) sums[c] += factor * to_real(row[c]);
    }

    DDETR_INLINE void write(T* to) const {
        for (int64_t c = 0; c < channels; ++c) from_real(sums[c], to + c);
    }
};

template <typename Sums, typename T, typename R>
DDETR_INLINE void add_samples(Sums& sums, const T* value, int64_t stride, const PointLevels<R>& levels,
                              const Located<R>& at, const Factors<R>& factors, int64_t points) {
    for (int64_t i = 0; i < points; ++i) {
        if (at.state[i] == kUnused) continue;
        const int64_t first = at.position[i] * stride;
        int64_t offset[4];
        neighbour_offsets(levels, i, stride, offset);
        if (at.state[i] == kInside) {
            sums.add_row(factors.of[0][i], value + first);
            sums.add_row(factors.of[1][i], value + (first + offset[1]));
            sums.add_row(factors.of[2][i], value + (first + offset[2]));
            sums.add_row(factors.of[3][i], value + (first + offset[3]));
        } else {
            for (int n = 0; n < 4; ++n) {
                if (at.has_neighbour(levels, i, n)) sums.add_row(factors.of[n][i], value + (first + offset[n]));
            }
        }
    }
}

template <typename T>
void forward_rows(const CpuProblem& problem, int64_t begin, int64_t end) {
    using R = Real<T>;
    const ddetr_msda_dims& n = problem.dims;
    const int64_t samples = n.levels * n.points, stride = n.heads * n.channels;
    const int64_t first_block = samples < kBlock ? samples : kBlock;
    PointLevels<R> levels(problem, 0, first_block);
    Located<R> at;
    Factors<R> factors;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t q = row % n.queries, m = row / n.queries % n.heads, b = row / n.queries / n.heads;
        const int64_t query_head = (b * n.queries + q) * n.heads + m;
        const R* xy = static_cast<const R*>(problem.sampling_xy) + query_head * samples * 2;
        const R* weights = static_cast<const R*>(problem.weights) + query_head * samples;
        const T* value = static_cast<const T*>(problem.value) + (b * n.positions * n.heads + m) * n.channels;
        T* output = static_cast<T*>(problem.output) + query_head * n.channels;
        if (samples <= kBlock) {
            at.locate_points(levels, xy, samples);
            factors.combine(at, weights, samples);
        }
        const auto sum_channels = [&](auto sums, int64_t channel) {
            if (samples <= kBlock) {
                add_samples(sums, value + channel, stride, levels, at, factors, samples);
            } else {
                for (int64_t i = 0; i < samples; i += kBlock) {
                    const int64_t points = samples - i < kBlock ? samples - i : kBlock;
                    const PointLevels<R> block_levels(problem, i, points);
                    at.locate_points(block_levels, xy + 2 * i, points);
                    factors.combine(at, weights + i, points);
                    add_samples(sums, value + channel, stride, block_levels, at, factors, points);
                }
            }
            sums.write(output + channel);
        };
        int64_t channel = 0;
        for (; n.channels - channel >= 32; channel += 32) sum_channels(VectorSums<32, T>{}, channel);
        for (; n.channels - channel >= 16; channel += 16) sum_channels(VectorSums<16, T>{}, channel);
        if (channel < n.channels) sum_channels(ScalarSums<16, T>{n.channels - channel}, channel);
    }
}

// ---- backward ----

// <grad, row> over the channels of one neighbour, and grad_row += factor * grad.
template <int kChannels, typename T, typename R>
DDETR_INLINE R neighbour_gradient(const T* __restrict grad, const T* __restrict row, R* __restrict grad_row, R factor,
                                  int64_t channels) {
    const int64_t count = kChannels > 0 ? kChannels : channels;
    const Vec<R> factors = splat<R>(factor);
    Vec<R> dots = {};
    int64_t c = 0;
    for (; c + kLanes<R> <= count; c += kLanes<R>) {
        const Vec<R> g = load(grad + c);
        dots = multiply_add(g, load(row + c), dots);
        store(multiply_add(factors, g, load(grad_row + c)), grad_row + c);
    }
    R dot = sum_lanes(dots);
    for (; c < count; ++c) {
        dot += to_real(grad[c]) * to_real(row[c]);
        grad_row[c] += factor * to_real(grad[c]);
    }
    return dot;
}

// All points of one query and head; kChannels > 0 where the number of channels is known to the compiler.
template <int kChannels, typename T, typename R>
DDETR_INLINE void query_gradients(const T* grad, const T* value, R* grad_value, int64_t channels, int64_t stride,
                                  const PointLevels<R>& levels, const Located<R>& at, const R* weights, R* grad_xy,
                                  R* grad_weights, int64_t points) {
    Factors<R> factors;
    factors.combine(at, weights, points);
    R dots[4][kBlock];
    for (int64_t i = 0; i < points; ++i) {
        if (at.state[i] == kUnused) {
            for (int n = 0; n < 4; ++n) dots[n][i] = 0;
            continue;
        }
        const int64_t first = at.position[i] * stride;
        int64_t offset[4];
        neighbour_offsets(levels, i, stride, offset);
        for (int n = 0; n < 4; ++n) {
            const bool is_in_map = at.state[i] == kInside || at.has_neighbour(levels, i, n);
            const int64_t at_neighbour = first + offset[n];
            dots[n][i] = is_in_map
                             ? neighbour_gradient<kChannels>(grad, value + at_neighbour, grad_value + at_neighbour,
                                                             factors.of[n][i], channels)
                             : 0;
        }
    }
    for (int64_t i = 0; i < points; ++i) {
        const R right = at.right[i], left = 1 - right, low = at.low[i], high = 1 - low;
        const R by_x = high * (dots[1][i] - dots[0][i]) + low * (dots[3][i] - dots[2][i]);
        const R by_y = left * (dots[2][i] - dots[0][i]) + right * (dots[3][i] - dots[1][i]);
        const R sample =
            high * (left * dots[0][i] + right * dots[1][i]) + low * (left * dots[2][i] + right * dots[3][i]);
        const bool is_used = at.state[i] != kUnused;  // the weight of an unused point may be NaN
        grad_weights[i] = is_used ? sample : 0;
        grad_xy[2 * i] = is_used ? weights[i] * levels.width[i] * by_x : 0;
        grad_xy[2 * i + 1] = is_used ? weights[i] * levels.height[i] * by_y : 0;
    }
}

template <int kChannels, typename T>
void backward_head(const CpuProblem& problem, int64_t b, int64_t m, const PointLevels<Real<T>>& first_levels) {
    using R = Real<T>;
    const ddetr_msda_dims& n = problem.dims;
    const int64_t samples = n.levels * n.points, stride = n.heads * n.channels;
    const int64_t head = (b * n.positions * n.heads + m) * n.channels;
    const T* value = static_cast<const T*>(problem.value) + head;
    R* grad_value = static_cast<R*>(problem.grad_value) + head;
    for (int64_t s = 0; s < n.positions; ++s) {
        for (int64_t c = 0; c < n.channels; ++c) grad_value[s * stride + c] = 0;
    }
    Located<R> at;
    for (int64_t q = 0; q < n.queries; ++q) {
        const int64_t query_head = (b * n.queries + q) * n.heads + m;
        const T* grad = static_cast<const T*>(problem.grad_output) + query_head * n.channels;
        const R* xy = static_cast<const R*>(problem.sampling_xy) + query_head * samples * 2;
        const R* weights = static_cast<const R*>(problem.weights) + query_head * samples;
        R* grad_xy = static_cast<R*>(problem.grad_sampling_xy) + query_head * samples * 2;
        R* grad_weights = static_cast<R*>(problem.grad_weights) + query_head * samples;
        const auto block_gradients = [&](const PointLevels<R>& levels, int64_t i, int64_t points) {
            at.locate_points(levels, xy + 2 * i, points);
            query_gradients<kChannels>(grad, value, grad_value, n.channels, stride, levels, at, weights + i,
                                       grad_xy + 2 * i, grad_weights + i, points);
        };
        if (samples <= kBlock) {
            block_gradients(first_levels, 0, samples);
        } else {
            for (int64_t i = 0; i < samples; i += kBlock) {
                const int64_t points = samples - i < kBlock ? samples - i : kBlock;
                block_gradients(PointLevels<R>(problem, i, points), i, points);
            }
        }
    }
}

template <typename T>
void backward_rows(const CpuProblem& problem, int64_t begin, int64_t end) {
    const ddetr_msda_dims& n = problem.dims;
    const int64_t samples = n.levels * n.points;
    const PointLevels<Real<T>> levels(problem, 0, samples < kBlock ? samples : kBlock);
    for (int64_t row = begin; row < end; ++row) {
        const int64_t m = row % n.heads, b = row / n.heads;
        switch (n.channels) {
            case 16:
                backward_head<16, T>(problem, b, m, levels);
                break;
            case 32:
                backward_head<32, T>(problem, b, m, levels);
                break;
            default:
                backward_head<0, T>(problem, b, m, levels);
        }
    }
}

}  // namespace

extern const CpuKernels DDETR_KERNELS = {
    {forward_rows<float>, forward_rows<double>, forward_rows<Half>, forward_rows<Bfloat16>},
    {backward_rows<float>, backward_rows<double>, backward_rows<Half>, backward_rows<Bfloat16>},
};
