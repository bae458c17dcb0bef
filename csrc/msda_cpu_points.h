// Where the points of one (batch, query, head) fall: the byte offsets of their
// four neighbours, and their factors.
//
// A neighbour outside its map, and all four of a point that is not used, are a
// row of zeros with factor 0. The loops that add rows up then need no branch,
// and no number that is not a neighbour is ever touched.
#ifndef DDETR_MSDA_CPU_POINTS_H
#define DDETR_MSDA_CPU_POINTS_H

#include "bilinear.h"
#include "msda_cpu_kernels.h"
#include "msda_cpu_simd.h"

namespace {

// Points handled as one vector (of 16 floats) or two; a row of more points has
// several blocks.
constexpr int64_t kBlock = 16;
// Blocks located before any is added up: several rows, so that one need not
// wait for the other, or 512 points of one.
constexpr int64_t kBlocks = DDETR_FUSED_MAX_SAMPLES / kBlock;
constexpr int64_t kRowsAtOnce = 8;

inline int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

// The levels of the points of a block, distances in bytes. Offset is int32_t
// where all of a head lies within 2 GiB, which makes twice the lanes, else
// int64_t.
template <typename Offset, typename R>
struct PointBlock {
    alignas(64) R width[kBlock];
    alignas(64) R height[kBlock];
    alignas(64) int32_t columns[kBlock];
    alignas(64) int32_t lines[kBlock];
    alignas(64) int32_t level[kBlock];
    alignas(64) Offset line_bytes[kBlock];
    alignas(64) Offset start[kBlock];
};

// The blocks of points [first, first + points) of a row; at most kBlocks of
// them.
template <typename Offset, typename R>
DDETR_NOINLINE void describe_blocks(const CpuProblem& problem, int64_t first, int64_t points,
                                    PointBlock<Offset, R>* blocks) {
    int64_t level = 0, position = 0;
    for (int64_t i = 0; i < points; ++i) {
        for (const int64_t wanted = (first + i) / problem.dims.points; level < wanted; ++level) {
            position += problem.level_hw[2 * level] * problem.level_hw[2 * level + 1];
        }
        PointBlock<Offset, R>& block = blocks[i / kBlock];
        const int64_t lane = i % kBlock;
        block.lines[lane] = static_cast<int32_t>(problem.level_hw[2 * level]);
        block.columns[lane] = static_cast<int32_t>(problem.level_hw[2 * level + 1]);
        block.height[lane] = static_cast<R>(block.lines[lane]);
        block.width[lane] = static_cast<R>(block.columns[lane]);
        block.level[lane] = static_cast<int32_t>(level);
        block.line_bytes[lane] = static_cast<Offset>(block.columns[lane] * problem.stride());
        block.start[lane] = static_cast<Offset>(position * problem.stride());
    }
    for (int64_t i = points; i % kBlock != 0; ++i) blocks[i / kBlock].level[i % kBlock] = 0;
}

template <typename Offset, typename R>
struct Neighbours {
    alignas(64) Offset at[4][kBlock];  // upper left, upper right, lower left, lower right
    alignas(64) R factor[4][kBlock];   // weight times bilinear weight
};

// What the backward pass needs of a block besides.
template <typename R>
struct Slopes {
    alignas(64) R right[kBlock];
    alignas(64) R low[kBlock];
    alignas(64) R is_used[kBlock];  // 1 or 0
};

template <int64_t kCount, typename Offset, typename R, typename Pixel>
DDETR_INLINE void locate_lanes(const PointBlock<Offset, R>& block, const Pixel& pixel, const R* weights,
                               Offset position_bytes, Offset zeros, int64_t points, Neighbours<Offset, R>& near,
                               Slopes<R>* slopes) {
    const int64_t count = kCount > 0 ? kCount : points;
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
        R x, y;
        pixel(i, &x, &y);
        const Cell<R> cell = locate_pixel(x, y, block.height[i], block.width[i]);
        const bool is_left = cell.is_used & (cell.column >= 0);
        const bool is_right = cell.is_used & (cell.column + 1 < block.columns[i]);
        const bool is_high = cell.line >= 0, is_low = cell.line + 1 < block.lines[i];
        const R right = cell.right, left = 1 - right;
        const R upper = weights[i] * (1 - cell.low), lower = weights[i] * cell.low;
        const Offset first = block.start[i] + static_cast<Offset>(cell.line) * block.line_bytes[i] +
                             static_cast<Offset>(cell.column) * position_bytes;
        const Offset third = first + block.line_bytes[i];
        near.at[0][i] = (is_left & is_high) ? first : zeros;
        near.at[1][i] = (is_right & is_high) ? first + position_bytes : zeros;
        near.at[2][i] = (is_left & is_low) ? third : zeros;
        near.at[3][i] = (is_right & is_low) ? third + position_bytes : zeros;
        near.factor[0][i] = (is_left & is_high) ? upper * left : 0;
        near.factor[1][i] = (is_right & is_high) ? upper * right : 0;
        near.factor[2][i] = (is_left & is_low) ? lower * left : 0;
        near.factor[3][i] = (is_right & is_low) ? lower * right : 0;
        if (slopes != nullptr) {
            slopes->right[i] = right;
            slopes->low[i] = cell.low;
            slopes->is_used[i] = cell.is_used ? R(1) : R(0);
        }
    }
}

// Locates the next points, a whole block or what is left of one; pixel(i, &x,
// &y) gives where point i falls.
template <typename Offset, typename R, typename Pixel>
DDETR_INLINE void locate_block(const PointBlock<Offset, R>& block, const Pixel& pixel, const R* weights,
                               Offset position_bytes, Offset zeros, int64_t points, Neighbours<Offset, R>& near,
                               Slopes<R>* slopes) {
    if (points >= kBlock) {
        locate_lanes<kBlock>(block, pixel, weights, position_bytes, zeros, kBlock, near, slopes);
    } else {
        locate_lanes<0>(block, pixel, weights, position_bytes, zeros, points, near, slopes);
    }
}

DDETR_INLINE void prefetch_read(const void* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

DDETR_INLINE void prefetch_write(const void* to, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(to) + i, 1);
}

// Locations and weights as msda takes them; rows are queries of one batch
// member.
template <typename R>
struct GivenPoints {
    const CpuProblem& problem;
    const R* xy;
    const R* weights;
    int64_t samples, row_samples;  // of a row and head, and distance between rows

    GivenPoints(const CpuProblem& problem, int64_t b, int64_t m)
        : problem(problem),
          samples(problem.dims.levels * problem.dims.points),
          row_samples(problem.dims.heads * samples) {
        const int64_t first = (b * problem.dims.queries * problem.dims.heads + m) * samples;
        xy = static_cast<const R*>(problem.sampling_xy) + 2 * first;
        weights = static_cast<const R*>(problem.weights) + first;
    }

    DDETR_INLINE void prefetch(int64_t q) const {
        prefetch_read(xy + 2 * q * row_samples, 2 * samples * sizeof(R));
        prefetch_read(weights + q * row_samples, samples * sizeof(R));
    }

    // Locates points [first, first + points) of query q.
    template <typename Offset>
    DDETR_INLINE void locate(const PointBlock<Offset, R>* blocks, int64_t q, int64_t first, int64_t points,
                             Offset zeros, Neighbours<Offset, R>* near, Slopes<R>* slopes) const {
        const R* row_xy = xy + 2 * (q * row_samples + first);
        const R* row_weights = weights + q * row_samples + first;
        for (int64_t i = 0; i < points; i += kBlock) {
            const PointBlock<Offset, R>& block = blocks[i / kBlock];
            const auto pixel = [&block, block_xy = row_xy + 2 * i](int64_t j, R* x, R* y) {
                *x = rounded_product(block_xy[2 * j], block.width[j]) - R(0.5);
                *y = rounded_product(block_xy[2 * j + 1], block.height[j]) - R(0.5);
            };
            locate_block(block, pixel, row_weights + i, static_cast<Offset>(problem.stride()), zeros, points - i,
                         near[i / kBlock], slopes != nullptr ? slopes + i / kBlock : nullptr);
        }
    }
};

// Offsets and logits as the projections of a query give them, and the reference
// they start from. kBox: references are boxes cxcywh, and offsets count in
// their sizes; else centres, and offsets count in pixels.
template <typename R, bool kBox>
struct ProjectedPoints {
    const CpuProblem& problem;
    const R* offsets;
    const R* logits;
    const R* reference;
    int64_t samples;
    static constexpr int64_t kNumbers = kBox ? 4 : 2;  // of a reference

    ProjectedPoints(const CpuProblem& problem, int64_t b, int64_t m)
        : problem(problem), samples(problem.dims.levels * problem.dims.points) {
        const R* row = static_cast<const R*>(problem.projected) + b * problem.projected_batch;
        offsets = row + 2 * m * samples;
        logits = row + (2 * problem.dims.heads + m) * samples;
        reference =
            static_cast<const R*>(problem.reference) + b * problem.dims.queries * problem.dims.levels * kNumbers;
    }

    DDETR_INLINE void prefetch(int64_t q) const {
        prefetch_read(offsets + q * problem.projected_row, 2 * samples * sizeof(R));
        prefetch_read(logits + q * problem.projected_row, samples * sizeof(R));
    }

    template <typename Offset>
    DDETR_INLINE void locate(const PointBlock<Offset, R>* blocks, int64_t q, int64_t first, int64_t points,
                             Offset zeros, Neighbours<Offset, R>* near, Slopes<R>* slopes) const {
        alignas(64) R weights[DDETR_FUSED_MAX_SAMPLES];
        softmax(logits + q * problem.projected_row, points, weights);
        const R* row_offsets = offsets + q * problem.projected_row + 2 * first;
        for (int64_t i = 0; i < points; i += kBlock) {
            const PointBlock<Offset, R>& block = blocks[i / kBlock];
            alignas(64) R start[4][kBlock];  // x, y, and the size of the box
            levels_numbers(reference + q * problem.dims.levels * kNumbers, block.level, start);
            const auto pixel = [&, block_offsets = row_offsets + 2 * i](int64_t j, R* x, R* y) {
                R by_x = block_offsets[2 * j], by_y = block_offsets[2 * j + 1];
                if (kBox) {
                    by_x = by_x * (start[2][j] * half_point * block.width[j]);
                    by_y = by_y * (start[3][j] * half_point * block.height[j]);
                }
                *x = (start[0][j] * block.width[j] + by_x) - R(0.5);
                *y = (start[1][j] * block.height[j] + by_y) - R(0.5);
            };
            locate_block(block, pixel, weights + i, static_cast<Offset>(problem.stride()), zeros, points - i,
                         near[i / kBlock], slopes);
        }
    }

  private:
    const R half_point = R(0.5) / static_cast<R>(problem.dims.points);

    // The reference of each point of a block, from those of the levels.
    DDETR_INLINE void levels_numbers(const R* of_levels, const int32_t* level, R (*numbers)[kBlock]) const {
#if defined(__AVX512F__)
        if constexpr (sizeof(R) == 4) {
            const int64_t count = problem.dims.levels * kNumbers;
            if (count <= kBlock) {
                const __m512 table = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), of_levels);
                const __m512i first = _mm512_mullo_epi32(_mm512_loadu_si512(level), _mm512_set1_epi32(kNumbers));
                for (int k = 0; k < kNumbers; ++k) {
                    const __m512i index = _mm512_add_epi32(first, _mm512_set1_epi32(k));
                    _mm512_store_ps(numbers[k], _mm512_maskz_permutexvar_ps(0xffff, index, table));
                }
                return;
            }
        }
#endif
        for (int64_t k = 0; k < kNumbers; ++k) {
            for (int64_t j = 0; j < kBlock; ++j) numbers[k][j] = of_levels[level[j] * kNumbers + k];
        }
    }
};

}  // namespace

#endif
