// The C ABI of libddetr_cpu: checks, choice of the instruction set, and the one
// place where threads come in.
#include <string.h>

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
    CpuTask task;
};

void run_task(int64_t begin, int64_t end, void* context) {
    const Job* job = static_cast<const Job*>(context);
    job->task(*job->problem, begin, end);
}

// item_work: sums of products, or bytes moved, per item. A chunk should cost
// tens of microseconds, some ten times what handing it to a thread does.
int32_t run(const CpuProblem& problem, CpuTask task, int64_t items, int64_t item_work,
            ddetr_parallel_for parallel_for) {
    if (items == 0) return DDETR_OK;
    Job job = {&problem, task};
    if (parallel_for == nullptr) {
        run_task(0, items, &job);
        return DDETR_OK;
    }
    const int64_t grain = item_work < 65536 ? 65536 / (item_work + 1) + 1 : 1;
    return parallel_for(0, items, grain, run_task, &job) == 0 ? DDETR_OK : DDETR_ERROR_PARALLEL;
}

CpuProblem make_problem(const ddetr_msda_dims& dims, int32_t dtype, const int64_t* level_hw, const void* value,
                        const int64_t* value_strides) {
    CpuProblem problem = {};
    problem.dims = dims;
    problem.level_hw = level_hw;
    problem.element_bytes = dtype == DDETR_DTYPE_F64 ? 8 : (dtype == DDETR_DTYPE_F32 ? 4 : 2);
    problem.real_bytes = dtype == DDETR_DTYPE_F64 ? 8 : 4;
    problem.value = static_cast<const char*>(value);
    problem.batch_bytes = value_strides[0] * problem.element_bytes;
    problem.position_bytes = value_strides[1] * problem.element_bytes;
    problem.head_bytes = value_strides[2] * problem.element_bytes;
    return problem;
}

// Whether a problem reads anything of value, and writes any output.
bool has_samples(const ddetr_msda_dims& n) {
    return n.batch > 0 && n.heads > 0 && n.queries > 0 && n.levels > 0 && n.points > 0;
}
bool has_output(const ddetr_msda_dims& n) {
    return n.batch > 0 && n.heads > 0 && n.queries > 0 && n.channels > 0;
}

int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

// Runs forward or fused; the scratch holds as many packed heads as fit, or a
// row of zeros.
int32_t run_forward(CpuProblem& problem, const CpuKernels& kernels, CpuTask task, void* scratch,
                    int64_t scratch_bytes, ddetr_parallel_for parallel_for) {
    const ddetr_msda_dims& n = problem.dims;
    if (!has_output(n)) return DDETR_OK;
    if (scratch == nullptr || scratch_bytes < problem.row_bytes()) return DDETR_ERROR_SCRATCH;
    const int64_t room = least(scratch_bytes / problem.packed_head_bytes(), n.heads);
    problem.heads = room > 0 ? room : n.heads;
    if (room > 0) {
        problem.packed = static_cast<char*>(scratch);
    } else {
        memset(scratch, 0, problem.row_bytes());
        problem.zeros = static_cast<const char*>(scratch);
    }
    const int64_t head_work = (n.levels * n.points + 1) * n.channels;
    for (problem.member = 0; problem.member < n.batch; ++problem.member) {
        for (problem.first_head = 0; problem.first_head < n.heads; problem.first_head += problem.heads) {
            if (room > 0) problem.heads = least(room, n.heads - problem.first_head);
            int32_t status = DDETR_OK;
            if (room > 0) {
                status =
                    run(problem, kernels.pack, n.positions + 1, problem.heads * problem.row_bytes(), parallel_for);
            }
            if (status == DDETR_OK) status = run(problem, task, n.queries, problem.heads * head_work, parallel_for);
            if (status != DDETR_OK) return status;
        }
    }
    return DDETR_OK;
}

// The gradients of one group of heads of one member.
int32_t run_backward_group(CpuProblem& problem, const CpuKernels& kernels, int32_t dtype,
                           ddetr_parallel_for parallel_for) {
    const ddetr_msda_dims& n = problem.dims;
    const bool is_packed = problem.sums != nullptr;
    const int64_t head_work = n.queries * (n.levels * n.points + 1) * n.channels;
    const int64_t row = problem.heads * n.channels * problem.real_bytes, positions = row > 0 ? n.positions : 0;
    int32_t status = DDETR_OK;
    if (is_packed) status = run(problem, kernels.pack, n.positions + 1, row, parallel_for);
    if (status == DDETR_OK) status = run(problem, kernels.clear, positions, row, parallel_for);
    if (status == DDETR_OK) {
        status = run(problem, kernels.backward[dtype], problem.heads * problem.bands, head_work, parallel_for);
    }
    if (status == DDETR_OK && is_packed) status = run(problem, kernels.unpack[dtype], positions, row, parallel_for);
    return status;
}

int32_t run_backward(CpuProblem& problem, const CpuKernels& kernels, int32_t dtype, void* scratch,
                     int64_t scratch_bytes, ddetr_parallel_for parallel_for) {
    const ddetr_msda_dims& n = problem.dims;
    const int64_t alignment = 64, head_bytes = problem.packed_head_bytes() + problem.sums_head_bytes();
    if (n.batch == 0 || n.heads == 0) return DDETR_OK;
    if (scratch_bytes < problem.row_bytes() || (scratch == nullptr && n.channels > 0)) return DDETR_ERROR_SCRATCH;
    const int64_t room = n.channels > 0 ? least((scratch_bytes - alignment) / head_bytes, n.heads) : 0;
    problem.heads = room > 0 ? room : n.heads;
    if (room > 0) {
        const int64_t packed_bytes = room * problem.packed_head_bytes();
        problem.packed = static_cast<char*>(scratch);
        problem.sums = problem.packed + (packed_bytes + alignment - 1) / alignment * alignment;
    } else {
        // the sums are made where the gradient is wanted, which must then look like value
        const bool is_alike = n.channels == 0 || (problem.element_bytes == problem.real_bytes &&
                                                  problem.head_bytes == problem.row_bytes() &&
                                                  problem.position_bytes == n.heads * problem.row_bytes());
        if (!is_alike) return DDETR_ERROR_SCRATCH;
        if (n.channels > 0) {
            memset(scratch, 0, problem.row_bytes());
        } else {
            problem.bands = 1;  // nothing tells positions apart
        }
        problem.zeros = static_cast<const char*>(scratch);
    }
    for (problem.member = 0; problem.member < n.batch; ++problem.member) {
        for (problem.first_head = 0; problem.first_head < n.heads; problem.first_head += problem.heads) {
            if (room > 0) problem.heads = least(room, n.heads - problem.first_head);
            const int32_t status = run_backward_group(problem, kernels, dtype, parallel_for);
            if (status != DDETR_OK) return status;
        }
    }
    return DDETR_OK;
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
                               const int64_t* value_strides, const void* sampling_xy, const void* weights,
                               void* output, void* scratch, int64_t scratch_bytes, int32_t isa,
                               ddetr_parallel_for parallel_for) {
    const int32_t status = check_problem(dims, dtype, level_hw);
    if (status != DDETR_OK) return status;
    if (value_strides == nullptr || (has_output(*dims) && output == nullptr)) return DDETR_ERROR_DIMS;
    if (has_samples(*dims) && (sampling_xy == nullptr || weights == nullptr)) return DDETR_ERROR_DIMS;
    if (has_samples(*dims) && has_output(*dims) && value == nullptr) return DDETR_ERROR_DIMS;
    const CpuKernels* kernels = kernels_of(ddetr_cpu_isa(isa));
    if (kernels == nullptr) return DDETR_ERROR_ISA;
    CpuProblem problem = make_problem(*dims, dtype, level_hw, value, value_strides);
    problem.sampling_xy = sampling_xy;
    problem.weights = weights;
    problem.output = output;
    return run_forward(problem, *kernels, kernels->forward[dtype], scratch, scratch_bytes, parallel_for);
}

int32_t ddetr_msda_fused_cpu(const ddetr_msda_dims* dims, int32_t dtype, const int64_t* level_hw, const void* value,
                             const int64_t* value_strides, const void* projected, const int64_t* projected_strides,
                             const void* reference, int32_t reference_numbers, void* output, void* scratch,
                             int64_t scratch_bytes, int32_t isa, ddetr_parallel_for parallel_for) {
    const int32_t status = check_problem(dims, dtype, level_hw);
    if (status != DDETR_OK) return status;
    if (dims->points > 0 && dims->levels > DDETR_FUSED_MAX_SAMPLES / dims->points) return DDETR_ERROR_DIMS;
    if (reference_numbers != 2 && reference_numbers != 4) return DDETR_ERROR_DIMS;
    if (value_strides == nullptr || projected_strides == nullptr) return DDETR_ERROR_DIMS;
    if (has_output(*dims) && output == nullptr) return DDETR_ERROR_DIMS;
    if (has_samples(*dims) && (projected == nullptr || reference == nullptr)) return DDETR_ERROR_DIMS;
    if (has_samples(*dims) && has_output(*dims) && value == nullptr) return DDETR_ERROR_DIMS;
    const CpuKernels* kernels = kernels_of(ddetr_cpu_isa(isa));
    if (kernels == nullptr) return DDETR_ERROR_ISA;
    CpuProblem problem = make_problem(*dims, dtype, level_hw, value, value_strides);
    problem.projected = projected;
    problem.projected_batch = projected_strides[0];
    problem.projected_row = projected_strides[1];
    problem.reference = reference;
    problem.has_boxes = reference_numbers == 4;
    problem.output = output;
    return run_forward(problem, *kernels, kernels->fused[dtype], scratch, scratch_bytes, parallel_for);
}

int32_t ddetr_msda_backward_cpu(const ddetr_msda_dims* dims, int32_t dtype, const int64_t* level_hw,
                                const void* grad_output, const void* value, const int64_t* value_strides,
                                const void* sampling_xy, const void* weights, void* grad_value,
                                void* grad_sampling_xy, void* grad_weights, void* scratch, int64_t scratch_bytes,
                                int64_t bands, int32_t isa, ddetr_parallel_for parallel_for) {
    const int32_t status = check_problem(dims, dtype, level_hw);
    if (status != DDETR_OK) return status;
    const bool has_value = dims->batch > 0 && dims->heads > 0 && dims->positions > 0 && dims->channels > 0;
    if (value_strides == nullptr || bands < 1 || bands > DDETR_MAX_BANDS) return DDETR_ERROR_DIMS;
    if (has_value && (value == nullptr || grad_value == nullptr)) return DDETR_ERROR_DIMS;
    if (has_samples(*dims) && has_value && grad_output == nullptr) return DDETR_ERROR_DIMS;
    if (has_samples(*dims) &&
        (sampling_xy == nullptr || weights == nullptr || grad_sampling_xy == nullptr || grad_weights == nullptr)) {
        return DDETR_ERROR_DIMS;
    }
    const CpuKernels* kernels = kernels_of(ddetr_cpu_isa(isa));
    if (kernels == nullptr) return DDETR_ERROR_ISA;
    CpuProblem problem = make_problem(*dims, dtype, level_hw, value, value_strides);
    problem.sampling_xy = sampling_xy;
    problem.weights = weights;
    problem.grad_output = grad_output;
    problem.grad_value = grad_value;
    problem.grad_sampling_xy = grad_sampling_xy;
    problem.grad_weights = grad_weights;
    problem.bands = bands;
    return run_backward(problem, *kernels, dtype, scratch, scratch_bytes, parallel_for);
}
