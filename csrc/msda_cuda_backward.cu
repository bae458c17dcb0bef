// The backward pass, fast: four channels per lane, and of every sample four dot products, of the gradient with each
// neighbour, are all that crosses lanes. The three gradients of a sample follow from them.
//
// The gradient of the value is added to memory four numbers at a time, in float: pixels of the coarse levels get a
// thousand additions, in which 16 bits would stagnate.
#include "msda_cuda_rows.cuh"

namespace ddetr {
namespace {

// A neighbour outside the map has an offset below 0.
__device__ __forceinline__ Corners corners_or_none(const Cell<float>& cell, float weight, int32_t height,
                                                   int32_t width, int32_t start, int32_t stride) {
    if (!cell.is_used) return {make_int4(-1, -1, -1, -1), make_float4(0, 0, 0, 0)};
    const bool has_left = cell.column >= 0, has_right = cell.column + 1 < width;
    const bool has_high = cell.line >= 0, has_low = cell.line + 1 < height;
    const int32_t upper = start + cell.line * width + cell.column, lower = upper + width;
    const float right = cell.right, left = 1 - right, low = cell.low * weight, high = (1 - cell.low) * weight;
    return {make_int4(has_high && has_left ? upper * stride : -1, has_high && has_right ? (upper + 1) * stride : -1,
                      has_low && has_left ? lower * stride : -1, has_low && has_right ? (lower + 1) * stride : -1),
            make_float4(high * left, high * right, low * left, low * right)};
}

__device__ __forceinline__ void add_to_memory(float* to, const float (&x)[4], float factor) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    atomicAdd(reinterpret_cast<float4*>(to), make_float4(factor * x[0], factor * x[1], factor * x[2], factor * x[3]));
#else
    for (int k = 0; k < 4; ++k) atomicAdd(to + k, factor * x[k]);
#endif
}

// The dot product with one neighbour, as far as this lane's channels go; 0 where there is none.
template <typename T, bool kScatters>
__device__ __forceinline__ float visit(int32_t offset, float factor, const float (&grad)[4], const T* head,
                                       float* grad_head) {
    if (offset < 0) return 0;
    Channels<T, 4> value;
    value.read(head + offset);
    if (kScatters) add_to_memory(grad_head + offset, grad, factor);
    float dot = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) dot = fmaf(grad[k], value.at[k], dot);
    return dot;
}

// Sums of four numbers over kLanes lanes; lane l gets number l % 4. Lanes exchange halves of what they hold, so that
// it takes 3 exchanges and not 8 for the first 4 lanes.
template <int kLanes>
__device__ __forceinline__ float sum_transposed(const float (&x)[4], int lane) {
    const bool odd = lane & 1, upper = lane & 2;
    const float first = (odd ? x[1] : x[0]) + __shfl_xor_sync(kAllLanes, odd ? x[0] : x[1], 1);
    const float second = (odd ? x[3] : x[2]) + __shfl_xor_sync(kAllLanes, odd ? x[2] : x[3], 1);
    float sum = (upper ? second : first) + __shfl_xor_sync(kAllLanes, upper ? first : second, 2);
#pragma unroll
    for (int offset = 4; offset < kLanes; offset *= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
    return sum;
}

template <typename T, int kLanes, bool kScatters, typename Source, typename Gradients>
__global__ void __launch_bounds__(kThreads, Gradients::kBlocks)
    backward_rows_kernel(ddetr_msda_dims dims, Levels levels, Schedule schedule, const T* __restrict__ grad_output,
                         const T* __restrict__ value, Source source, float* __restrict__ grad_value,
                         Gradients gradients) {
    constexpr int kRows = kWarp / kLanes;
    __shared__ int32_t shared_queries[kMaxQueriesPerBlock];
    __shared__ int4 shared_offsets[kThreads];
    __shared__ float4 shared_factors[kThreads];
    __shared__ float4 shared_dots[kThreads];
    const Work work(dims, schedule, shared_queries);
    const int warp = threadIdx.x / kWarp, row_of_warp = threadIdx.x % kWarp / kLanes;
    const int lane = threadIdx.x % kLanes, channel = lane * 4;
    int4* offsets = shared_offsets + warp * kWarp + row_of_warp;  // of sample s of the batch: [s * kRows]
    float4* factors = shared_factors + warp * kWarp + row_of_warp;
    float4* dots = shared_dots + warp * kWarp + row_of_warp;
    const int64_t image = (work.b * dims.positions * dims.heads + work.m) * dims.channels + channel;
    const T* head = value + image;
    float* grad_head = kScatters ? grad_value + image : nullptr;
    const int32_t stride = static_cast<int32_t>(dims.heads * dims.channels);
    const int32_t points = static_cast<int32_t>(dims.points);

    // All lanes of a warp do as many rounds; a row past the last one adds and writes nothing.
    for (int32_t first = warp * kRows; first < work.count; first += kThreads / kLanes) {
        const bool is_real = first + row_of_warp < work.count;
        const int64_t q = work.queries[is_real ? first + row_of_warp : work.count - 1];
        const int64_t place = (work.b * dims.queries + q) * dims.heads + work.m;
        const auto row = source.template row<kLanes>(dims, work.b, q, work.m, lane);
        Channels<T, 4> grad;
        grad.read(grad_output + place * dims.channels + channel);
        float sum = 0;
        for (int32_t batch = 0; batch < schedule.samples; batch += kLanes) {
            const int32_t i = batch + lane;
            const bool is_mine = is_real && i < schedule.samples;
            Cell<float> cell = {};
            float weight = 0;
            int32_t height = 0, width = 0, level = 0;
            Corners corners = {make_int4(-1, -1, -1, -1), make_float4(0, 0, 0, 0)};
            if (is_mine) {
                level = schedule.points.quotient(i);
                height = levels.height[level];
                width = levels.width[level];
                cell = source.cell(row, i, level, height, width, points);
                if (cell.is_used) weight = source.weight(row, i);  // else not even a NaN matters
                corners =
                    corners_or_none(cell, weight, height, width, static_cast<int32_t>(levels.start[level]), stride);
            }
            __syncwarp();  // everyone has read the batch before
            offsets[lane * kRows] = corners.offset;
            factors[lane * kRows] = corners.factor;
            __syncwarp();
#pragma unroll
            for (int s = 0; s < kLanes; ++s) {
                const int4 at = offsets[s * kRows];
                const float4 factor = factors[s * kRows];
                const float parts[4] = {visit<T, kScatters>(at.x, factor.x, grad.at, head, grad_head),
                                        visit<T, kScatters>(at.y, factor.y, grad.at, head, grad_head),
                                        visit<T, kScatters>(at.z, factor.z, grad.at, head, grad_head),
                                        visit<T, kScatters>(at.w, factor.w, grad.at, head, grad_head)};
                const float dot = sum_transposed<kLanes>(parts, lane);
                if (lane < 4) reinterpret_cast<float*>(dots + s * kRows)[lane] = dot;
            }
            __syncwarp();
            if (is_mine) {
                float by_weight = 0, by_x = 0, by_y = 0;
                if (cell.is_used) {
                    const float4 dot = dots[lane * kRows];
                    const float right = cell.right, left = 1 - right, low = cell.low, high = 1 - low;
                    by_weight = high * (left * dot.x + right * dot.y) + low * (left * dot.z + right * dot.w);
                    by_x = high * (dot.y - dot.x) + low * (dot.w - dot.z);
                    by_y = left * (dot.z - dot.x) + right * (dot.w - dot.y);
                }
                sum += gradients.put(dims, work.b, q, work.m, i, level, row, weight, by_weight, by_x, by_y, height,
                                     width);
            }
        }
        gradients.template finish<kLanes>(dims, work.b, q, work.m, lane, is_real, source, row, sum);
    }
}

template <typename T, int kLanes, bool kScatters, typename Source, typename Gradients>
int32_t run(const Problem& problem, const BackwardBuffers& at, const Source& source, const Gradients& gradients) {
    const Schedule schedule = schedule_for(problem, kMaxQueriesPerBlock / 2);
    const int64_t blocks = schedule.blocks_of_queries * problem.dims.batch * problem.dims.heads;
    return launch(backward_rows_kernel<T, kLanes, kScatters, Source, Gradients>, static_cast<unsigned>(blocks),
                  problem.stream, problem.dims, problem.levels, schedule, static_cast<const T*>(at.grad_output),
                  static_cast<const T*>(at.value), source, static_cast<float*>(at.grad_value), gradients);
}

template <typename T, int kLanes>
int32_t run(const Problem& problem, const BackwardBuffers& at) {
    if (at.projected != nullptr) {
        const ProjectedGradients<float> gradients = {static_cast<float*>(at.grad_projected), at.reference_numbers};
        return run<T, kLanes, true>(problem, at, projected<float>(at), gradients);
    }
    const GivenGradients<float, true> gradients = {static_cast<float*>(at.grad_sampling_xy),
                                                   static_cast<float*>(at.grad_weights)};
    if (at.grad_value == nullptr) return run<T, kLanes, false>(problem, at, given<float>(at), gradients);
    return run<T, kLanes, true>(problem, at, given<float>(at), gradients);
}

template <typename T>
int32_t run(const Problem& problem, const BackwardBuffers& at) {
    const int64_t bytes = 4 * sizeof(T);
    if (!is_aligned(at.value, bytes) || !is_aligned(at.grad_output, bytes)) return kNotMadeFor;
    switch (problem.dims.channels) {
        case 16:
            return run<T, 4>(problem, at);
        case 32:
            return run<T, 8>(problem, at);
        case 64:
            return run<T, 16>(problem, at);
        default:
            return kNotMadeFor;
    }
}

}  // namespace

int32_t backward_fast(const Problem& problem, const BackwardBuffers& at) {
    const int64_t stride = problem.dims.heads * problem.dims.channels;
    if (!fit_rows(problem.dims, stride) || !is_aligned(at.grad_value, 16) || !is_aligned(at.grad_sampling_xy, 8)) {
        return kNotMadeFor;
    }
    switch (problem.dtype) {
        case DDETR_DTYPE_F32:
            return run<float>(problem, at);
        case DDETR_DTYPE_F16:
            return run<__half>(problem, at);
        case DDETR_DTYPE_BF16:
            return run<__nv_bfloat16>(problem, at);
        default:
            return kNotMadeFor;
    }
}

}  // namespace ddetr
