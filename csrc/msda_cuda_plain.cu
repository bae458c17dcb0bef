// Plain kernels, right before fast, for every type and size.
//
// Forward, a thread owns one output element; neighbouring threads read neighbouring channels. Backward, a warp owns
// one (batch, query, head): its lanes share the channels, and sums over channels are reduced within the warp. Indices
// are 64-bit throughout, loops stride by the grid: no size overflows an index or a launch.
#include "msda_cuda.cuh"

namespace ddetr {
namespace {

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

template <typename T, typename Source>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(ddetr_msda_dims dims, Levels levels, Strides strides, const T* __restrict__ value, Source source,
                   T* __restrict__ output) {
    using Real = typename ComputeOf<T>::Real;
    const int64_t elements = dims.batch * dims.queries * dims.heads * dims.channels;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    for (int64_t element = first; element < elements; element += static_cast<int64_t>(gridDim.x) * kThreads) {
        const int64_t channel = element % dims.channels, line = element / dims.channels;  // line (b, q, m)
        const int64_t m = line % dims.heads, q = line / dims.heads % dims.queries,
                      b = line / dims.heads / dims.queries;
        const T* head = value + b * strides.batch + m * strides.head + channel;
        const auto row = source.template row<1>(dims, b, q, m, 0);
        Real sum = 0;
        for (int64_t level = 0; level < dims.levels; ++level) {
            const int32_t height = levels.height[level], width = levels.width[level];
            for (int64_t i = level * dims.points; i < (level + 1) * dims.points; ++i) {
                const Cell<Real> cell = source.cell(row, i, level, height, width, dims.points);
                if (!cell.is_used) continue;
                const Real weight = source.weight(row, i);
                for (int n = 0; n < 4; ++n) {
                    const Neighbour<Real> at(cell, n, height, width, levels.start[level]);
                    if (at.is_in_map) sum += weight * at.factor * to_real(head[at.position * strides.position]);
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

template <typename T, typename Source, typename Gradients>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(ddetr_msda_dims dims, Levels levels, const T* __restrict__ grad_output,
                    const T* __restrict__ value, Source source, typename ComputeOf<T>::Real* __restrict__ grad_value,
                    Gradients gradients) {
    using Real = typename ComputeOf<T>::Real;
    const int64_t rows = dims.batch * dims.queries * dims.heads;
    const int64_t stride = dims.heads * dims.channels;
    const int lane = threadIdx.x % kWarp;
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
    const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
    // All lanes of a warp take every branch on row, level and point together, as the shuffles require.
    for (int64_t row = first; row < rows; row += step) {
        const int64_t m = row % dims.heads, q = row / dims.heads % dims.queries, b = row / dims.heads / dims.queries;
        const int64_t head = (b * dims.positions * dims.heads + m) * dims.channels;
        const T* grad = grad_output + row * dims.channels;
        const auto own = source.template row<kWarp>(dims, b, q, m, lane);
        Real sum = 0;
        for (int64_t level = 0; level < dims.levels; ++level) {
            const int32_t height = levels.height[level], width = levels.width[level];
            for (int64_t i = level * dims.points; i < (level + 1) * dims.points; ++i) {
                const Cell<Real> cell = source.cell(own, i, level, height, width, dims.points);
                const Real weight = cell.is_used ? source.weight(own, i) : 0;  // not even a NaN matters
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
                            if (grad_value != nullptr) atomicAdd(grad_value + neighbour + c, weight * at.factor * g);
                        }
                        dots[n] = sum_warp(dots[n]);
                    }
                    const Real right = cell.right, left = 1 - right, low = cell.low, high = 1 - low;
                    by_weight = high * (left * dots[0] + right * dots[1]) + low * (left * dots[2] + right * dots[3]);
                    by_x = high * (dots[1] - dots[0]) + low * (dots[3] - dots[2]);
                    by_y = left * (dots[2] - dots[0]) + right * (dots[3] - dots[1]);
                }
                if (lane == 0) {
                    sum += gradients.put(dims, b, q, m, i, level, own, weight, by_weight, by_x, by_y, height, width);
                }
            }
        }
        gradients.template finish<kWarp>(dims, b, q, m, lane, true, source, own, sum);
    }
}

template <typename T, typename Source>
int32_t run_forward(const Problem& problem, const ForwardBuffers& at, const Source& source) {
    const ddetr_msda_dims& dims = problem.dims;
    const int64_t elements = dims.batch * dims.queries * dims.heads * dims.channels;
    return launch(forward_kernel<T, Source>, blocks_for(elements, kThreads), problem.stream, dims, problem.levels,
                  at.strides, static_cast<const T*>(at.value), source, static_cast<T*>(at.output));
}

template <typename T>
int32_t run_forward(const Problem& problem, const ForwardBuffers& at) {
    using Real = typename ComputeOf<T>::Real;
    if (at.projected == nullptr) return run_forward<T>(problem, at, given<Real>(at));
    return run_forward<T>(problem, at, projected<Real>(at));
}

template <typename T, typename Source, typename Gradients>
int32_t run_backward(const Problem& problem, const BackwardBuffers& at, const Source& source,
                     const Gradients& gradients) {
    using Real = typename ComputeOf<T>::Real;
    const int64_t rows = problem.dims.batch * problem.dims.queries * problem.dims.heads;
    return launch(backward_kernel<T, Source, Gradients>, blocks_for(rows, kThreads / kWarp), problem.stream,
                  problem.dims, problem.levels, static_cast<const T*>(at.grad_output),
                  static_cast<const T*>(at.value), source, static_cast<Real*>(at.grad_value), gradients);
}

template <typename T>
int32_t run_backward(const Problem& problem, const BackwardBuffers& at) {
    using Real = typename ComputeOf<T>::Real;
    if (at.projected != nullptr) {
        const ProjectedGradients<Real> gradients = {static_cast<Real*>(at.grad_projected), at.reference_numbers};
        return run_backward<T>(problem, at, projected<Real>(at), gradients);
    }
    const GivenGradients<Real, false> gradients = {static_cast<Real*>(at.grad_sampling_xy),
                                                   static_cast<Real*>(at.grad_weights)};
    return run_backward<T>(problem, at, given<Real>(at), gradients);
}

}  // namespace

int32_t forward_plain(const Problem& problem, const ForwardBuffers& at) {
    switch (problem.dtype) {
        case DDETR_DTYPE_F64:
            return run_forward<double>(problem, at);
        case DDETR_DTYPE_F16:
            return run_forward<__half>(problem, at);
        case DDETR_DTYPE_BF16:
            return run_forward<__nv_bfloat16>(problem, at);
        default:
            return run_forward<float>(problem, at);
    }
}

int32_t backward_plain(const Problem& problem, const BackwardBuffers& at) {
    switch (problem.dtype) {
        case DDETR_DTYPE_F64:
            return run_backward<double>(problem, at);
        case DDETR_DTYPE_F16:
            return run_backward<__half>(problem, at);
        case DDETR_DTYPE_BF16:
            return run_backward<__nv_bfloat16>(problem, at);
        default:
            return run_backward<float>(problem, at);
    }
}

}  // namespace ddetr
