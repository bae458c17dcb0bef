// What the CUDA kernels share: storage types, the sizes of levels as an argument, samples of both forms of the op,
// and how a kernel is launched.
#ifndef DDETR_MSDA_CUDA_CUH
#define DDETR_MSDA_CUDA_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "bilinear.h"
#include "ddetr_cuda.h"

namespace ddetr {

// Sizes of the levels travel as an argument of the kernel, of which there is limited room.
constexpr int kMaxLevels = DDETR_CUDA_MAX_LEVELS;
constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Levels {
    int32_t height[kMaxLevels], width[kMaxLevels];
    int64_t start[kMaxLevels];
};

// Elements from one image, position or head of value to the next.
struct Strides {
    int64_t batch, position, head;
};

// All that a call gives besides buffers; kernels take what they need of it.
struct Problem {
    ddetr_msda_dims dims;
    Levels levels;
    const int64_t* level_hw;  // host memory
    int32_t dtype;
    cudaStream_t stream;
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

// ---- samples: where they lie and what they weigh, in either form of the op ----
//
// row() is called by `kLanes` neighbouring lanes of a warp with the same row, and with all other lanes of their warp:
// they share the work on it. Lane `lane` of them may then ask for any sample i = level * points + point.

// Locations and weights as they are.
template <typename Real>
struct GivenSamples {
    const Real* sampling_xy;
    const Real* weights;

    struct Row {
        const Real *xy, *weight;
    };

    template <int kLanes>
    __device__ __forceinline__ Row row(const ddetr_msda_dims& dims, int64_t b, int64_t q, int64_t m, int) const {
        const int64_t first = ((b * dims.queries + q) * dims.heads + m) * dims.levels * dims.points;
        return {sampling_xy + 2 * first, weights + first};
    }
    __device__ __forceinline__ Real weight(const Row& row, int64_t i) const { return row.weight[i]; }
    __device__ __forceinline__ Cell<Real> cell(const Row& row, int64_t i, int64_t, int32_t height, int32_t width,
                                               int64_t) const {
        return locate(row.xy[2 * i], row.xy[2 * i + 1], static_cast<Real>(height), static_cast<Real>(width));
    }
};

// Offsets and logits as a query's projections give them: locations and the softmax are computed on the way.
template <typename Real>
struct ProjectedSamples {
    const Real* projected;
    int64_t batch_stride, query_stride;
    const Real* reference;
    int32_t numbers;  // of a reference point: 2, a centre; 4, a box

    struct Row {
        const Real *offsets, *logits, *reference;
        Real largest, scale;  // of the logits; 1 / sum of exponentials
    };

    template <int kLanes>
    __device__ __forceinline__ Row row(const ddetr_msda_dims& dims, int64_t b, int64_t q, int64_t m, int lane) const {
        const int64_t samples = dims.levels * dims.points;
        const Real* query = projected + b * batch_stride + q * query_stride;
        Row row = {query + 2 * m * samples, query + (2 * dims.heads + m) * samples,
                   reference + (b * dims.queries + q) * dims.levels * numbers, 0, 0};
        Real largest = -INFINITY, sum = 0;
        for (int64_t i = lane; i < samples; i += kLanes) largest = fmax(largest, row.logits[i]);
        for (int offset = kLanes / 2; offset > 0; offset /= 2) {
            largest = fmax(largest, __shfl_xor_sync(kAllLanes, largest, offset));
        }
        for (int64_t i = lane; i < samples; i += kLanes) sum += exp(row.logits[i] - largest);
        for (int offset = kLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
        row.largest = largest;
        row.scale = 1 / sum;
        return row;
    }
    __device__ __forceinline__ Real weight(const Row& row, int64_t i) const {
        return exp(row.logits[i] - row.largest) * row.scale;
    }
    __device__ __forceinline__ Cell<Real> cell(const Row& row, int64_t i, int64_t level, int32_t height,
                                               int32_t width, int64_t points) const {
        const Real* at = row.reference + level * numbers;
        const Real columns = static_cast<Real>(width), lines = static_cast<Real>(height);
        Real x = row.offsets[2 * i], y = row.offsets[2 * i + 1];
        if (numbers == 4) {
            x *= at[2] * columns * (Real(0.5) / static_cast<Real>(points));
            y *= at[3] * lines * (Real(0.5) / static_cast<Real>(points));
        }
        x += rounded_product(at[0], columns) - Real(0.5);
        y += rounded_product(at[1], lines) - Real(0.5);
        return locate_pixel(x, y, lines, columns);
    }
};

// ---- gradients of samples, in either form of the op ----
//
// Of every sample of a row one lane calls put(), with the gradient by the weight and, still without the weight, by
// the pixel; then all lanes of the warp call finish() with the sum of what put() gave each of them. kBlocks are to
// fit on a processor at a time, which bounds the registers of fast kernels.

// Of locations and weights. kInPairs: locations are aligned to two numbers.
template <typename Real, bool kInPairs>
struct GivenGradients {
    using Row = typename GivenSamples<Real>::Row;
    static constexpr int kBlocks = 4;
    Real* sampling_xy;
    Real* weights;

    __device__ __forceinline__ Real put(const ddetr_msda_dims& dims, int64_t b, int64_t q, int64_t m, int64_t i,
                                        int64_t, const Row&, Real weight, Real by_weight, Real by_x, Real by_y,
                                        int32_t height, int32_t width) const {
        const int64_t sample = ((b * dims.queries + q) * dims.heads + m) * dims.levels * dims.points + i;
        const Real x = weight * static_cast<Real>(width) * by_x, y = weight * static_cast<Real>(height) * by_y;
        weights[sample] = by_weight;
        write_pair(sampling_xy + 2 * sample, x, y);
        return 0;
    }
    template <int kLanes>
    __device__ __forceinline__ void finish(const ddetr_msda_dims&, int64_t, int64_t, int64_t, int, bool,
                                           const GivenSamples<Real>&, const Row&, Real) const {}

  private:
    static __device__ __forceinline__ void write_pair(Real* to, Real x, Real y) {
        if (kInPairs) {
            *reinterpret_cast<float2*>(to) = make_float2(static_cast<float>(x), static_cast<float>(y));
        } else {
            to[0] = x;
            to[1] = y;
        }
    }
};

// Of what the projections give, side by side: through locations and the softmax.
template <typename Real>
struct ProjectedGradients {
    using Row = typename ProjectedSamples<Real>::Row;
    static constexpr int kBlocks = 3;
    Real* projected;
    int32_t numbers;  // of a reference point

    __device__ __forceinline__ Real put(const ddetr_msda_dims& dims, int64_t b, int64_t q, int64_t m, int64_t i,
                                        int64_t level, const Row& row, Real weight, Real by_weight, Real by_x,
                                        Real by_y, int32_t height, int32_t width) const {
        Real *offsets = offsets_of(dims, b, q, m) + 2 * i, x = weight * by_x, y = weight * by_y;
        if (numbers == 4) {
            const Real* at = row.reference + level * numbers;
            x *= at[2] * static_cast<Real>(width) * (Real(0.5) / static_cast<Real>(dims.points));
            y *= at[3] * static_cast<Real>(height) * (Real(0.5) / static_cast<Real>(dims.points));
        }
        offsets[0] = x;
        offsets[1] = y;
        return logits_of(dims, b, q, m)[i] = weight * by_weight;
    }
    // The softmax: a logit loses its weight's share of the sum over all samples.
    template <int kLanes>
    __device__ __forceinline__ void finish(const ddetr_msda_dims& dims, int64_t b, int64_t q, int64_t m, int lane,
                                           bool is_real, const ProjectedSamples<Real>& source, const Row& row,
                                           Real sum) const {
        for (int offset = kLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
        __syncwarp();  // other lanes have put some of what follows
        if (!is_real) return;
        Real* logits = logits_of(dims, b, q, m);
        for (int64_t i = lane; i < dims.levels * dims.points; i += kLanes) logits[i] -= source.weight(row, i) * sum;
    }

  private:
    __device__ __forceinline__ Real* query(const ddetr_msda_dims& dims, int64_t b, int64_t q) const {
        return projected + (b * dims.queries + q) * 3 * dims.heads * dims.levels * dims.points;
    }
    __device__ __forceinline__ Real* offsets_of(const ddetr_msda_dims& dims, int64_t b, int64_t q, int64_t m) const {
        return query(dims, b, q) + 2 * m * dims.levels * dims.points;
    }
    __device__ __forceinline__ Real* logits_of(const ddetr_msda_dims& dims, int64_t b, int64_t q, int64_t m) const {
        return query(dims, b, q) + (2 * dims.heads + m) * dims.levels * dims.points;
    }
};

// ---- launching ----

inline unsigned blocks_for(int64_t items, int64_t items_per_block) {
    const int64_t blocks = (items - 1) / items_per_block + 1, most = 1 << 30;  // the kernels stride over the rest
    return static_cast<unsigned>(blocks < most ? blocks : most);
}

// Queues `kernel` with a grid of one dimension. Returns a cudaError_t.
template <typename... Parameters, typename... Arguments>
int32_t launch(void (*kernel)(Parameters...), unsigned blocks, cudaStream_t stream, const Arguments&... arguments) {
    static_assert(sizeof...(Parameters) == sizeof...(Arguments), "as many arguments as the kernel takes");
    return [&](Parameters... converted) {
        void* pointers[] = {&converted...};
        return static_cast<int32_t>(cudaLaunchKernel(kernel, dim3(blocks), dim3(kThreads), pointers, 0, stream));
    }(arguments...);
}

// ---- the kernels, by file; each returns a cudaError_t or, where it is not made for the problem, kNotMadeFor ----

constexpr int32_t kNotMadeFor = INT32_MIN;

struct ForwardBuffers {
    const void* value;
    Strides strides;
    const void *sampling_xy, *weights;  // the plain form, or null:
    const void* projected;              // the fused form
    int64_t projected_strides[2];       // of batch and queries
    const void* reference;
    int32_t reference_numbers;
    void* output;
};

struct BackwardBuffers {
    const void *grad_output, *value, *sampling_xy, *weights;
    void* grad_value;  // in the compute type, added to; null: not computed, in the plain form
    void *grad_sampling_xy, *grad_weights;
    const void* projected;  // the fused form, or null
    int64_t projected_strides[2];
    const void* reference;
    int32_t reference_numbers;
    void* grad_projected;
};

template <typename Real, typename Buffers>
GivenSamples<Real> given(const Buffers& at) {
    return {static_cast<const Real*>(at.sampling_xy), static_cast<const Real*>(at.weights)};
}

template <typename Real, typename Buffers>
ProjectedSamples<Real> projected(const Buffers& at) {
    return {static_cast<const Real*>(at.projected), at.projected_strides[0], at.projected_strides[1],
            static_cast<const Real*>(at.reference), at.reference_numbers};
}

int32_t forward_plain(const Problem& problem, const ForwardBuffers& at);
int32_t backward_plain(const Problem& problem, const BackwardBuffers& at);
int32_t forward_fast(const Problem& problem, const ForwardBuffers& at, int32_t kernels, int32_t device);
int32_t backward_fast(const Problem& problem, const BackwardBuffers& at);
int64_t sorted_bytes(const ddetr_msda_dims& dims, int32_t dtype, const int64_t* level_hw);
int32_t grad_value_sorted(const Problem& problem, const BackwardBuffers& at, void* grad_value, void* workspace);

}  // namespace ddetr

#endif
