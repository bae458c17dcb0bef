// The C ABI of libddetr_cpu: checks, choice of the instruction set, and the one place where threads come in.
#include "bilinear.h"
#include "msda_cpu_kernels.h"

namespace {

const CpuKernels* kernels_of(int32_t isa) {
    switch (isa) {
        case DDETR_ISA_PORTABLE:
            return &ddetr_kernels_portable;
#ifdef DDETR_HAVE_X86_ISAS
        case DDETR_ISA_AVX2:
            return &ddetr_kernels_avx2;
        case DDETR_ISA_AVX512:
            return &ddetr_kernels_avx512;
#endif
        default:
            return nullptr;
    }
}

bool is_available(int32_t isa) {
#ifdef DDETR_HAVE_X86_ISAS
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == DDETR_ISA_AVX2) return avx2;  // every processor with AVX2 has F16C
    if (isa == DDETR_ISA_AVX512) {
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }
#endif
    return isa == DDETR_ISA_PORTABLE;
}

struct Job {
    const CpuProblem* problem;
    CpuRows rows;
};

void run_rows(int64_t begin, int64_t end, void* context) {
    const Job* job = static_cast<const Job*>(context);
    job->rows(*job->problem, begin, end);
}

int32_t run(const CpuProblem& problem, CpuRows rows, int64_t begin, int64_t end, int64_t grain,
            ddetr_parallel_for parallel_for) {
    if (begin == end) return DDETR_OK;
    Job job = {&problem, rows};
    if (parallel_for == nullptr) {
        run_rows(begin, end, &job);
        return DDETR_OK;
    }
    return parallel_for(begin, end, grain, run_rows, &job) == 0 ? DDETR_OK : DDETR_ERROR_PARALLEL;
}

bool is_row_range(int64_t begin, int64_t end, int64_t rows) {
    return 0 <= begin && begin <= end && end <= rows;
}

}  // namespace

int32_t ddetr_cpu_isa(int32_t wanted) {
    if (wanted == DDETR_ISA_BEST) {
        for (int32_t isa = DDETR_ISA_AVX512; isa > DDETR_ISA_PORTABLE; --isa) {
            if (is_available(isa)) return isa;
        }
        return DDETR_ISA_PORTABLE;
    }
    return is_available(wanted) ? wanted : DDETR_ERROR_ISA;
}

int32_t ddetr_msda_forward_cpu(const ddetr_msda_dims* dims, int32_t dtype, const int64_t* level_hw, const void* value,
                               const void* sampling_xy, const void* weights, void* output, int64_t row_begin,
                               int64_t row_end, int32_t isa, ddetr_parallel_for parallel_for) {
    const int32_t status = check_problem(dims, dtype, level_hw);
    if (status != DDETR_OK) return status;
    const int64_t rows = dims->batch * dims->heads * dims->queries;
    if (!is_row_range(row_begin, row_end, rows)) return DDETR_ERROR_ROWS;
    const int64_t samples = dims->levels * dims->points;
    const bool has_samples = rows > 0 && samples > 0, has_output = rows > 0 && dims->channels > 0;
    if (has_output && output == nullptr) return DDETR_ERROR_DIMS;
    if (has_samples && (sampling_xy == nullptr || weights == nullptr)) return DDETR_ERROR_DIMS;
    if (has_samples && has_output && value == nullptr) return DDETR_ERROR_DIMS;
    const CpuKernels* kernels = kernels_of(ddetr_cpu_isa(isa));
    if (kernels == nullptr) return DDETR_ERROR_ISA;
    const CpuProblem problem = {*dims,  level_hw, value,   sampling_xy, weights,
                                output, nullptr,  nullptr, nullptr,     nullptr};
    // A chunk should cost tens of microseconds, some ten times what handing it to a thread does.
    const int64_t work = samples * dims->channels + 1;
    const int64_t grain = work < 65536 ? 65536 / work + 1 : 1;
    return run(problem, kernels->forward[dtype], row_begin, row_end, grain, parallel_for);
}

int32_t ddetr_msda_backward_cpu(const ddetr_msda_dims* dims, int32_t dtype, const int64_t* level_hw,
                                const void* grad_output, const void* value, const void* sampling_xy,
                                const void* weights, void* grad_value, void* grad_sampling_xy, void* grad_weights,
                                int64_t row_begin, int64_t row_end, int32_t isa, ddetr_parallel_for parallel_for) {
    const int32_t status = check_problem(dims, dtype, level_hw);
    if (status != DDETR_OK) return status;
    const int64_t rows = dims->batch * dims->heads;
    if (!is_row_range(row_begin, row_end, rows)) return DDETR_ERROR_ROWS;
    const bool has_samples = rows > 0 && dims->queries > 0 && dims->levels > 0 && dims->points > 0;
    const bool has_value = rows > 0 && dims->positions > 0 && dims->channels > 0;
    if (has_value && (value == nullptr || grad_value == nullptr)) return DDETR_ERROR_DIMS;
    if (has_samples && has_value && grad_output == nullptr) return DDETR_ERROR_DIMS;
    if (has_samples &&
        (sampling_xy == nullptr || weights == nullptr || grad_sampling_xy == nullptr || grad_weights == nullptr)) {
        return DDETR_ERROR_DIMS;
    }
    const CpuKernels* kernels = kernels_of(ddetr_cpu_isa(isa));
    if (kernels == nullptr) return DDETR_ERROR_ISA;
    const CpuProblem problem = {*dims,   level_hw,    value,      sampling_xy,      weights,
                                nullptr, grad_output, grad_value, grad_sampling_xy, grad_weights};
    return run(problem, kernels->backward[dtype], row_begin, row_end, 1, parallel_for);
}
