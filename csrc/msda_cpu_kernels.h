// Between the C ABI (msda_cpu.cpp) and the kernels, which are compiled once per
// instruction set (msda_cpu_kernels.cpp).
#ifndef DDETR_MSDA_CPU_KERNELS_H
#define DDETR_MSDA_CPU_KERNELS_H

#include "ddetr.h"

// One batch member and a group of its heads, which is what the kernels are
// called for. Strides in bytes.
struct CpuProblem {
    ddetr_msda_dims dims;
    const int64_t* level_hw;
    int64_t element_bytes,
        real_bytes;  // of the storage type and of the compute type

    const char* value;  // of the whole batch, as the rest
    int64_t batch_bytes, position_bytes, head_bytes;
    const void* sampling_xy;
    const void* weights;
    const void* projected;  // instead of the two: offsets and logits, strides in elements
    int64_t projected_batch, projected_row;
    const void* reference;
    bool has_boxes;  // references are cxcywh
    void* output;

    const void* grad_output;  // backward, as the rest
    void* grad_value;         // storage type
    void* grad_sampling_xy;
    void* grad_weights;
    int64_t bands;  // parts of a head's positions, each summed by a task of its own

    int64_t member, first_head,
        heads;          // heads [first_head, first_head + heads) of this member
    const char* zeros;  // a row of them
    // The heads' positions without gaps, each head followed by a row of zeros;
    // null where value is read where it lies.
    char* packed;
    // Sums of the gradient of value, laid out alike; null where they are made in
    // grad_value.
    char* sums;

    int64_t row_bytes() const { return dims.channels * element_bytes; }
    int64_t packed_head_bytes() const { return (dims.positions + 1) * row_bytes(); }
    int64_t sums_head_bytes() const { return dims.positions * dims.channels * real_bytes; }
    const char* head_value(int64_t m) const { return value + member * batch_bytes + m * head_bytes; }

    // Where the kernels find the channels of head m at its first position, and
    // zeros.
    const char* head_rows(int64_t m) const {
        return packed == nullptr ? head_value(m) : packed + (m - first_head) * packed_head_bytes();
    }
    const char* head_zeros(int64_t m) const {
        return packed == nullptr ? zeros : head_rows(m) + dims.positions * row_bytes();
    }
    // Distance between positions there.
    int64_t stride() const { return packed == nullptr ? position_bytes : row_bytes(); }
    // No offset within a head, a line beyond its end included, reaches 2 GiB.
    bool has_short_offsets() const { return packed != nullptr && 2 * packed_head_bytes() < INT32_MAX; }
};

// Computes [begin, end) of what is counted.
using CpuTask = void (*)(const CpuProblem& problem, int64_t begin, int64_t end);

struct CpuKernels {
    CpuTask pack;         // positions, and the row of zeros after them
    CpuTask forward[4];   // queries; by DDETR_DTYPE_*, as the following
    CpuTask fused[4];     // queries
    CpuTask clear;        // positions of the sums
    CpuTask backward[4];  // bands of heads
    CpuTask unpack[4];    // positions of the sums
};

extern const CpuKernels ddetr_kernels_portable;
#ifdef DDETR_HAVE_X86_ISAS
extern const CpuKernels ddetr_kernels_avx2;
extern const CpuKernels ddetr_kernels_avx512;
#endif

#endif
