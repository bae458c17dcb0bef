// libddetr_cuda: the op on NVIDIA GPUs. Plain kernels, right before fast.
//
// Forward, a thread owns one output element; neighbouring threads read neighbouring channels. Backward, a warp owns
// one (batch, query, head): its lanes share the channels, and sums over channels are reduced within the warp. Indices
// are 64-bit throughout, loops stride by the grid: no size overflows an index or a launch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "bilinear.h"

namespace {

// Sizes of the levels travel as an argument of the kernel, of which there is limited room.
constexpr int kMaxLevels = DDETR_CUDA_MAX_LEVELS;
constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Levels {
    int32_t height[kMaxLevels], width[kMaxLevels];
    int64_t start[kMaxLevels];
};

template <typename T>
struct ComputeOf {
    using Real = float;
};
template <>
struct ComputeOf<double> {
    using Real = double;
};

__device__ __forceinline__ float to_real(float x) {
    return x;
}
__device__ __forceinline__ double to_real(double x) {
    return x;
}
__device__ __forceinline__ float to_real(__half x) {
    return __half2float(x);
}
__device__ __forceinline__ float to_real(__nv_bfloat16 x) {
    return __bfloat162float(x);
}

__device__ __forceinline__ void from_real(float x, float* to) {
    *to = x;
}
__device__ __forceinline__ void from_real(double x, double* to) {
    *to = x;
}
__device__ __forceinline__ void from_real(float x, __half* to) {
    *to = __float2half_rn(x);
}
__device__ __forceinline__ void from_real(float x, __nv_bfloat16* to) {
    *to = __float2bfloat16_rn(x);
}

// Neighbour n of a cell: 0 upper left, 1 upper right, 2 lower left, 3 lower right.
template <typename Real>
struct Neighbour {
    bool is_in_map;
    int64_t position;
    Real factor;  // bilinear

    __device__ __forceinline__ Neighbour(const Cell<Real>& cell, int n, int32_t height, int32_t width,
                                         int64_t start) {
        const int32_t column = cell.column + (n & 1), line = cell.line + (n >> 1);
        is_in_map = column >= 0 && line >= 0 && column < width && line < height;
        position = start + static_cast<int64_t>(line) * width + column;
        factor = ((n & 1) ? cell.right : 1 - cell.right) * ((n >> 1) ? cell.low : 1 - cell.low);
    }
};

template <typename Real>
__device__ __forceinline__ Cell<Real> locate_point(const Real* xy, int64_t point, int32_t height, int32_t width) {
    return locate(xy[2 * point], xy[2 * point + 1], static_cast<Real>(height), static_cast<Real>(width));
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(ddetr_msda_dims dims, Levels levels, const T* __restrict__ value,
                   const typename ComputeOf<T>::Real* __restrict__ sampling_xy,
                   const typename ComputeOf<T>::Real* __restrict__ weights, T* __restrict__ output) {
    using Real = typename ComputeOf<T>::Real;
    const int64_t elements = dims.batch * dims.queries * dims.heads * dims.channels;
    const int64_t samples = dims.levels * dims.points, stride = dims.heads * dims.channels;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    for (int64_t element = first; element < elements; element += static_cast<int64_t>(gridDim.x) * kThreads) {
        const int64_t channel = element % dims.channels, row = element / dims.channels;  // row (b, q, m)
        const int64_t m = row % dims.heads, b = row / dims.heads / dims.queries;
        const T* head = value + (b * dims.positions * dims.heads + m) * dims.channels + channel;
        const Real* xy = sampling_xy + row * samples * 2;
        const Real* weight = weights + row * samples;
        Real sum = 0;
        for (int64_t level = 0; level < dims.levels; ++level) {
            const int32_t height = levels.height[level], width = levels.width[level];
            for (int64_t i = level * dims.points; i < (level + 1) * dims.points; ++i) {
                const Cell<Real> cell = locate_point(xy, i, height, width);
                if (!cell.is_used) continue;
                for (int n = 0; n < 4; ++n) {
                    const Neighbour<Real> at(cell, n, height, width, levels.start[level]);
                    if (at.is_in_map) sum += weight[i] * at.factor * to_real(head[at.position * stride]);
                }
            }
        }
        from_real(sum, output + element);
    }
}

template <typename Real>
__device__ __forceinline__ Real sum_warp(Real x) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
    return x;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(ddetr_msda_dims dims, Levels levels, const T* __restrict__ grad_output,
                    const T* __restrict__ value, const typename ComputeOf<T>::Real* __restrict__ sampling_xy,
                    const typename ComputeOf<T>::Real* __restrict__ weights,
                    typename ComputeOf<T>::Real* __restrict__ grad_value,
                    typename ComputeOf<T>::Real* __restrict__ grad_sampling_xy,
                    typename ComputeOf<T>::Real* __restrict__ grad_weights) {
    using Real = typename ComputeOf<T>::Real;
    const int64_t rows = dims.batch * dims.queries * dims.heads;
    const int64_t samples = dims.levels * dims.points, stride = dims.heads * dims.channels;
    const int lane = threadIdx.x % kWarp;
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
    const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
    // All lanes of a warp take every branch on row, level and point together, as the shuffles require.
    for (int64_t row = first; row < rows; row += step) {
        const int64_t m = row % dims.heads, b = row / dims.heads / dims.queries;
        const int64_t head = (b * dims.positions * dims.heads + m) * dims.channels;
        const T* grad = grad_output + row * dims.channels;
        const Real* xy = sampling_xy + row * samples * 2;
        for (int64_t level = 0; level < dims.levels; ++level) {
            const int32_t height = levels.height[level], width = levels.width[level];
            for (int64_t i = level * dims.points; i < (level + 1) * dims.points; ++i) {
                const Cell<Real> cell = locate_point(xy, i, height, width);
                const Real weight = weights[row * samples + i];
                Real by_weight = 0, by_x = 0, by_y = 0;
                if (cell.is_used) {
                    Real dots[4] = {0, 0, 0, 0};
                    for (int n = 0; n < 4; ++n) {
                        const Neighbour<Real> at(cell, n, height, width, levels.start[level]);
                        if (!at.is_in_map) continue;
                        const int64_t neighbour = head + at.position * stride;
                        for (int64_t c = lane; c < dims.channels; c += kWarp) {
                            const Real g = to_real(grad[c]);
                            dots[n] += g * to_real(value[neighbour + c]);
                            atomicAdd(grad_value + neighbour + c, weight * at.factor * g);
                        }
                        dots[n] = sum_warp(dots[n]);
                    }
                    const Real right = cell.right, left = 1 - right, low = cell.low, high = 1 - low;
                    by_weight = high * (left * dots[0] + right * dots[1]) + low * (left * dots[2] + right * dots[3]);
                    by_x = weight * width * (high * (dots[1] - dots[0]) + low * (dots[3] - dots[2]));
                    by_y = weight * height * (left * (dots[2] - dots[0]) + right * (dots[3] - dots[1]));
                }
                if (lane == 0) {
                    const int64_t sample = row * samples + i;
                    grad_weights[sample] = by_weight;
                    grad_sampling_xy[2 * sample] = by_x;
                    grad_sampling_xy[2 * sample + 1] = by_y;
                }
            }
        }
    }
}

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

unsigned blocks_for(int64_t items, int64_t items_per_block) {
    const int64_t blocks = (items - 1) / items_per_block + 1, most = 1 << 30;  // the kernels stride over the rest
    return static_cast<unsigned>(blocks < most ? blocks : most);
}

Levels levels_of(const ddetr_msda_dims& dims, const int64_t* level_hw) {
    Levels levels = {};
    int64_t start = 0;
    for (int64_t level = 0; level < dims.levels; ++level) {
        levels.height[level] = static_cast<int32_t>(level_hw[2 * level]);
        levels.width[level] = static_cast<int32_t>(level_hw[2 * level + 1]);
        levels.start[level] = start;
        start += level_hw[2 * level] * level_hw[2 * level + 1];
    }
    return levels;
}

struct Buffers {
    const void *grad_output, *value, *sampling_xy, *weights;
    void *output, *grad_value, *grad_sampling_xy, *grad_weights;
};

template <typename T>
int32_t launch_forward(const ddetr_msda_dims& dims, const Levels& levels, const Buffers& at, cudaStream_t stream) {
    using Real = typename ComputeOf<T>::Real;
    const int64_t elements = dims.batch * dims.queries * dims.heads * dims.channels;
    forward_kernel<T><<<blocks_for(elements, kThreads), kThreads, 0, stream>>>(
        dims, levels, static_cast<const T*>(at.value), static_cast<const Real*>(at.sampling_xy),
        static_cast<const Real*>(at.weights), static_cast<T*>(at.output));
    return cudaGetLastError();
}

template <typename T>
int32_t launch_backward(const ddetr_msda_dims& dims, const Levels& levels, const Buffers& at, cudaStream_t stream) {
    using Real = typename ComputeOf<T>::Real;
    const int64_t rows = dims.batch * dims.queries * dims.heads;
    backward_kernel<T><<<blocks_for(rows, kThreads / kWarp), kThreads, 0, stream>>>(
        dims, levels, static_cast<const T*>(at.grad_output), static_cast<const T*>(at.value),
        static_cast<const Real*>(at.sampling_xy), static_cast<const Real*>(at.weights),
        static_cast<Real*>(at.grad_value), static_cast<Real*>(at.grad_sampling_xy),
        static_cast<Real*>(at.grad_weights));
    return cudaGetLastError();
}

int32_t check_cuda_problem(const ddetr_msda_dims* dims, int32_t dtype, const int64_t* level_hw) {
    const int32_t status = check_problem(dims, dtype, level_hw);
    if (status != DDETR_OK) return status;
    return dims->levels <= kMaxLevels ? DDETR_OK : DDETR_ERROR_TOO_MANY_LEVELS;
}

}  // namespace

const char* ddetr_cuda_error_string(int32_t code) {
    return cudaGetErrorString(static_cast<cudaError_t>(code));
}

int32_t ddetr_msda_forward_cuda(const ddetr_msda_dims* dims, int32_t dtype, const int64_t* level_hw,
                                const void* value, const void* sampling_xy, const void* weights, void* output,
                                int32_t device, void* stream) {
    const int32_t problem = check_cuda_problem(dims, dtype, level_hw);
    if (problem != DDETR_OK) return problem;
    if (dims->batch * dims->queries * dims->heads * dims->channels == 0) return DDETR_OK;
    const DeviceGuard guard(device);
    if (guard.status() != cudaSuccess) return guard.status();
    const Levels levels = levels_of(*dims, level_hw);
    const Buffers at = {nullptr, value, sampling_xy, weights, output, nullptr, nullptr, nullptr};
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    switch (dtype) {
        case DDETR_DTYPE_F64:
            return launch_forward<double>(*dims, levels, at, queue);
        case DDETR_DTYPE_F16:
            return launch_forward<__half>(*dims, levels, at, queue);
        case DDETR_DTYPE_BF16:
            return launch_forward<__nv_bfloat16>(*dims, levels, at, queue);
        default:
            return launch_forward<float>(*dims, levels, at, queue);
    }
}

int32_t ddetr_msda_backward_cuda(const ddetr_msda_dims* dims, int32_t dtype, const int64_t* level_hw,
                                 const void* grad_output, const void* value, const void* sampling_xy,
                                 const void* weights, void* grad_value, void* grad_sampling_xy, void* grad_weights,
                                 int32_t device, void* stream) {
    const int32_t problem = check_cuda_problem(dims, dtype, level_hw);
    if (problem != DDETR_OK) return problem;
    if (dims->batch * dims->queries * dims->heads * dims->levels * dims->points == 0) return DDETR_OK;
    const DeviceGuard guard(device);
    if (guard.status() != cudaSuccess) return guard.status();
    const Levels levels = levels_of(*dims, level_hw);
    const Buffers at = {grad_output, value,      sampling_xy,      weights,
                        nullptr,     grad_value, grad_sampling_xy, grad_weights};
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    switch (dtype) {
        case DDETR_DTYPE_F64:
            return launch_backward<double>(*dims, levels, at, queue);
        case DDETR_DTYPE_F16:
            return launch_backward<__half>(*dims, levels, at, queue);
        case DDETR_DTYPE_BF16:
            return launch_backward<__nv_bfloat16>(*dims, levels, at, queue);
        default:
            return launch_backward<float>(*dims, levels, at, queue);
    }
}
