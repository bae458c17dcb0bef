// libddetr_cuda: its functions, and which kernels they run.
#include "msda_cuda.cuh"

namespace ddetr {
namespace {

// Makes a device current as long as this lives: torch's choice for the thread comes back.
class DeviceGuard {
  public:
    explicit DeviceGuard(int32_t device) {
        status_ = cudaGetDevice(&previous_);
        if (status_ == cudaSuccess && previous_ != device) {
            status_ = cudaSetDevice(device);
            is_changed_ = status_ == cudaSuccess;
        }
    }
    ~DeviceGuard() {
        if (is_changed_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;
    int32_t status() const { return status_; }

  private:
    cudaError_t status_;
    int previous_ = 0;
    bool is_changed_ = false;
};

int32_t check_cuda_problem(const ddetr_msda_dims* dims, int32_t dtype, const int64_t* level_hw) {
    const int32_t status = check_problem(dims, dtype, level_hw);
    if (status != DDETR_OK) return status;
    return dims->levels <= kMaxLevels ? DDETR_OK : DDETR_ERROR_TOO_MANY_LEVELS;
}

Problem problem_of(const ddetr_msda_dims& dims, int32_t dtype, const int64_t* level_hw, void* stream) {
    Problem problem = {dims, {}, level_hw, dtype, static_cast<cudaStream_t>(stream)};
    int64_t start = 0;
    for (int64_t level = 0; level < dims.levels; ++level) {
        problem.levels.height[level] = static_cast<int32_t>(level_hw[2 * level]);
        problem.levels.width[level] = static_cast<int32_t>(level_hw[2 * level + 1]);
        problem.levels.start[level] = start;
        start += level_hw[2 * level] * level_hw[2 * level + 1];
    }
    return problem;
}

int32_t forward(const ddetr_msda_dims* dims, int32_t dtype, const int64_t* level_hw, const ForwardBuffers& at,
                int32_t kernels, int32_t device, void* stream) {
    const int32_t status = check_cuda_problem(dims, dtype, level_hw);
    if (status != DDETR_OK) return status;
    if (dims->batch * dims->queries * dims->heads * dims->channels == 0) return DDETR_OK;
    const DeviceGuard guard(device);
    if (guard.status() != cudaSuccess) return guard.status();
    const Problem problem = problem_of(*dims, dtype, level_hw, stream);
    const int32_t launched = kernels != DDETR_CUDA_PLAIN ? forward_fast(problem, at, kernels, device) : kNotMadeFor;
    return launched != kNotMadeFor ? launched : forward_plain(problem, at);
}

int32_t backward(const Problem& problem, const BackwardBuffers& at, int32_t kernels) {
    const int32_t launched = kernels != DDETR_CUDA_PLAIN ? backward_fast(problem, at) : kNotMadeFor;
    return launched != kNotMadeFor ? launched : backward_plain(problem, at);
}

bool has_samples(const ddetr_msda_dims& dims) {
    return dims.batch * dims.queries * dims.heads * dims.levels * dims.points > 0;
}

}  // namespace
}  // namespace ddetr

using namespace ddetr;

const char* ddetr_cuda_error_string(int32_t code) {
    return cudaGetErrorString(static_cast<cudaError_t>(code));
}

int32_t ddetr_msda_forward_cuda(const ddetr_msda_dims* dims, int32_t dtype, const int64_t* level_hw,
                                const void* value, const int64_t* value_strides, const void* sampling_xy,
                                const void* weights, void* output, int32_t kernels, int32_t device, void* stream) {
    const Strides strides = {value_strides[0], value_strides[1], value_strides[2]};
    const ForwardBuffers at = {value, strides, sampling_xy, weights, nullptr, {0, 0}, nullptr, 0, output};
    return forward(dims, dtype, level_hw, at, kernels, device, stream);
}

int32_t ddetr_msda_fused_cuda(const ddetr_msda_dims* dims, int32_t dtype, const int64_t* level_hw, const void* value,
                              const int64_t* value_strides, const void* projected, const int64_t* projected_strides,
                              const void* reference, int32_t reference_numbers, void* output, int32_t kernels,
                              int32_t device, void* stream) {
    if (reference_numbers != 2 && reference_numbers != 4) return DDETR_ERROR_DIMS;
    const Strides strides = {value_strides[0], value_strides[1], value_strides[2]};
    const ForwardBuffers at = {value,     strides,           nullptr,
                               nullptr,   projected,         {projected_strides[0], projected_strides[1]},
                               reference, reference_numbers, output};
    return forward(dims, dtype, level_hw, at, kernels, device, stream);
}

int32_t ddetr_msda_backward_cuda(const ddetr_msda_dims* dims, int32_t dtype, const int64_t* level_hw,
                                 const void* grad_output, const void* value, const void* sampling_xy,
                                 const void* weights, void* grad_value, void* grad_sampling_xy, void* grad_weights,
                                 int32_t kernels, int32_t device, void* stream) {
    const int32_t status = check_cuda_problem(dims, dtype, level_hw);
    if (status != DDETR_OK) return status;
    if (!has_samples(*dims)) return DDETR_OK;
    const DeviceGuard guard(device);
    if (guard.status() != cudaSuccess) return guard.status();
    BackwardBuffers at = {};
    at.grad_output = grad_output, at.value = value, at.sampling_xy = sampling_xy, at.weights = weights;
    at.grad_value = grad_value, at.grad_sampling_xy = grad_sampling_xy, at.grad_weights = grad_weights;
    return backward(problem_of(*dims, dtype, level_hw, stream), at, kernels);
}

int32_t ddetr_msda_fused_backward_cuda(const ddetr_msda_dims* dims, int32_t dtype, const int64_t* level_hw,
                                       const void* grad_output, const void* value, const void* projected,
                                       const int64_t* projected_strides, const void* reference,
                                       int32_t reference_numbers, void* grad_value, void* grad_projected,
                                       int32_t kernels, int32_t device, void* stream) {
    if (reference_numbers != 2 && reference_numbers != 4) return DDETR_ERROR_DIMS;
    const int32_t status = check_cuda_problem(dims, dtype, level_hw);
    if (status != DDETR_OK) return status;
    if (!has_samples(*dims)) return DDETR_OK;
    const DeviceGuard guard(device);
    if (guard.status() != cudaSuccess) return guard.status();
    BackwardBuffers at = {};
    at.grad_output = grad_output, at.value = value, at.projected = projected, at.reference = reference;
    at.projected_strides[0] = projected_strides[0], at.projected_strides[1] = projected_strides[1];
    at.reference_numbers = reference_numbers, at.grad_value = grad_value, at.grad_projected = grad_projected;
    return backward(problem_of(*dims, dtype, level_hw, stream), at, kernels);
}

int64_t ddetr_msda_backward_sorted_bytes(const ddetr_msda_dims* dims, int32_t dtype, const int64_t* level_hw) {
    const int32_t status = check_cuda_problem(dims, dtype, level_hw);
    if (status != DDETR_OK) return status;
    return has_samples(*dims) ? sorted_bytes(*dims, dtype, level_hw) : 0;
}

int32_t ddetr_msda_backward_sorted_cuda(const ddetr_msda_dims* dims, int32_t dtype, const int64_t* level_hw,
                                        const void* grad_output, const void* value, const void* sampling_xy,
                                        const void* weights, void* grad_value, void* grad_sampling_xy,
                                        void* grad_weights, void* workspace, int64_t workspace_bytes, int32_t kernels,
                                        int32_t device, void* stream) {
    const int64_t needed = ddetr_msda_backward_sorted_bytes(dims, dtype, level_hw);
    if (needed < 0) return static_cast<int32_t>(needed);
    if (workspace_bytes < needed) return DDETR_ERROR_SCRATCH;
    const DeviceGuard guard(device);
    if (guard.status() != cudaSuccess) return guard.status();
    const Problem problem = problem_of(*dims, dtype, level_hw, stream);
    const int64_t numbers = dims->batch * dims->positions * dims->heads * dims->channels;
    if (!has_samples(*dims)) {
        const int64_t size = dtype == DDETR_DTYPE_F64 ? 8 : dtype == DDETR_DTYPE_F32 ? 4 : 2;
        return numbers == 0 ? DDETR_OK
                            : cudaMemsetAsync(grad_value, 0, static_cast<size_t>(numbers * size), problem.stream);
    }
    BackwardBuffers at = {};
    at.grad_output = grad_output, at.value = value, at.sampling_xy = sampling_xy, at.weights = weights;
    at.grad_sampling_xy = grad_sampling_xy, at.grad_weights = grad_weights;
    const int32_t launched = backward(problem, at, kernels);
    if (launched != DDETR_OK || numbers == 0) return launched;
    return grad_value_sorted(problem, at, grad_value, workspace);
}
