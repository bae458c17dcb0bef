// Backward: one head after the other, its sums of the gradient of value in the
// cache.
//
// A task owns a band of a head's positions and goes through all queries in
// order, whatever the number of bands: every element is summed by one thread in
// one order, without atomics.
#ifndef DDETR_MSDA_CPU_BACKWARD_H
#define DDETR_MSDA_CPU_BACKWARD_H

#include "msda_cpu_points.h"

namespace {

// kChannels channels of a query's gradient in registers.
template <int kChannels, typename T>
struct VectorGradient {
    using R = Real<T>;
    static constexpr int kVectors = kChannels / kLanes<R>;
    Vec<R> grad[kVectors];

    DDETR_INLINE VectorGradient(const T* from, int64_t) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) grad[v] = load(from + v * kLanes<R>);
    }

    // <gradient, neighbour> of the four neighbours of a point.
    DDETR_INLINE void dots(const T* const (&neighbours)[4], R (&dots)[4]) const {
        Vec<R> products[4];
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) {
            products[n] = grad[0] * load(neighbours[n]);
#pragma GCC unroll 8
            for (int v = 1; v < kVectors; ++v) {
                products[n] = multiply_add(grad[v], load(neighbours[n] + v * kLanes<R>), products[n]);
            }
        }
        sum_lanes_of_four(products, dots);
    }

    DDETR_INLINE void add_to(R* sums, R factor) const {
        const Vec<R> factors = splat<R>(factor);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            store<R>(multiply_add(factors, grad[v], load(sums + v * kLanes<R>)), sums + v * kLanes<R>);
        }
    }
};

// The channels left over, fewer than a vector takes.
template <typename T>
struct ScalarGradient {
    using R = Real<T>;
    int64_t channels;
    R grad[16];

    DDETR_INLINE ScalarGradient(const T* from, int64_t channels) : channels(channels) {
        for (int64_t c = 0; c < channels; ++c) grad[c] = to_real(from[c]);
    }

    DDETR_INLINE void dots(const T* const (&neighbours)[4], R (&dots)[4]) const {
        for (int n = 0; n < 4; ++n) {
            dots[n] = 0;
            for (int64_t c = 0; c < channels; ++c) dots[n] += grad[c] * to_real(neighbours[n][c]);
        }
    }

    DDETR_INLINE void add_to(R* sums, R factor) const {
        for (int64_t c = 0; c < channels; ++c) sums[c] += factor * grad[c];
    }
};

// First position of a band. Every level gets as many points as another, so the
// bands share levels out, not positions.
inline int64_t band_start(const CpuProblem& problem, int64_t band) {
    const int64_t levels = problem.dims.levels, bands = problem.bands;
    const int64_t level = levels * band / bands, rest = levels * band % bands;
    int64_t position = 0;
    for (int64_t i = 0; i < level; ++i) position += problem.level_hw[2 * i] * problem.level_hw[2 * i + 1];
    if (level < levels) position += problem.level_hw[2 * level] * rest / bands * problem.level_hw[2 * level + 1];
    return position;
}

template <typename T, typename Offset>
struct Backward {
    using R = Real<T>;
    static constexpr Offset kRealBytes = sizeof(R), kElementBytes = sizeof(T);
    const CpuProblem& problem;
    const ddetr_msda_dims& n = problem.dims;
    const int64_t samples = n.levels * n.points;
    PointBlock<Offset, R> blocks[kBlocks];
    Neighbours<Offset, R> near[kBlocks];
    Slopes<R> slopes[kBlocks];
    alignas(64) R dots[kBlocks * kBlock][4];

    // of the head and band at work
    const char* value;
    char* sums;
    Offset zeros, band_begin, band_end;

    explicit Backward(const CpuProblem& problem) : problem(problem) {
        if (samples <= kBlocks * kBlock) describe_blocks(problem, 0, samples, blocks);
    }

    void run(int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t m = problem.first_head + task / problem.bands, band = task % problem.bands;
            value = problem.head_rows(m);
            zeros = static_cast<Offset>(reinterpret_cast<intptr_t>(problem.head_zeros(m)) -
                                        reinterpret_cast<intptr_t>(value));
            const int64_t member_bytes = n.positions * n.heads * n.channels * kRealBytes;
            sums = problem.sums != nullptr ? problem.sums + (m - problem.first_head) * problem.sums_head_bytes()
                                           : static_cast<char*>(problem.grad_value) + problem.member * member_bytes +
                                                 m * n.channels * kRealBytes;
            band_begin = static_cast<Offset>(band_start(problem, band) * problem.stride());
            band_end = static_cast<Offset>(band_start(problem, band + 1) * problem.stride());
            const GivenPoints<R> points(problem, problem.member, m);
            for (int64_t q = 0; q < n.queries; ++q) {
                for (int64_t first = 0; first < samples; first += kBlocks * kBlock) {
                    piece_gradients(points, m, q, first, least(samples - first, kBlocks * kBlock));
                }
            }
        }
    }

    // Points [first, first + count) of one query and head.
    void piece_gradients(const GivenPoints<R>& points, int64_t m, int64_t q, int64_t first, int64_t count) {
        const int64_t query_head = (problem.member * n.queries + q) * n.heads + m;
        if (samples > kBlocks * kBlock) describe_blocks(problem, first, count, blocks);
        points.prefetch(q + 4);
        locate(points, q, first, count);
        const T* grad = static_cast<const T*>(problem.grad_output) + query_head * n.channels;
        prefetch_read(grad + 4 * n.heads * n.channels, problem.row_bytes());
        R* grad_weights = static_cast<R*>(problem.grad_weights) + query_head * samples + first;
        R* grad_xy = static_cast<R*>(problem.grad_sampling_xy) + 2 * (query_head * samples + first);
        prefetch_write(grad_weights + 4 * n.heads * samples, count * kRealBytes);
        prefetch_write(grad_xy + 8 * n.heads * samples, 2 * count * kRealBytes);
        if (n.channels == 0) memset(dots, 0, sizeof(dots));
        if (problem.bands == 1) {
            add_parts<false>(grad, count);
        } else {
            add_parts<true>(grad, count);
        }
        const R* weights = points.weights + q * points.row_samples + first;
        for (int64_t i = 0; i < count; i += kBlock) {
            if (count - i >= kBlock && problem.bands == 1) {
                point_gradients<kBlock>(i / kBlock, weights + i, grad_weights + i, grad_xy + 2 * i, kBlock);
            } else {
                point_gradients<0>(i / kBlock, weights + i, grad_weights + i, grad_xy + 2 * i,
                                   least(count - i, kBlock));
            }
        }
    }

    DDETR_NOINLINE void locate(const GivenPoints<R>& points, int64_t q, int64_t first, int64_t count) {
        points.locate(blocks, q, first, count, zeros, near, slopes);
    }

    // Whether this task, of all bands, computes the gradients of a point: where
    // its first neighbour in the map lies.
    DDETR_INLINE bool owns(const Neighbours<Offset, R>& block, int64_t j) const {
        Offset at = 0;
        for (int k = 3; k >= 0; --k) at = block.at[k][j] != zeros ? block.at[k][j] : at;
        return at >= band_begin && at < band_end;
    }

    // The dots of all points with a part of the channels, or what it adds to
    // them; and the part of the sums.
    template <typename Gradient, bool kHasBands>
    DDETR_NOINLINE void add_part(const T* grad, int64_t channel, int64_t channels, int64_t count) {
        const Gradient gradient(grad + channel, channels);
        const char* part_value = value + channel * kElementBytes;
        char* part_sums = sums + channel * kRealBytes;
        const Offset no_neighbour = zeros, first_byte = band_begin, last_byte = band_end;
        R unused[32];  // sums of what is not a neighbour
        for (int64_t i = 0; i < count; ++i) {
            const Neighbours<Offset, R>& block = near[i / kBlock];
            const int64_t j = i % kBlock;
            if (!kHasBands || owns(block, j)) {
                const T* const rows[4] = {
                    reinterpret_cast<const T*>(part_value + block.at[0][j]),
                    reinterpret_cast<const T*>(part_value + block.at[1][j]),
                    reinterpret_cast<const T*>(part_value + block.at[2][j]),
                    reinterpret_cast<const T*>(part_value + block.at[3][j]),
                };
                if (channel == 0) {
                    gradient.dots(rows, dots[i]);
                } else {
                    R more[4];
                    gradient.dots(rows, more);
                    for (int k = 0; k < 4; ++k) dots[i][k] += more[k];
                }
            }
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) {
                const Offset at = block.at[k][j];
                if (kHasBands && (at < first_byte || at >= last_byte)) continue;
                R* to = reinterpret_cast<R*>(part_sums + at * (kRealBytes / kElementBytes));
                gradient.add_to(at != no_neighbour ? to : unused, block.factor[k][j]);
            }
        }
    }

    template <bool kHasBands>
    void add_parts(const T* grad, int64_t count) {
        int64_t channel = 0;
        for (; n.channels - channel >= 32; channel += 32) {
            add_part<VectorGradient<32, T>, kHasBands>(grad, channel, 32, count);
        }
        if (n.channels - channel >= 16) {
            add_part<VectorGradient<16, T>, kHasBands>(grad, channel, 16, count);
            channel += 16;
        }
        if (channel < n.channels) add_part<ScalarGradient<T>, kHasBands>(grad, channel, n.channels - channel, count);
    }

    template <int64_t kCount>
    DDETR_NOINLINE void point_gradients(int64_t b, const R* weights, R* grad_weights, R* grad_xy, int64_t points) {
        const Neighbours<Offset, R>& block = near[b];
        // <gradient, zeros> is NaN where the gradient is; one array for each
        // neighbour, so that all points become one vector
        alignas(64) R of[4][kBlock], by_x[kBlock], by_y[kBlock];
        const R(*block_dots)[4] = dots + b * kBlock;
        for (int64_t j = 0; j < kBlock; ++j) {
            of[0][j] = block_dots[j][0];
            of[1][j] = block_dots[j][1];
            of[2][j] = block_dots[j][2];
            of[3][j] = block_dots[j][3];
        }
        for (int64_t j = 0; j < kBlock; ++j) {
            const R right = slopes[b].right[j], left = 1 - right, low = slopes[b].low[j], high = 1 - low;
            const R d0 = block.at[0][j] != zeros ? of[0][j] : R(0), d1 = block.at[1][j] != zeros ? of[1][j] : R(0);
            const R d2 = block.at[2][j] != zeros ? of[2][j] : R(0), d3 = block.at[3][j] != zeros ? of[3][j] : R(0);
            by_x[j] = blocks[b].width[j] * (high * (d1 - d0) + low * (d3 - d2));
            by_y[j] = blocks[b].height[j] * (left * (d2 - d0) + right * (d3 - d1));
            of[0][j] = high * (left * d0 + right * d1) + low * (left * d2 + right * d3);
        }
        const int64_t count = kCount > 0 ? kCount : points;
#pragma GCC ivdep
        for (int64_t j = 0; j < count; ++j) {
            if (kCount == 0 && problem.bands > 1 && !owns(block, j)) continue;
            const bool is_used = slopes[b].is_used[j] != 0;  // the weight of an unused point may be NaN
            const R weight = weights[j];
            grad_weights[j] = is_used ? of[0][j] : R(0);
            grad_xy[2 * j] = is_used ? weight * by_x[j] : R(0);
            grad_xy[2 * j + 1] = is_used ? weight * by_y[j] : R(0);
        }
    }
};

template <typename T>
void backward_bands(const CpuProblem& problem, int64_t begin, int64_t end) {
    if (problem.has_short_offsets()) {
        Backward<T, int32_t>(problem).run(begin, end);
    } else {
        Backward<T, int64_t>(problem).run(begin, end);
    }
}

}  // namespace

#endif
