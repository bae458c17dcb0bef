// The forward pass, fast: 16 bytes of channels per lane and read, samples located once per row.
//
// With many queries a row has just the lanes that its channels need. With few, it has a whole warp: the parts of the
// warp read different samples and add up what they found, so that even 300 queries fill a GPU.
#include "msda_cuda_rows.cuh"

namespace ddetr {
namespace {

// Neighbours outside the map weigh nothing and stand for the one beside them that is inside; .x < 0: nothing to read.
__device__ __forceinline__ Corners corners_inside(const Cell<float>& cell, float weight, int32_t height,
                                                  int32_t width, int32_t start, int32_t stride) {
    if (!cell.is_used) return {make_int4(-1, 0, 0, 0), make_float4(0, 0, 0, 0)};
    const bool has_left = cell.column >= 0, has_right = cell.column + 1 < width;
    const bool has_high = cell.line >= 0, has_low = cell.line + 1 < height;
    const float left = has_left ? 1 - cell.right : 0.f, right = has_right ? cell.right : 0.f;
    const float high = has_high ? (1 - cell.low) * weight : 0.f, low = has_low ? cell.low * weight : 0.f;
    const int32_t first = has_left ? cell.column : 0, second = has_right ? cell.column + 1 : width - 1;
    const int32_t upper = start + (has_high ? cell.line : 0) * width;
    const int32_t lower = start + (has_low ? cell.line + 1 : height - 1) * width;
    return {make_int4((upper + first) * stride, (upper + second) * stride, (lower + first) * stride,
                      (lower + second) * stride),
            make_float4(high * left, high * right, low * left, low * right)};
}

// kLanes lanes hold the channels of a row, kParts of them next to each other share its samples.
template <typename T, int kLanes, int kParts, typename Source>
__global__ void __launch_bounds__(kThreads, 4)
    forward_rows_kernel(ddetr_msda_dims dims, Levels levels, Schedule schedule, Strides strides,
                        const T* __restrict__ value, Source source, T* __restrict__ output) {
    constexpr int kVector = 16 / sizeof(T), kRowLanes = kLanes * kParts, kRows = kWarp / kRowLanes;
    __shared__ int32_t shared_queries[kMaxQueriesPerBlock];
    __shared__ int4 shared_offsets[kThreads];
    __shared__ float4 shared_factors[kThreads];
    const Work work(dims, schedule, shared_queries);
    const int warp = threadIdx.x / kWarp, row_of_warp = threadIdx.x % kWarp / kRowLanes;
    const int lane = threadIdx.x % kRowLanes, part = lane / kLanes, channel = lane % kLanes * kVector;
    int4* offsets = shared_offsets + warp * kWarp + row_of_warp;  // of sample s of the batch: [s * kRows]
    float4* factors = shared_factors + warp * kWarp + row_of_warp;
    const T* head = value + work.b * strides.batch + work.m * strides.head + channel;
    const int32_t stride = static_cast<int32_t>(strides.position), points = static_cast<int32_t>(dims.points);

    // All lanes of a warp do as many rounds; a row past the last one is computed as that one and not written.
    for (int32_t first = warp * kRows; first < work.count; first += kThreads / kRowLanes) {
        const bool is_real = first + row_of_warp < work.count;
        const int64_t q = work.queries[is_real ? first + row_of_warp : work.count - 1];
        const auto row = source.template row<kRowLanes>(dims, work.b, q, work.m, lane);
        float sums[kVector] = {};
        for (int32_t batch = 0; batch < schedule.samples; batch += kRowLanes) {
            const int32_t i = batch + lane;
            Corners corners = {make_int4(-1, 0, 0, 0), make_float4(0, 0, 0, 0)};
            if (i < schedule.samples) {
                const int32_t level = schedule.points.quotient(i);
                const int32_t height = levels.height[level], width = levels.width[level];
                const Cell<float> cell = source.cell(row, i, level, height, width, points);
                corners = corners_inside(cell, source.weight(row, i), height, width,
                                         static_cast<int32_t>(levels.start[level]), stride);
            }
            __syncwarp();  // everyone has read the batch before
            offsets[lane * kRows] = corners.offset;
            factors[lane * kRows] = corners.factor;
            __syncwarp();
#pragma unroll
            for (int s = 0; s < kLanes; ++s) {
                const int4 at = offsets[(s * kParts + part) * kRows];
                if (at.x < 0) continue;
                const float4 factor = factors[(s * kParts + part) * kRows];
                Channels<T, kVector> a, b, c, d;
                a.read(head + at.x);
                b.read(head + at.y);
                c.read(head + at.z);
                d.read(head + at.w);
#pragma unroll
                for (int k = 0; k < kVector; ++k) {
                    sums[k] = fmaf(factor.x, a.at[k], sums[k]);
                    sums[k] = fmaf(factor.y, b.at[k], sums[k]);
                    sums[k] = fmaf(factor.z, c.at[k], sums[k]);
                    sums[k] = fmaf(factor.w, d.at[k], sums[k]);
                }
            }
        }
        for (int offset = kLanes; offset < kRowLanes; offset *= 2) {
#pragma unroll
            for (int k = 0; k < kVector; ++k) sums[k] += __shfl_xor_sync(kAllLanes, sums[k], offset);
        }
        if (is_real && part == 0) {
            const int64_t place = ((work.b * dims.queries + q) * dims.heads + work.m) * dims.channels + channel;
            write_channels(sums, output + place);
        }
    }
}

// What decides between the forms: the caller's word, and how much the device does at once.
struct Choice {
    int32_t kernels;
    int processors;
};

template <typename T, int kLanes, int kParts, typename Source>
int32_t run(const Problem& problem, const ForwardBuffers& at, const Source& source, int32_t per_block) {
    const Schedule schedule = schedule_for(problem, per_block);
    const int64_t blocks = schedule.blocks_of_queries * problem.dims.batch * problem.dims.heads;
    return launch(forward_rows_kernel<T, kLanes, kParts, Source>, static_cast<unsigned>(blocks), problem.stream,
                  problem.dims, problem.levels, schedule, at.strides, static_cast<const T*>(at.value), source,
                  static_cast<T*>(at.output));
}

template <typename T, int kLanes, typename Source>
int32_t run(const Problem& problem, const ForwardBuffers& at, const Source& source, const Choice& choice) {
    const ddetr_msda_dims& dims = problem.dims;
    const int64_t rows = dims.batch * dims.heads * dims.queries, processors = choice.processors;
    const bool are_few = rows * kLanes < processors * 1024;  // threads: half of what a processor holds
    if (choice.kernels == DDETR_CUDA_FAST_WARPS || (choice.kernels == DDETR_CUDA_FAST && are_few)) {
        return run<T, kLanes, kWarp / kLanes>(problem, at, source, kThreads / kWarp);
    }
    // Large blocks read their tile of the picture more often from near; small ones leave no processor waiting.
    const bool fill = rows / kMaxQueriesPerBlock >= processors * 16;
    return run<T, kLanes, 1>(problem, at, source, fill ? kMaxQueriesPerBlock : kMaxQueriesPerBlock / 2);
}

template <typename T, typename Source>
int32_t run(const Problem& problem, const ForwardBuffers& at, const Source& source, const Choice& choice) {
    constexpr int kVector = 16 / sizeof(T);
    switch (problem.dims.channels) {
        case 16:
            return run<T, 16 / kVector>(problem, at, source, choice);
        case 32:
            return run<T, 32 / kVector>(problem, at, source, choice);
        case 64:
            return run<T, 64 / kVector>(problem, at, source, choice);
        default:
            return kNotMadeFor;
    }
}

template <typename T>
int32_t run(const Problem& problem, const ForwardBuffers& at, const Choice& choice) {
    const Strides& strides = at.strides;
    const bool is_whole = (strides.batch | strides.position | strides.head) % (16 / static_cast<int>(sizeof(T))) == 0;
    if (!is_whole || !is_aligned(at.value, 16) || !is_aligned(at.output, 16)) return kNotMadeFor;
    if (at.projected == nullptr) return run<T>(problem, at, given<float>(at), choice);
    return run<T>(problem, at, projected<float>(at), choice);
}

}  // namespace

int32_t forward_fast(const Problem& problem, const ForwardBuffers& at, int32_t kernels, int32_t device) {
    if (at.strides.position < 0 || !fit_rows(problem.dims, at.strides.position)) return kNotMadeFor;
    Choice choice = {kernels, 0};
    const cudaError_t status = cudaDeviceGetAttribute(&choice.processors, cudaDevAttrMultiProcessorCount, device);
    if (status != cudaSuccess) return status;
    switch (problem.dtype) {
        case DDETR_DTYPE_F32:
            return run<float>(problem, at, choice);
        case DDETR_DTYPE_F16:
            return run<__half>(problem, at, choice);
        case DDETR_DTYPE_BF16:
            return run<__nv_bfloat16>(problem, at, choice);
        default:
            return kNotMadeFor;
    }
}

}  // namespace ddetr
