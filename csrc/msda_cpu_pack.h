// Between the layout of the caller, (positions, heads, channels), and one head
// after the other, which keeps what a head reads close together.
#ifndef DDETR_MSDA_CPU_PACK_H
#define DDETR_MSDA_CPU_PACK_H

#include "msda_cpu_kernels.h"
#include "msda_cpu_simd.h"

namespace {

// Positions moved at once: all heads of them stay in the cache meanwhile.
constexpr int64_t kPositionsAtOnce = 32;

// visit(m, first, last) over all heads of the group and blocks of positions.
template <typename Visit>
DDETR_INLINE void for_blocks(const CpuProblem& problem, int64_t begin, int64_t end, const Visit& visit) {
    for (int64_t first = begin; first < end; first += kPositionsAtOnce) {
        const int64_t last = first + kPositionsAtOnce < end ? first + kPositionsAtOnce : end;
        for (int64_t m = problem.first_head; m < problem.first_head + problem.heads; ++m) visit(m, first, last);
    }
}

template <int64_t kBytes>
DDETR_INLINE void copy_rows(char* to, int64_t to_stride, const char* from, int64_t from_stride, int64_t rows,
                            int64_t bytes) {
    for (int64_t i = 0; i < rows; ++i) {
        memcpy(to + i * to_stride, from + i * from_stride, kBytes > 0 ? kBytes : bytes);
    }
}

void pack(const CpuProblem& problem, int64_t begin, int64_t end) {
    const int64_t row = problem.row_bytes(), positions = problem.dims.positions;
    for_blocks(problem, begin, end, [&](int64_t m, int64_t first, int64_t last) {
        char* head = problem.packed + (m - problem.first_head) * problem.packed_head_bytes();
        if (last > positions) {
            memset(head + positions * row, 0, row);
            last = positions;
        }
        const char* from = problem.head_value(m) + first * problem.position_bytes;
        if (row == 128) {
            copy_rows<128>(head + first * row, row, from, problem.position_bytes, last - first, row);
        } else if (row == 64) {
            copy_rows<64>(head + first * row, row, from, problem.position_bytes, last - first, row);
        } else {
            copy_rows<0>(head + first * row, row, from, problem.position_bytes, last - first, row);
        }
    });
}

void clear(const CpuProblem& problem, int64_t begin, int64_t end) {
    const int64_t row = problem.dims.channels * problem.real_bytes;
    if (problem.sums == nullptr) {
        const int64_t line = problem.dims.heads * row, first = problem.member * problem.dims.positions + begin;
        memset(static_cast<char*>(problem.grad_value) + first * line, 0, (end - begin) * line);
        return;
    }
    for (int64_t m = 0; m < problem.heads; ++m) {
        memset(problem.sums + m * problem.sums_head_bytes() + begin * row, 0, (end - begin) * row);
    }
}

template <typename T>
void unpack(const CpuProblem& problem, int64_t begin, int64_t end) {
    const int64_t channels = problem.dims.channels, line = problem.dims.heads * channels;
    for_blocks(problem, begin, end, [&](int64_t m, int64_t first, int64_t last) {
        const char* head = problem.sums + (m - problem.first_head) * problem.sums_head_bytes();
        const Real<T>* from = reinterpret_cast<const Real<T>*>(head) + first * channels;
        T* to = static_cast<T*>(problem.grad_value) + (problem.member * problem.dims.positions + first) * line +
                m * channels;
        for (int64_t s = first; s < last; ++s, from += channels, to += line) {
            int64_t c = 0;
            for (; c + kLanes<Real<T>> <= channels; c += kLanes<Real<T>>) store_rounded(load(from + c), to + c);
            for (; c < channels; ++c) from_real(from[c], to + c);
        }
    });
}

}  // namespace

#endif
