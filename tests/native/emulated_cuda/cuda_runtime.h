// As much of CUDA as csrc/*.cu use, on the CPU: the kernels themselves run, thread by thread, and are compared with
// the definition. Every thread of a block is a fiber with a stack of its own; it gives way at barriers and exchanges.
// Stops the process, with a sentence, where a GPU would hang or compute nonsense: lanes of one warp at different
// exchanges, or a lane missing from one.
#ifndef EMULATED_CUDA_RUNTIME_H
#define EMULATED_CUDA_RUNTIME_H

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) {
    return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}
inline int4 make_int4(int x, int y, int z, int w) {
    return {x, y, z, w};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}

namespace emulated {

constexpr unsigned kLanes = 32;
constexpr size_t kStackBytes = 256 << 10;

[[noreturn]] inline void stop(const char* what) {
    std::fprintf(stderr, "emulated CUDA: %s\n", what);
    std::abort();
}

// Threads that wait for each other: a block, or a warp.
struct Meeting {
    unsigned members = 0, arrived = 0, round = 0;
    const void* kind = nullptr;  // which barrier or exchange they met at
};

struct Fiber {
    ucontext_t start;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    bool is_running = false, is_done = false;
    const Meeting* awaited = nullptr;  // and which round of it must be over
    unsigned round = 0;
#if defined(__SANITIZE_ADDRESS__)
    ucontext_t context;
    void* shadow = nullptr;
#else
    jmp_buf context;  // a tenth of the time of swapcontext, which asks the system for signal masks
#endif

    bool waits() const { return awaited != nullptr && awaited->round == round; }
};

struct State {
    dim3 grid, block;
    unsigned block_index = 0, thread = 0;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Meeting> warps;
    Meeting whole;
    std::vector<uint64_t> exchanged;  // a number of every thread
    void (*body)(void*) = nullptr;
    void* arguments = nullptr;
    int order = 0;  // in which threads take turns: 0 as numbered, 1 backwards, 2 mixed
    uint64_t launches = 0;
#if defined(__SANITIZE_ADDRESS__)
    ucontext_t scheduler;
    void* shadow = nullptr;
    const void* scheduler_stack = nullptr;
    size_t scheduler_bytes = 0;
#else
    jmp_buf scheduler;
#endif
};
inline State state;
inline std::mutex one_at_a_time;  // of kernels

#if defined(__SANITIZE_ADDRESS__)
inline void begin_fiber() {
    __sanitizer_finish_switch_fiber(nullptr, &state.scheduler_stack, &state.scheduler_bytes);
}
inline void end_fiber() {
    __sanitizer_start_switch_fiber(nullptr, state.scheduler_stack, state.scheduler_bytes);
    setcontext(&state.scheduler);
}
inline void give_way() {
    Fiber& fiber = *state.fibers[state.thread];
    __sanitizer_start_switch_fiber(&fiber.shadow, state.scheduler_stack, state.scheduler_bytes);
    swapcontext(&fiber.context, &state.scheduler);
    __sanitizer_finish_switch_fiber(fiber.shadow, nullptr, nullptr);
}
inline void resume(Fiber& fiber) {
    __sanitizer_start_switch_fiber(&state.shadow, fiber.stack.get(), kStackBytes);
    ucontext_t* next = fiber.is_running ? &fiber.context : &fiber.start;
    fiber.is_running = true;
    swapcontext(&state.scheduler, next);
    __sanitizer_finish_switch_fiber(state.shadow, nullptr, nullptr);
}
#else
inline void begin_fiber() {}
inline void end_fiber() {
    _longjmp(state.scheduler, 1);
}
inline void give_way() {
    if (_setjmp(state.fibers[state.thread]->context) == 0) _longjmp(state.scheduler, 1);
}
inline void resume(Fiber& fiber) {
    if (_setjmp(state.scheduler) != 0) return;
    if (fiber.is_running) _longjmp(fiber.context, 1);
    fiber.is_running = true;
    setcontext(&fiber.start);
}
#endif

inline void enter_fiber() {
    begin_fiber();
    state.body(state.arguments);
    state.fibers[state.thread]->is_done = true;
    end_fiber();
}

inline void meet(Meeting& meeting, const void* kind) {
    if (meeting.arrived == 0) meeting.kind = kind;
    if (meeting.kind != kind) stop("threads wait for each other at different places");
    if (++meeting.arrived == meeting.members) {
        meeting.arrived = 0;
        ++meeting.round;
        return;
    }
    Fiber& fiber = *state.fibers[state.thread];
    fiber.awaited = &meeting;
    fiber.round = meeting.round;
    give_way();
}

inline Meeting& own_warp() {
    return state.warps[state.thread / kLanes];
}

inline unsigned own_lane() {
    return state.thread % kLanes;
}

template <typename T>
T exchange(T mine, unsigned lane, const void* kind) {
    static_assert(sizeof(T) <= 8, "a number");
    Meeting& warp = own_warp();
    if (warp.members != kLanes) stop("an exchange without all lanes of the warp");
    std::memcpy(&state.exchanged[state.thread], &mine, sizeof(T));
    meet(warp, kind);
    T other;
    std::memcpy(&other, &state.exchanged[state.thread / kLanes * kLanes + lane], sizeof(T));
    meet(warp, kind);
    return other;
}

inline void run_fiber(unsigned thread) {
    Fiber& fiber = *state.fibers[thread];
    state.thread = thread;
    resume(fiber);
    if (!fiber.is_done) return;
    // Who ends no longer takes part; others that wait for it would do so for ever.
    Meeting& warp = state.warps[thread / kLanes];
    if (warp.arrived > 0) stop("a lane ended while others of its warp wait for it");
    if (state.whole.arrived > 0) stop("a thread ended while others of its block wait for it");
    --warp.members;
    --state.whole.members;
}

inline void run_block(unsigned threads) {
    state.warps.assign((threads + kLanes - 1) / kLanes, {});
    for (unsigned t = 0; t < threads; ++t) ++state.warps[t / kLanes].members;
    state.whole = {};
    state.whole.members = threads;
    state.exchanged.assign(threads, 0);
    while (state.fibers.size() < threads) state.fibers.emplace_back(new Fiber);
    std::vector<unsigned> turns(threads);
    for (unsigned t = 0; t < threads; ++t) {
        // 7 shares no factor with a power of two
        turns[t] = state.order == 0 ? t : state.order == 1 ? threads - 1 - t : (t * 7 + 3) % threads;
        Fiber& fiber = *state.fibers[t];
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = kStackBytes;
        fiber.start.uc_link = nullptr;
        fiber.is_running = fiber.is_done = false;
        fiber.awaited = nullptr;
        makecontext(&fiber.start, enter_fiber, 0);
    }
    for (bool has_work = true; has_work;) {
        has_work = false;
        for (const unsigned t : turns) {
            if (state.fibers[t]->is_done || state.fibers[t]->waits()) continue;
            has_work = true;
            run_fiber(t);
        }
    }
    if (state.whole.members != 0) stop("threads wait for each other for ever");
}

template <typename... Parameters, size_t... kIndex>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** pointers, std::index_sequence<kIndex...>) {
    const std::lock_guard<std::mutex> guard(one_at_a_time);
    auto call = [&] { kernel(*static_cast<Parameters*>(pointers[kIndex])...); };
    state.body = [](void* callable) { (*static_cast<decltype(call)*>(callable))(); };
    state.arguments = &call;
    state.grid = grid;
    state.block = block;
    ++state.launches;
    for (state.block_index = 0; state.block_index < grid.x; ++state.block_index) run_block(block.x);
    return 0;
}

struct Index {
    unsigned x;
};

}  // namespace emulated

#define threadIdx (emulated::Index{emulated::state.thread})
#define blockIdx (emulated::Index{emulated::state.block_index})
#define gridDim (emulated::state.grid)
#define blockDim (emulated::state.block)

inline void __syncthreads() {
    static const char kind = 0;
    emulated::meet(emulated::state.whole, &kind);
}
inline void __syncwarp() {
    static const char kind = 0;
    if (emulated::own_warp().members != emulated::kLanes) emulated::stop("a warp's barrier without all of its lanes");
    emulated::meet(emulated::own_warp(), &kind);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T mine, int lanes) {
    static const char kind = 0;
    if (mask != 0xffffffffu) emulated::stop("an exchange of some lanes is not emulated");
    return emulated::exchange(mine, emulated::own_lane() ^ static_cast<unsigned>(lanes), &kind);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T mine, unsigned lanes) {
    static const char kind = 0;
    if (mask != 0xffffffffu) emulated::stop("an exchange of some lanes is not emulated");
    const unsigned lane = emulated::own_lane();
    return emulated::exchange(mine, lane < lanes ? lane : lane - lanes, &kind);
}
template <typename T>
T __shfl_sync(unsigned mask, T mine, int lane) {
    static const char kind = 0;
    if (mask != 0xffffffffu) emulated::stop("an exchange of some lanes is not emulated");
    return emulated::exchange(mine, static_cast<unsigned>(lane), &kind);
}
inline unsigned __match_any_sync(unsigned mask, int mine) {
    static const char kind = 0;
    if (mask != 0xffffffffu) emulated::stop("an exchange of some lanes is not emulated");
    emulated::exchange(mine, 0, &kind);
    unsigned peers = 0;
    for (unsigned lane = 0; lane < emulated::kLanes; ++lane) {
        int other;
        std::memcpy(&other, &emulated::state.exchanged[emulated::state.thread / 32 * 32 + lane], sizeof(other));
        peers |= (other == mine ? 1u : 0u) << lane;
    }
    emulated::meet(emulated::own_warp(), &kind);
    return peers;
}
template <typename T>
T __ldg(const T* from) {
    return *from;
}
inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}
inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
template <typename T>
T atomicAdd(T* to, T x) {
    const T before = *to;
    *to = before + x;
    return before;
}
using std::exp;
using std::fma;
using std::fmax;

using cudaStream_t = void*;
using cudaError_t = int;
constexpr int cudaSuccess = 0, cudaDevAttrMultiProcessorCount = 16;

namespace emulated {
inline int processors = 132;
}

inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    return device == 0 ? cudaSuccess : 101;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
    *value = emulated::processors;
    return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t code) {
    return code == 0 ? "no error" : code == 1 ? "invalid argument" : code == 101 ? "invalid device" : "an error";
}
inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t count, cudaStream_t) {
    std::memset(to, byte, count);
    return cudaSuccess;
}
template <typename... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** pointers, size_t,
                             cudaStream_t) {
    return emulated::launch(kernel, grid, block, pointers, std::index_sequence_for<Parameters...>());
}

#endif
