// Forward: for every query and head the neighbours of its points are added up.
#ifndef DDETR_MSDA_CPU_FORWARD_H
#define DDETR_MSDA_CPU_FORWARD_H

#include "msda_cpu_points.h"

namespace {

// The sums of kChannels channels in registers, several of each, so that an
// addition need not wait for the one before.
template <int kChannels, typename T>
struct VectorSums {
    using R = Real<T>;
    static constexpr int kVectors = kChannels / kLanes<R>;
    static constexpr int kSets = kVectors <= 2 ? 4 : (kVectors <= 4 ? 2 : 1);
    Vec<R> sums[kSets][kVectors] = {};

    template <int kNeighbour>
    DDETR_INLINE void add_row(R factor, const char* row) {
        const Vec<R> factors = splat<R>(factor);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            Vec<R>& sum = sums[kNeighbour % kSets][v];
            sum = multiply_add(factors, load(reinterpret_cast<const T*>(row) + v * kLanes<R>), sum);
        }
    }

    DDETR_INLINE void write(T* to, bool past_caches) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
            for (int s = 1; s < kSets; ++s) sums[0][v] += sums[s][v];
            T* const at = to + v * kLanes<R>;
            if constexpr (std::is_same<T, R>::value) {
                if (past_caches) {
                    store_past_caches(sums[0][v], at);
                    continue;
                }
            }
            store_rounded(sums[0][v], at);
        }
    }
};

// bfloat16 in pairs: of each 32-bit word the upper half is the odd channel as a
// float, once the lower half is cleared, and the lower half the even one, once
// it is shifted up.
template <int kChannels>
struct PairSums {
    static constexpr int kVectors = kChannels / kLanes<float> / 2;
    static constexpr int kSets = kVectors == 1 ? 4 : (kVectors == 2 ? 2 : 1);
    FloatVec even[kSets][kVectors] = {}, odd[kSets][kVectors] = {};

    template <int kNeighbour>
    DDETR_INLINE void add_row(float factor, const char* row) {
        const FloatVec factors = splat<float>(factor);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            WordVec words;
            memcpy(&words, row + v * kVectorBytes, sizeof(words));
            FloatVec& evens = even[kNeighbour % kSets][v];
            FloatVec& odds = odd[kNeighbour % kSets][v];
            evens = multiply_add(factors, bits_as<FloatVec>(words << 16), evens);
            odds = multiply_add(factors, bits_as<FloatVec>(words & 0xffff0000u), odds);
        }
    }

    DDETR_INLINE void write(Bfloat16* to, bool past_caches) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
            for (int s = 1; s < kSets; ++s) {
                even[0][v] += even[s][v];
                odd[0][v] += odd[s][v];
            }
            const WordVec words = bfloat16_bits(even[0][v]) | bfloat16_bits(odd[0][v]) << 16;
            char* const at = reinterpret_cast<char*>(to) + v * kVectorBytes;
            if (past_caches) {
                store_past_caches(words, at);
            } else {
                memcpy(at, &words, sizeof(words));
            }
        }
    }
};

// The channels left over, fewer than a vector sum takes.
template <typename T>
struct ScalarSums {
    using R = Real<T>;
    static constexpr int64_t kChannels = 16;
    int64_t channels;
    R sums[kChannels] = {};

    template <int kNeighbour>
    DDETR_INLINE void add_row(R factor, const char* row) {
        const T* numbers = reinterpret_cast<const T*>(row);
        for (int64_t c = 0; c < channels; ++c) sums[c] += factor * to_real(numbers[c]);
    }

    DDETR_INLINE void write(T* to, bool) const {
        for (int64_t c = 0; c < channels; ++c) from_real(sums[c], to + c);
    }
};

template <typename T>
using WideSums = typename std::conditional<std::is_same<T, Bfloat16>::value, PairSums<32>, VectorSums<32, T>>::type;

template <typename Sums, typename Offset, typename R>
DDETR_INLINE void add_points(Sums& sums, const char* value, const Neighbours<Offset, R>* near, int64_t points) {
    for (int64_t i = 0; i < points; i += kBlock) {
        const Neighbours<Offset, R>& block = near[i / kBlock];
        const int64_t count = least(points - i, kBlock);
        for (int64_t j = 0; j < count; ++j) {
            sums.template add_row<0>(block.factor[0][j], value + block.at[0][j]);
            sums.template add_row<1>(block.factor[1][j], value + block.at[1][j]);
            sums.template add_row<2>(block.factor[2][j], value + block.at[2][j]);
            sums.template add_row<3>(block.factor[3][j], value + block.at[3][j]);
        }
    }
}

// One head of some queries, one after the other in memory but for the other
// heads.
template <typename Sums, typename T, typename Offset>
DDETR_NOINLINE void sum_rows(const char* value, const Neighbours<Offset, Real<T>>* near, int64_t row_blocks,
                             int64_t samples, const Sums& empty, T* output, int64_t row_stride, int64_t rows,
                             bool past_caches) {
    for (int64_t i = 0; i < rows; ++i) {
        Sums sums = empty;
        add_points(sums, value, near + i * row_blocks, samples);
        sums.write(output + i * row_stride, past_caches);
    }
}

template <typename T, typename Offset>
void sum_channels(const char* value, const Neighbours<Offset, Real<T>>* near, int64_t row_blocks, int64_t samples,
                  int64_t channels, T* output, int64_t row_stride, int64_t rows, bool past_caches) {
    int64_t channel = 0;
    const auto sum_part = [&](const auto& empty, int64_t count) {
        const char* part = value + channel * static_cast<int64_t>(sizeof(T));
        sum_rows(part, near, row_blocks, samples, empty, output + channel, row_stride, rows, past_caches);
        channel += count;
    };
    while (channels - channel >= 32) sum_part(WideSums<T>{}, 32);
    if (channels - channel >= 16) sum_part(VectorSums<16, T>{}, 16);
    if (channel < channels) sum_part(ScalarSums<T>{channels - channel}, channels - channel);
}

template <typename Offset, typename R, typename Points>
DDETR_NOINLINE void locate_rows(const Points& points, const PointBlock<Offset, R>* blocks, int64_t q, int64_t rows,
                                int64_t row_blocks, int64_t samples, Offset zeros, Neighbours<Offset, R>* near) {
    for (int64_t i = 0; i < rows; ++i) {
        points.locate(blocks, q + i, 0, samples, zeros, near + i * row_blocks, static_cast<Slopes<R>*>(nullptr));
        // Rows are further apart than the processor foresees by itself.
        points.prefetch(q + i + kRowsAtOnce);
    }
}

inline bool is_written_past_caches(const CpuProblem& problem) {
    const int64_t line = 64, rows = problem.dims.batch * problem.dims.queries * problem.dims.heads;
    return problem.row_bytes() % line == 0 && reinterpret_cast<uintptr_t>(problem.output) % line == 0 &&
           rows * problem.row_bytes() >= kLargeOutput;
}

// Lines of the first level whose queries are taken together with those of all levels at the same place.
constexpr int64_t kBandLines = 8;

// visit(first, last) over the queries that come at places [begin, end). Where queries are the positions of the
// levels, as in an encoder, they come in bands of lines: those of all levels that sample the same part of value,
// which then passes through the cache once and not once for every level.
template <typename Visit>
DDETR_INLINE void for_neighbouring_queries(const CpuProblem& problem, int64_t begin, int64_t end,
                                           const Visit& visit) {
    const ddetr_msda_dims& n = problem.dims;
    if (n.queries != n.positions || n.levels < 2) return visit(begin, end);
    const int64_t bands = (problem.level_hw[0] + kBandLines - 1) / kBandLines;
    int64_t place = 0;
    for (int64_t band = 0; band < bands && place < end; ++band) {
        int64_t start = 0;
        for (int64_t level = 0; level < n.levels; ++level) {
            const int64_t height = problem.level_hw[2 * level], width = problem.level_hw[2 * level + 1];
            const int64_t first = start + height * band / bands * width;
            const int64_t count = start + height * (band + 1) / bands * width - first;
            const int64_t from = place < begin ? begin - place : 0, to = least(count, end - place);
            if (from < to) visit(first + from, first + to);
            place += count;
            start += height * width;
        }
    }
}

template <typename T, typename Offset, typename Points>
struct Forward {
    using R = Real<T>;
    static constexpr int64_t kMostSamples = kBlocks * kBlock;
    const CpuProblem& problem;
    const ddetr_msda_dims& n = problem.dims;
    const int64_t samples = n.levels * n.points, row_stride = n.heads * n.channels;
    // Half sums are stored in pieces that fill no line.
    const bool past_caches = !std::is_same<T, Half>::value && is_written_past_caches(problem);
    PointBlock<Offset, R> blocks[kBlocks];
    Neighbours<Offset, R> near[kBlocks];

    explicit Forward(const CpuProblem& problem) : problem(problem) {
        if (samples <= kMostSamples) describe_blocks(problem, 0, samples, blocks);
    }

    // Queries are taken several at a time: first all their points are located.
    // Where value is read in its place, one head takes all queries before the
    // next, so that its coarser levels stay in the cache.
    void run(int64_t begin, int64_t end) {
        const int64_t row_blocks = samples > 0 ? (samples + kBlock - 1) / kBlock : 1;
        const int64_t rows_at_once = row_blocks < kBlocks ? least(kBlocks / row_blocks, kRowsAtOnce) : 1;
        const int64_t heads_at_once = problem.packed != nullptr ? problem.heads : 1;
        const int64_t heads_end = problem.first_head + problem.heads;
        for (int64_t head = problem.first_head; head < heads_end; head += heads_at_once) {
            for_neighbouring_queries(problem, begin, end, [&](int64_t first, int64_t last) {
                for (int64_t q = first; q < last; q += rows_at_once) {
                    for (int64_t m = head; m < head + heads_at_once; ++m) {
                        sum_queries(m, q, least(rows_at_once, last - q), row_blocks);
                    }
                }
            });
        }
        if (past_caches) end_stores_past_caches();
    }

    void sum_queries(int64_t m, int64_t q, int64_t rows, int64_t row_blocks) {
        const Points points(problem, problem.member, m);
        const char* value = problem.head_rows(m);
        const Offset zeros = static_cast<Offset>(reinterpret_cast<intptr_t>(problem.head_zeros(m)) -
                                                 reinterpret_cast<intptr_t>(value));
        T* output = static_cast<T*>(problem.output) + ((problem.member * n.queries + q) * n.heads + m) * n.channels;
        if (samples > kMostSamples) {
            sum_long_row(points, q, value, zeros, output);
            return;
        }
        locate_rows(points, blocks, q, rows, row_blocks, samples, zeros, near);
        for (int64_t i = 0; i < rows && !past_caches; ++i) {
            prefetch_write(output + (i + kRowsAtOnce) * row_stride, problem.row_bytes());
        }
        sum_channels<T>(value, near, row_blocks, samples, n.channels, output, row_stride, rows, past_caches);
    }

    // A row of more points than are located at once.
    DDETR_NOINLINE void sum_long_row(const Points& points, int64_t q, const char* value, Offset zeros, T* output) {
        for (int64_t channel = 0; channel < n.channels; channel += ScalarSums<T>::kChannels) {
            ScalarSums<T> sums{least(n.channels - channel, ScalarSums<T>::kChannels)};
            for (int64_t first = 0; first < samples; first += kMostSamples) {
                const int64_t piece = least(samples - first, kMostSamples);
                describe_blocks(problem, first, piece, blocks);
                points.locate(blocks, q, first, piece, zeros, near, static_cast<Slopes<R>*>(nullptr));
                add_points(sums, value + channel * static_cast<int64_t>(sizeof(T)), near, piece);
            }
            sums.write(output + channel, false);
        }
    }
};

template <typename T>
void forward_queries(const CpuProblem& problem, int64_t begin, int64_t end) {
    if (problem.has_short_offsets()) {
        Forward<T, int32_t, GivenPoints<Real<T>>>(problem).run(begin, end);
    } else {
        Forward<T, int64_t, GivenPoints<Real<T>>>(problem).run(begin, end);
    }
}

template <typename T, bool kBox>
void fused_rows(const CpuProblem& problem, int64_t begin, int64_t end) {
    if (problem.has_short_offsets()) {
        Forward<T, int32_t, ProjectedPoints<Real<T>, kBox>>(problem).run(begin, end);
    } else {
        Forward<T, int64_t, ProjectedPoints<Real<T>, kBox>>(problem).run(begin, end);
    }
}

template <typename T>
void fused_queries(const CpuProblem& problem, int64_t begin, int64_t end) {
    if (problem.has_boxes) {
        fused_rows<T, true>(problem, begin, end);
    } else {
        fused_rows<T, false>(problem, begin, end);
    }
}

}  // namespace

#endif
