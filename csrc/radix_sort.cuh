// A stable sort of keys with the numbers of their items, least significant digit first: equal keys stay in the order
// of their items, so the result, and every sum taken in that order, is the same at every call.
#ifndef DDETR_RADIX_SORT_CUH
#define DDETR_RADIX_SORT_CUH

#include "msda_cuda.cuh"

namespace ddetr {
namespace {

constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;
constexpr int kRounds = 8, kWarps = kThreads / kWarp, kItemsPerBlock = kRounds * kThreads;
static_assert(kDigits == kThreads, "a thread for every digit");

// A block's items, in rounds: a warp owns consecutive ones, 32 in each round.
__device__ __forceinline__ uint32_t item_of(int warp, int round, int lane) {
    return blockIdx.x * kItemsPerBlock + (warp * kRounds + round) * kWarp + lane;
}

__device__ __forceinline__ int digit_of(uint32_t key, int shift) {
    return static_cast<int>(key >> shift) & (kDigits - 1);
}

// counts[digit][block]: how many of the block's keys have this digit.
__global__ void __launch_bounds__(kThreads)
    count_digits_kernel(const uint32_t* __restrict__ keys, uint32_t items, int shift, uint32_t* __restrict__ counts) {
    __shared__ int shared[kDigits];
    shared[threadIdx.x] = 0;
    __syncthreads();
    for (int round = 0; round < kRounds; ++round) {
        const uint32_t item = item_of(threadIdx.x / kWarp, round, threadIdx.x % kWarp);
        if (item < items) atomicAdd(&shared[digit_of(keys[item], shift)], 1);
    }
    __syncthreads();
    counts[threadIdx.x * gridDim.x + blockIdx.x] = static_cast<uint32_t>(shared[threadIdx.x]);
}

// The sum of x over all threads of the block before this one; total: over all of them.
__device__ __forceinline__ uint32_t sum_before(uint32_t x, uint32_t* shared, uint32_t* total) {
    shared[threadIdx.x] = x;
    __syncthreads();
    for (int offset = 1; offset < kThreads; offset *= 2) {
        const uint32_t before = static_cast<int>(threadIdx.x) >= offset ? shared[threadIdx.x - offset] : 0;
        __syncthreads();
        shared[threadIdx.x] += before;
        __syncthreads();
    }
    *total = shared[kThreads - 1];
    const uint32_t result = shared[threadIdx.x] - x;
    __syncthreads();
    return result;
}

// A warp per digit: its counts become sums over the blocks before, totals[digit] the sum over all.
__global__ void __launch_bounds__(kThreads)
    sum_counts_kernel(uint32_t* __restrict__ counts, uint32_t blocks, uint32_t* __restrict__ totals) {
    const uint32_t digit = blockIdx.x * kWarps + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    uint32_t* row = counts + static_cast<int64_t>(digit) * blocks;
    uint32_t before = 0;
    for (uint32_t first = 0; first < blocks; first += kWarp) {
        const uint32_t i = first + lane, count = i < blocks ? row[i] : 0;
        uint32_t sum = count;  // up to this lane
        for (unsigned offset = 1; offset < kWarp; offset *= 2) {
            const uint32_t lower = __shfl_up_sync(kAllLanes, sum, offset);
            if (lane >= offset) sum += lower;
        }
        if (i < blocks) row[i] = before + sum - count;
        before += __shfl_sync(kAllLanes, sum, kWarp - 1);
    }
    if (lane == 0) totals[digit] = before;
}

// Moves every item to its place by this digit. from_items null: items are numbered as they lie.
__global__ void __launch_bounds__(kThreads)
    move_items_kernel(const uint32_t* __restrict__ from_keys, const uint32_t* __restrict__ from_items, uint32_t items,
                      int shift, const uint32_t* __restrict__ counts, const uint32_t* __restrict__ totals,
                      uint32_t* __restrict__ to_keys, uint32_t* __restrict__ to_items) {
    __shared__ uint32_t shared[kThreads];
    __shared__ uint32_t places[kWarps][kDigits];  // how many keys of a digit; then where the warp's first one goes
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, digit = threadIdx.x;
    for (int w = 0; w < kWarps; ++w) places[w][digit] = 0;
    uint32_t total;
    uint32_t place = sum_before(totals[digit], shared, &total) + counts[digit * gridDim.x + blockIdx.x];
    uint32_t rank[kRounds];
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
        const uint32_t item = item_of(warp, round, lane);
        // past the last item: a digit of its own, counted by nobody
        const int mine = item < items ? digit_of(from_keys[item], shift) : kDigits;
        const unsigned peers = __match_any_sync(kAllLanes, mine);
        const unsigned before = peers & ((1u << lane) - 1);
        rank[round] = mine < kDigits ? places[warp][mine] + static_cast<uint32_t>(__popc(before)) : 0;
        __syncwarp();
        if (mine < kDigits && before == 0) places[warp][mine] += static_cast<uint32_t>(__popc(peers));
        __syncwarp();
    }
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) {
        const uint32_t count = places[w][digit];
        places[w][digit] = place;
        place += count;
    }
    __syncthreads();
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
        const uint32_t item = item_of(warp, round, lane);
        if (item >= items) continue;
        const uint32_t key = from_keys[item], to = places[warp][digit_of(key, shift)] + rank[round];
        to_keys[to] = key;
        to_items[to] = from_items == nullptr ? item : from_items[item];
    }
}

// Numbers of 32 bits that the sort needs besides keys and items.
inline int64_t sort_counts(int64_t items) {
    return (items + kItemsPerBlock - 1) / kItemsPerBlock * kDigits + kDigits;
}

// How many passes sort keys of at most `largest`.
inline int sort_passes(uint64_t largest) {
    int passes = 1;
    while (passes < 4 && largest >> (passes * kDigitBits) != 0) ++passes;
    return passes;
}

// Sorts keys[0], to be found with their items in keys[passes % 2] and sorted[passes % 2]. Returns a cudaError_t.
inline int32_t sort_keys(uint32_t* const keys[2], uint32_t* const sorted[2], uint32_t* counts, uint32_t items,
                         int passes, cudaStream_t stream) {
    const unsigned blocks = (items - 1) / kItemsPerBlock + 1;
    uint32_t* totals = counts + static_cast<int64_t>(blocks) * kDigits;
    for (int pass = 0; pass < passes; ++pass) {
        const int from = pass % 2, to = 1 - from, shift = pass * kDigitBits;
        int32_t status = launch(count_digits_kernel, blocks, stream, keys[from], items, shift, counts);
        if (status == 0) status = launch(sum_counts_kernel, kDigits / kWarps, stream, counts, blocks, totals);
        if (status == 0) {
            status = launch(move_items_kernel, blocks, stream, keys[from],
                            pass == 0 ? static_cast<const uint32_t*>(nullptr) : sorted[from], items, shift, counts,
                            totals, keys[to], sorted[to]);
        }
        if (status != 0) return status;
    }
    return 0;
}

}  // namespace
}  // namespace ddetr

#endif
