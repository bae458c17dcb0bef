// What the fast kernels share: how a warp is divided among rows, records of samples, vectors of channels.
//
// A row is one (batch, query, head). Neighbouring lanes of a warp own it, each some of its channels. They take its
// samples in batches of as many as they are: every lane locates one sample and leaves a record of it in shared
// memory, in which then all of them read all samples of the batch. Records of one sample of all rows of the warp lie
// side by side, so that the rows read them from different banks.
#ifndef DDETR_MSDA_CUDA_ROWS_CUH
#define DDETR_MSDA_CUDA_ROWS_CUH

#include "msda_cuda.cuh"
#include "query_order.h"

namespace ddetr {

// Quotients of numbers below 2^16 by multiplication.
struct Divider {
    uint32_t divisor, magic;  // magic = 2^32 / divisor, rounded up

    __device__ __forceinline__ int32_t quotient(int32_t number) const {
        return divisor == 1 ? number : static_cast<int32_t>(__umulhi(static_cast<uint32_t>(number), magic));
    }
};

inline Divider divider_for(int64_t divisor) {
    const uint32_t d = static_cast<uint32_t>(divisor);
    return {d, static_cast<uint32_t>(((uint64_t(1) << 32) + d - 1) / d)};
}

// The work of a block: `per_block` queries that follow each other in the order, of one head of one image. Blocks of
// one image follow each other, those of one set of queries and different heads too.
struct Schedule {
    QueryTiles tiles;
    Divider points;
    int32_t samples;    // levels * points
    int32_t per_block;  // at most kMaxQueriesPerBlock
    int64_t blocks_of_queries;
};

constexpr int kMaxQueriesPerBlock = 128;

// Whether the fast kernels are made for these sizes, channels and alignment apart.
inline bool fit_rows(const ddetr_msda_dims& dims, int64_t position_stride) {
    const int64_t samples = dims.levels * dims.points, most = INT32_MAX;
    return dims.queries < most && samples > 0 && samples < 1 << 16 && dims.positions * position_stride < most &&
           dims.batch * dims.heads * dims.queries < most;  // blocks of a grid
}

inline Schedule schedule_for(const Problem& problem, int32_t per_block) {
    const ddetr_msda_dims& dims = problem.dims;
    return {tiles_for(dims.queries, dims.positions, dims.levels, problem.level_hw), divider_for(dims.points),
            static_cast<int32_t>(dims.levels * dims.points), per_block, (dims.queries + per_block - 1) / per_block};
}

// One block's part of the schedule; all threads of the block construct it together.
struct Work {
    int64_t b, m;
    int32_t count;           // of queries
    const int32_t* queries;  // shared memory

    __device__ __forceinline__ Work(const ddetr_msda_dims& dims, const Schedule& schedule, int32_t* shared) {
        const int32_t heads = static_cast<int32_t>(dims.heads);
        const int32_t group = static_cast<int32_t>(blockIdx.x) / heads;
        const int32_t groups = static_cast<int32_t>(schedule.blocks_of_queries);
        m = static_cast<int32_t>(blockIdx.x) % heads;
        b = group / groups;
        const int32_t first = group % groups * schedule.per_block;
        const int32_t left = static_cast<int32_t>(dims.queries) - first;
        count = left < schedule.per_block ? left : schedule.per_block;
        for (int32_t i = threadIdx.x; i < count; i += kThreads) shared[i] = query_at(schedule.tiles, first + i);
        queries = shared;
        __syncthreads();
    }
};

// Where the four neighbours of a sample lie in their image, in elements, and what they weigh; upper left, upper
// right, lower left, lower right.
struct Corners {
    int4 offset;
    float4 factor;
};

// Channels of a row in registers, from kCount numbers of storage side by side: 8 or 16 bytes in one read.
template <int kBytes>
struct Words;
template <>
struct Words<8> {
    uint2 bits;
    __device__ __forceinline__ unsigned word(int i) const { return i == 0 ? bits.x : bits.y; }
};
template <>
struct Words<16> {
    uint4 bits;
    __device__ __forceinline__ unsigned word(int i) const {
        return i == 0 ? bits.x : i == 1 ? bits.y : i == 2 ? bits.z : bits.w;
    }
};

__device__ __forceinline__ Words<8> read_words(const uint2* from) {
    return {__ldg(from)};
}
__device__ __forceinline__ Words<16> read_words(const uint4* from) {
    return {__ldg(from)};
}

template <typename T, int kCount>
struct Channels {
    static constexpr int kBytes = kCount * static_cast<int>(sizeof(T));
    using Bits = decltype(Words<kBytes>::bits);
    float at[kCount];

    __device__ __forceinline__ void read(const T* from) {
        decode(read_words(reinterpret_cast<const Bits*>(from)), static_cast<const T*>(nullptr));
    }

  private:
    __device__ __forceinline__ void decode(const Words<kBytes>& words, const float*) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) at[i] = __uint_as_float(words.word(i));
    }
    __device__ __forceinline__ void decode(const Words<kBytes>& words, const __nv_bfloat16*) {
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) {  // a bfloat16 is the upper half of a float
            at[2 * i] = __uint_as_float(words.word(i) << 16);
            at[2 * i + 1] = __uint_as_float(words.word(i) & 0xffff0000u);
        }
    }
    __device__ __forceinline__ void decode(const Words<kBytes>& words, const __half*) {
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) {
            const unsigned word = words.word(i);
            const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word));
            at[2 * i] = pair.x;
            at[2 * i + 1] = pair.y;
        }
    }
};

__device__ __forceinline__ void write_channels(const float (&from)[4], float* to) {
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
}

__device__ __forceinline__ unsigned rounded_pair(float first, float second, const __half*) {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const unsigned*>(&pair);
}
__device__ __forceinline__ unsigned rounded_pair(float first, float second, const __nv_bfloat16*) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const unsigned*>(&pair);
}

template <typename T>
__device__ __forceinline__ void write_channels(const float (&from)[8], T* to) {
    *reinterpret_cast<uint4*>(to) =
        make_uint4(rounded_pair(from[0], from[1], to), rounded_pair(from[2], from[3], to),
                   rounded_pair(from[4], from[5], to), rounded_pair(from[6], from[7], to));
}

inline bool is_aligned(const void* pointer, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

}  // namespace ddetr

#endif
