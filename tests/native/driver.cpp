// Drives the C ABI of libddetr_cpu without Python, to be built with sanitizers (test_c_abi.py does).
//
// Every buffer is its own heap block of exactly the needed size, so that AddressSanitizer sees the first byte too
// many. Results are compared with a naive sum in double. Threads are std::thread over ranges of rows: ThreadSanitizer
// then sees every pair of accesses, which it does not inside an OpenMP runtime.
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "ddetr.h"

namespace {

int failures = 0;

void expect(bool is_true, const char* what) {
    if (!is_true) {
        std::fprintf(stderr, "FAILED: %s\n", what);
        ++failures;
    }
}

struct Problem {
    ddetr_msda_dims dims;
    std::vector<int64_t> level_hw;
    std::unique_ptr<float[]> value, xy, weights, grad_output;
    int64_t values, samples, outputs;

    Problem(int64_t batch, int64_t heads, int64_t channels, int64_t queries, int64_t points,
            std::vector<int64_t> levels, float low, float high)
        : dims{batch, 0, heads, channels, queries, static_cast<int64_t>(levels.size() / 2), points},
          level_hw(std::move(levels)) {
        for (size_t i = 0; i < level_hw.size(); i += 2) dims.positions += level_hw[i] * level_hw[i + 1];
        values = batch * dims.positions * heads * channels;
        samples = batch * queries * heads * dims.levels * points;
        outputs = batch * queries * heads * channels;
        std::mt19937 random(7);
        std::uniform_real_distribution<float> number(-1, 1), place(low, high);
        const auto fill = [&](int64_t size, auto& distribution) {
            std::unique_ptr<float[]> buffer(new float[size]);
            for (int64_t i = 0; i < size; ++i) buffer[i] = distribution(random);
            return buffer;
        };
        value = fill(values, number);
        xy = fill(2 * samples, place);
        weights = fill(samples, number);
        grad_output = fill(outputs, number);
    }
};

struct Results {
    std::vector<float> output, grad_value, grad_xy, grad_weights;
};

// One sample by the definition, in double: calls visit(position, bilinear weight) for each neighbour in the map.
void neighbours(const Problem& p, int64_t level, float x_unit, float y_unit,
                const std::function<void(int64_t, double)>& visit) {
    const int64_t height = p.level_hw[2 * level], width = p.level_hw[2 * level + 1];
    const double x = static_cast<double>(x_unit) * width - 0.5, y = static_cast<double>(y_unit) * height - 0.5;
    if (!(x > -1 && y > -1 && x < width && y < height)) return;
    int64_t start = 0;
    for (int64_t i = 0; i < level; ++i) start += p.level_hw[2 * i] * p.level_hw[2 * i + 1];
    for (int64_t line = 0; line < height; ++line) {
        for (int64_t column = 0; column < width; ++column) {
            const double by_x = 1 - std::fabs(x - column), by_y = 1 - std::fabs(y - line);
            if (by_x > 0 && by_y > 0) visit(start + line * width + column, by_x * by_y);
        }
    }
}

Results run(const Problem& p, int32_t isa, int threads) {
    Results r;
    r.output.assign(p.outputs, NAN);
    r.grad_value.assign(p.values, NAN);
    r.grad_xy.assign(2 * p.samples, NAN);
    r.grad_weights.assign(p.samples, NAN);
    const auto in_threads = [&](int64_t rows, const std::function<int32_t(int64_t, int64_t)>& work) {
        std::vector<std::thread> pool;
        for (int i = 0; i < threads; ++i) {
            pool.emplace_back([&, i] {
                expect(work(rows * i / threads, rows * (i + 1) / threads) == DDETR_OK, "a range of rows returns 0");
            });
        }
        for (std::thread& thread : pool) thread.join();
    };
    in_threads(p.dims.batch * p.dims.heads * p.dims.queries, [&](int64_t begin, int64_t end) {
        return ddetr_msda_forward_cpu(&p.dims, DDETR_DTYPE_F32, p.level_hw.data(), p.value.get(), p.xy.get(),
                                      p.weights.get(), r.output.data(), begin, end, isa, nullptr);
    });
    in_threads(p.dims.batch * p.dims.heads, [&](int64_t begin, int64_t end) {
        return ddetr_msda_backward_cpu(&p.dims, DDETR_DTYPE_F32, p.level_hw.data(), p.grad_output.get(),
                                       p.value.get(), p.xy.get(), p.weights.get(), r.grad_value.data(),
                                       r.grad_xy.data(), r.grad_weights.data(), begin, end, isa, nullptr);
    });
    return r;
}

void compare_with_definition(const Problem& p, const Results& r) {
    const int64_t heads = p.dims.heads, channels = p.dims.channels, points = p.dims.levels * p.dims.points;
    std::vector<double> grad_value(p.values, 0.0);
    double worst = 0;
    for (int64_t row = 0; row < p.dims.batch * p.dims.queries * heads; ++row) {
        const int64_t m = row % heads, b = row / heads / p.dims.queries;
        std::vector<double> output(channels, 0.0);
        for (int64_t i = 0; i < points; ++i) {
            const int64_t sample = row * points + i;
            double by_weight = 0;
            neighbours(p, i / p.dims.points, p.xy[2 * sample], p.xy[2 * sample + 1], [&](int64_t s, double bilinear) {
                const int64_t first = ((b * p.dims.positions + s) * heads + m) * channels;
                for (int64_t c = 0; c < channels; ++c) {
                    const double grad = p.grad_output[row * channels + c];
                    output[c] += bilinear * p.weights[sample] * p.value[first + c];
                    grad_value[first + c] += bilinear * p.weights[sample] * grad;
                    by_weight += bilinear * grad * p.value[first + c];
                }
            });
            worst = std::fmax(worst, std::fabs(by_weight - r.grad_weights[sample]));
            expect(std::isfinite(r.grad_xy[2 * sample]) && std::isfinite(r.grad_xy[2 * sample + 1]),
                   "gradients of locations are written and finite");
        }
        for (int64_t c = 0; c < channels; ++c) {
            worst = std::fmax(worst, std::fabs(output[c] - r.output[row * channels + c]));
        }
    }
    for (int64_t i = 0; i < p.values; ++i) worst = std::fmax(worst, std::fabs(grad_value[i] - r.grad_value[i]));
    expect(worst < 1e-4, "results equal the definition");  // sums of some hundred float products; NaN fails too
}

void check_sizes(int32_t isa) {
    for (const int64_t channels : {1, 7, 16, 17, 32, 33, 40}) {
        for (const float margin : {0.0f, 0.6f}) {
            const Problem p(2, 3, channels, 5, 4, {4, 6, 1, 1, 3, 1}, -margin, 1 + margin);
            const Results one = run(p, isa, 1), many = run(p, isa, 4);
            compare_with_definition(p, one);
            expect(one.output == many.output && one.grad_value == many.grad_value && one.grad_xy == many.grad_xy &&
                       one.grad_weights == many.grad_weights,
                   "four threads give bitwise what one gives");
        }
    }
    const Problem blocks(1, 2, 16, 3, 50, {4, 6, 2, 2}, -0.2f, 1.2f);  // more points than are located at once
    compare_with_definition(blocks, run(blocks, isa, 2));
    for (const Problem& empty : {Problem(0, 2, 8, 3, 4, {2, 2}, 0, 1), Problem(2, 2, 8, 0, 4, {2, 2}, 0, 1),
                                 Problem(2, 2, 8, 3, 0, {2, 2}, 0, 1), Problem(2, 2, 8, 3, 4, {}, 0, 1),
                                 Problem(2, 0, 8, 3, 4, {2, 2}, 0, 1), Problem(2, 2, 0, 3, 4, {2, 2}, 0, 1)}) {
        compare_with_definition(empty, run(empty, isa, 2));
    }
}

void check_odd_numbers(int32_t isa) {
    const float inf = std::numeric_limits<float>::infinity();
    const float odd[] = {NAN, inf, -inf, 3e38f, -3e38f, 1e9f, -1e30f, 0, 1, -0.5f / 6, 1 + 0.5f / 6, 1e-45f};
    Problem p(1, 1, 9, 12, 1, {4, 6}, 0.5f, 0.5f);
    for (int i = 0; i < 12; ++i) p.xy[2 * i] = odd[i];
    Results r = run(p, isa, 1);
    compare_with_definition(p, r);
    for (int i = 0; i < 7; ++i) {
        expect(r.grad_xy[2 * i] == 0 && r.grad_xy[2 * i + 1] == 0 && r.grad_weights[i] == 0,
               "a location that is no place gets no gradient");
        for (int c = 0; c < 9; ++c)
            expect(r.output[9 * i + c] == 0, "a location that is no place contributes nothing");
    }
    for (int i = 0; i < 12; ++i) p.xy[2 * i + 1] = odd[11 - i];
    compare_with_definition(p, run(p, isa, 1));
}

// All 65536 numbers of a 16-bit type pass through a kernel unchanged (a NaN stays one), and floats in between round.
void check_16_bits(int32_t isa, int32_t dtype) {
    const int64_t channels = 65536;
    const ddetr_msda_dims dims = {1, 1, 1, channels, 1, 1, 1};
    const int64_t level_hw[] = {1, 1};
    std::vector<uint16_t> value(channels), output(channels);
    for (int64_t i = 0; i < channels; ++i) value[i] = static_cast<uint16_t>(i);
    const float xy[] = {0.5f, 0.5f}, weight = 1.0f;
    expect(ddetr_msda_forward_cpu(&dims, dtype, level_hw, value.data(), xy, &weight, output.data(), 0, 1, isa,
                                  nullptr) == DDETR_OK,
           "16-bit forward returns 0");
    const uint16_t infinity = dtype == DDETR_DTYPE_F16 ? 0x7c00 : 0x7f80;
    for (int64_t i = 0; i < channels; ++i) {
        const bool is_nan = (value[i] & 0x7fff) > infinity;
        // 0 + 1 * -0 is +0
        const bool is_zero = (value[i] & 0x7fff) == 0;
        const bool is_same = is_nan    ? (output[i] & 0x7fff) > infinity
                             : is_zero ? (output[i] & 0x7fff) == 0
                                       : output[i] == value[i];
        expect(is_same, "a 16-bit number passes unchanged");
    }
    // 1 + 2^-11 lies between two halves, 1 + 2^-8 between two bfloat16: ties go to even, more than half goes up
    const float step = dtype == DDETR_DTYPE_F16 ? 0x1p-10f : 0x1p-7f;
    const uint16_t one = dtype == DDETR_DTYPE_F16 ? 0x3c00 : 0x3f80;
    const ddetr_msda_dims single = {1, 1, 1, 1, 1, 1, 1};
    const struct {
        float weight;
        uint16_t rounded;
    } cases[] = {{1 + step / 2, one},
                 {1 + step * 1.5f, static_cast<uint16_t>(one + 2)},
                 {1 + step * 0.51f, static_cast<uint16_t>(one + 1)},
                 {3e38f * 10, infinity}};
    for (const auto& c : cases) {
        uint16_t result = 0;
        ddetr_msda_forward_cpu(&single, dtype, level_hw, &one, xy, &c.weight, &result, 0, 1, isa, nullptr);
        expect(result == c.rounded, "sums round to nearest even");
    }
}

// More than 2^31 elements: address space without memory behind it, of which only the last row is touched.
void check_large_indices(int32_t isa) {
    const int64_t side = 8192, heads = 8, channels = 16, queries = int64_t{1} << 25;
    const ddetr_msda_dims dims = {1, side * side, heads, channels, queries, 1, 1};
    const int64_t level_hw[] = {side, side};
    const int64_t values = side * side * heads * channels, rows = heads * queries;  // 2^33 and 2^28
    std::vector<std::pair<void*, size_t>> mappings;
    const auto reserve = [&](int64_t bytes) {
        void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) return static_cast<void*>(nullptr);
        mappings.emplace_back(at, bytes);
        return at;
    };
    auto* value = static_cast<float*>(reserve(values * 4));
    auto* output = static_cast<float*>(reserve(rows * channels * 4));  // 2^32 elements
    auto* xy = static_cast<float*>(reserve(rows * 2 * 4));
    auto* weights = static_cast<float*>(reserve(rows * 4));
    if (value == nullptr || output == nullptr || xy == nullptr || weights == nullptr) {
        std::printf("large indices: skipped, no address space\n");
    } else {
        const float last = 1 - 0.5f / side;
        xy[2 * rows - 2] = xy[2 * rows - 1] = last;
        weights[rows - 1] = 2;
        for (int64_t c = 0; c < channels; ++c) value[values - channels + c] = static_cast<float>(c + 1);
        expect(ddetr_msda_forward_cpu(&dims, DDETR_DTYPE_F32, level_hw, value, xy, weights, output, rows - 1, rows,
                                      isa, nullptr) == DDETR_OK,
               "a row beyond 2^31 elements returns 0");
        for (int64_t c = 0; c < channels; ++c) {
            expect(output[(rows - 1) * channels + c] == 2 * static_cast<float>(c + 1), "indices do not wrap at 2^31");
        }
    }
    for (const auto& [at, bytes] : mappings) munmap(at, bytes);
}

void check_refusals() {
    const Problem p(1, 1, 4, 2, 1, {2, 3}, 0, 1);
    float output[8], grad_value[24], grad_xy[4], grad_weights[2];
    const auto forward = [&](ddetr_msda_dims dims, int32_t dtype, std::vector<int64_t> level_hw, int64_t begin,
                             int64_t end, int32_t isa, const void* value) {
        return ddetr_msda_forward_cpu(&dims, dtype, level_hw.data(), value, p.xy.get(), p.weights.get(), output,
                                      begin, end, isa, nullptr);
    };
    const auto changed = [&](int64_t ddetr_msda_dims::* field, int64_t size) {
        ddetr_msda_dims dims = p.dims;
        dims.*field = size;
        return forward(dims, 0, p.level_hw, 0, 0, 0, p.value.get());
    };
    expect(forward(p.dims, 0, p.level_hw, 0, 2, 0, p.value.get()) == DDETR_OK, "a right call returns 0");
    expect(forward(p.dims, 4, p.level_hw, 0, 2, 0, p.value.get()) == DDETR_ERROR_DTYPE, "unknown dtype");
    expect(forward(p.dims, -1, p.level_hw, 0, 2, 0, p.value.get()) == DDETR_ERROR_DTYPE, "negative dtype");
    expect(forward(p.dims, 0, {2, 4}, 0, 2, 0, p.value.get()) == DDETR_ERROR_LEVELS, "a level too large");
    expect(forward(p.dims, 0, {2, 2}, 0, 2, 0, p.value.get()) == DDETR_ERROR_LEVELS, "a level too small");
    expect(forward(p.dims, 0, {-2, -3}, 0, 2, 0, p.value.get()) == DDETR_ERROR_LEVELS, "negative level");
    expect(forward(p.dims, 0, {0, 3}, 0, 2, 0, p.value.get()) == DDETR_ERROR_LEVELS, "empty level");
    expect(forward(p.dims, 0, {INT64_MAX, INT64_MAX}, 0, 2, 0, p.value.get()) == DDETR_ERROR_LEVELS, "vast level");
    expect(forward(p.dims, 0, p.level_hw, 0, 3, 0, p.value.get()) == DDETR_ERROR_ROWS, "too many rows");
    expect(forward(p.dims, 0, p.level_hw, -1, 2, 0, p.value.get()) == DDETR_ERROR_ROWS, "negative row");
    expect(forward(p.dims, 0, p.level_hw, 2, 1, 0, p.value.get()) == DDETR_ERROR_ROWS, "rows backwards");
    expect(forward(p.dims, 0, p.level_hw, 0, 2, 9, p.value.get()) == DDETR_ERROR_ISA, "unknown instruction set");
    expect(forward(p.dims, 0, p.level_hw, 0, 2, 0, nullptr) == DDETR_ERROR_DIMS, "null value");
    expect(ddetr_msda_forward_cpu(nullptr, 0, p.level_hw.data(), p.value.get(), p.xy.get(), p.weights.get(), output,
                                  0, 2, 0, nullptr) == DDETR_ERROR_DIMS,
           "null dims");
    for (const auto field : {&ddetr_msda_dims::batch, &ddetr_msda_dims::heads, &ddetr_msda_dims::channels,
                             &ddetr_msda_dims::queries, &ddetr_msda_dims::points, &ddetr_msda_dims::positions}) {
        expect(changed(field, -1) == DDETR_ERROR_DIMS, "negative size");
        expect(changed(field, INT64_MAX) < 0, "overflowing size");
    }
    const auto refuse = [](int64_t, int64_t, int64_t, ddetr_task, void*) -> int32_t { return 5; };
    expect(ddetr_msda_backward_cpu(&p.dims, 0, p.level_hw.data(), p.grad_output.get(), p.value.get(), p.xy.get(),
                                   p.weights.get(), grad_value, grad_xy, grad_weights, 0, 1, 0,
                                   refuse) == DDETR_ERROR_PARALLEL,
           "a failing parallel_for is passed on");
    expect(ddetr_msda_backward_cpu(&p.dims, 0, p.level_hw.data(), nullptr, p.value.get(), p.xy.get(), p.weights.get(),
                                   grad_value, grad_xy, grad_weights, 0, 1, 0, nullptr) == DDETR_ERROR_DIMS,
           "null gradient");
}

}  // namespace

int main(int argc, char** argv) {
    const bool is_short = argc > 1 && std::strcmp(argv[1], "--no-large") == 0;
    expect(ddetr_abi_version() == DDETR_ABI_VERSION, "library and header agree");
    check_refusals();
    for (const int32_t isa : {DDETR_ISA_PORTABLE, DDETR_ISA_AVX2, DDETR_ISA_AVX512}) {
        if (ddetr_cpu_isa(isa) < 0) continue;
        check_sizes(isa);
        check_odd_numbers(isa);
        check_16_bits(isa, DDETR_DTYPE_F16);
        check_16_bits(isa, DDETR_DTYPE_BF16);
        if (!is_short) check_large_indices(isa);
        std::printf("instruction set %d: done\n", isa);
    }
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
