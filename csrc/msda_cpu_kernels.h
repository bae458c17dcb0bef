// Between the C ABI (msda_cpu.cpp) and the kernels, which are compiled once per instruction set
// (msda_cpu_kernels.cpp).
#ifndef DDETR_MSDA_CPU_KERNELS_H
#define DDETR_MSDA_CPU_KERNELS_H

#include "ddetr.h"

struct CpuProblem {
    ddetr_msda_dims dims;
    const int64_t* level_hw;
    const void* value;
    const void* sampling_xy;
    const void* weights;
    void* output;             // forward
    const void* grad_output;  // backward, as the following
    void* grad_value;
    void* grad_sampling_xy;
    void* grad_weights;
};

// Computes rows [begin, end), as ddetr.h counts them.
using CpuRows = void (*)(const CpuProblem& problem, int64_t begin, int64_t end);

struct CpuKernels {
    CpuRows forward[4];  // by DDETR_DTYPE_*
    CpuRows backward[4];
};

extern const CpuKernels ddetr_kernels_portable;
#ifdef DDETR_HAVE_X86_ISAS
extern const CpuKernels ddetr_kernels_avx2;
extern const CpuKernels ddetr_kernels_avx512;
#endif

#endif
