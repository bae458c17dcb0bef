// Drives the C ABI of libddetr_cpu without Python, to be built with sanitizers
// (test_c_abi.py does).
//
// Every buffer is its own heap block of exactly the needed size, so that
// AddressSanitizer sees the first byte too many. Results are compared with a
// naive sum in double. Threads are std::thread over ranges of rows:
// ThreadSanitizer then sees every pair of accesses, which it does not inside an
// OpenMP runtime.
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

// One sample by the definition, in double: calls visit(position, bilinear
// weight) for each neighbour in the map.
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

// Four threads, whatever the grain.
int32_t parallel_for(int64_t begin, int64_t end, int64_t, ddetr_task task, void* context) {
    std::vector<std::thread> pool;
    for (int64_t i = 0; i < 4; ++i) {
        pool.emplace_back([=] {
            const int64_t first = begin + (end - begin) * i / 4, last = begin + (end - begin) * (i + 1) / 4;
            if (first < last) task(first, last, context);
        });
    }
    for (std::thread& thread : pool) thread.join();
    return 0;
}

std::vector<int64_t> strides_of(const ddetr_msda_dims& dims) {
    return {dims.positions * dims.heads * dims.channels, dims.heads * dims.channels, dims.channels};
}

struct Way {
    int64_t packed_heads;  // that there is scratch for; 0: value is read where it lies
    int64_t bands;
    bool in_threads;
};

Results run(const Problem& p, int32_t isa, const Way& way) {
    Results r;
    r.output.assign(p.outputs, NAN);
    r.grad_value.assign(p.values, NAN);
    r.grad_xy.assign(2 * p.samples, NAN);
    r.grad_weights.assign(p.samples, NAN);
    const ddetr_parallel_for pool = way.in_threads ? parallel_for : nullptr;
    const int64_t row = p.dims.channels * 4, packed = (p.dims.positions + 1) * row, sums = p.dims.positions * row;
    const int64_t forward_bytes = way.packed_heads > 0 ? way.packed_heads * packed : row;
    const int64_t backward_bytes = way.packed_heads > 0 ? way.packed_heads * (packed + sums) + 64 : row;
    const auto strides = strides_of(p.dims);
    std::unique_ptr<char[]> scratch(new char[forward_bytes]);
    expect(
        ddetr_msda_forward_cpu(&p.dims, DDETR_DTYPE_F32, p.level_hw.data(), p.value.get(), strides.data(), p.xy.get(),
                               p.weights.get(), r.output.data(), scratch.get(), forward_bytes, isa, pool) == DDETR_OK,
        "forward returns 0");
    scratch.reset(new char[backward_bytes]);
    expect(ddetr_msda_backward_cpu(&p.dims, DDETR_DTYPE_F32, p.level_hw.data(), p.grad_output.get(), p.value.get(),
                                   strides.data(), p.xy.get(), p.weights.get(), r.grad_value.data(), r.grad_xy.data(),
                                   r.grad_weights.data(), scratch.get(), backward_bytes, way.bands, isa,
                                   pool) == DDETR_OK,
           "backward returns 0");
    return r;
}

// The fused form with offsets that lead to p.xy from the centre of every map,
// in a matrix with a gap after each row.
void check_fused(const Problem& p, int32_t isa, const Way& way) {
    const int64_t samples = p.dims.levels * p.dims.points, all = p.dims.heads * samples, row = 3 * all + 1;
    const int64_t queries = p.dims.batch * p.dims.queries;
    std::unique_ptr<float[]> projected(new float[queries * row - 1]), weights(new float[p.samples]);
    std::vector<float> reference(queries * p.dims.levels * 2, 0.5f);
    for (int64_t q = 0; q < queries; ++q) {
        for (int64_t i = 0; i < all; ++i) {
            const int64_t level = i % samples / p.dims.points;
            for (int64_t c = 0; c < 2; ++c) {
                projected[q * row + 2 * i + c] = (p.xy[2 * (q * all + i) + c] - 0.5f) * p.level_hw[2 * level + 1 - c];
            }
            projected[q * row + 2 * all + i] = 4 * p.weights[q * all + i];
        }
        for (int64_t m = 0; m < p.dims.heads; ++m) {
            double sum = 0;
            for (int64_t i = 0; i < samples; ++i) sum += std::exp(4.0 * p.weights[q * all + m * samples + i]);
            for (int64_t i = 0; i < samples; ++i) {
                const int64_t at = q * all + m * samples + i;
                weights[at] = static_cast<float>(std::exp(4.0 * p.weights[at]) / sum);
            }
        }
    }
    const int64_t bytes =
        way.packed_heads > 0 ? way.packed_heads * (p.dims.positions + 1) * p.dims.channels * 4 : p.dims.channels * 4;
    const auto strides = strides_of(p.dims);
    const int64_t projected_strides[] = {p.dims.queries * row, row};
    std::vector<float> fused(p.outputs, NAN), plain(p.outputs, NAN);
    std::unique_ptr<char[]> scratch(new char[bytes]);
    expect(ddetr_msda_fused_cpu(&p.dims, DDETR_DTYPE_F32, p.level_hw.data(), p.value.get(), strides.data(),
                                projected.get(), projected_strides, reference.data(), 2, fused.data(), scratch.get(),
                                bytes, isa, way.in_threads ? parallel_for : nullptr) == DDETR_OK,
           "fused returns 0");
    expect(
        ddetr_msda_forward_cpu(&p.dims, DDETR_DTYPE_F32, p.level_hw.data(), p.value.get(), strides.data(), p.xy.get(),
                               weights.get(), plain.data(), scratch.get(), bytes, isa, nullptr) == DDETR_OK,
        "forward returns 0");
    double worst = 0;
    for (int64_t i = 0; i < p.outputs; ++i) worst = std::fmax(worst, std::fabs(fused[i] - plain[i]));
    expect(worst < 1e-4, "the fused form equals softmax, locations and forward");
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
    expect(worst < 1e-4,
           "results equal the definition");  // sums of some hundred float
                                             // products; NaN fails too
}

void check_sizes(int32_t isa) {
    for (const int64_t channels : {1, 7, 16, 17, 32, 33, 40}) {
        for (const float margin : {0.0f, 0.6f}) {
            const Problem p(2, 3, channels, 5, 4, {4, 6, 1, 1, 3, 1}, -margin, 1 + margin);
            const Results one = run(p, isa, {3, 1, false});
            compare_with_definition(p, one);
            for (const Way& way : {Way{0, 1, false}, Way{0, 5, true}, Way{1, 3, true}, Way{2, 1, true}}) {
                const Results other = run(p, isa, way);
                expect(one.output == other.output && one.grad_value == other.grad_value &&
                           one.grad_xy == other.grad_xy && one.grad_weights == other.grad_weights,
                       "scratch, bands and threads change no bit");
                check_fused(p, isa, way);
            }
        }
    }
    for (const int64_t points : {8, 50, 300}) {  // whole vectors, a part of one, more than are located at once
        const Problem many(1, 2, 17, 11, points, {4, 6, 2, 2}, -0.2f, 1.2f);
        compare_with_definition(many, run(many, isa, {2, 2, true}));
        if (2 * points <= DDETR_FUSED_MAX_SAMPLES) check_fused(many, isa, {2, 1, true});
    }
    for (const Problem& empty : {Problem(0, 2, 8, 3, 4, {2, 2}, 0, 1), Problem(2, 2, 8, 0, 4, {2, 2}, 0, 1),
                                 Problem(2, 2, 8, 3, 0, {2, 2}, 0, 1), Problem(2, 2, 8, 3, 4, {}, 0, 1),
                                 Problem(2, 0, 8, 3, 4, {2, 2}, 0, 1), Problem(2, 2, 0, 3, 4, {2, 2}, 0, 1)}) {
        compare_with_definition(empty, run(empty, isa, {0, 1, true}));
        compare_with_definition(empty, run(empty, isa, {1, 2, true}));
    }
}

void check_odd_numbers(int32_t isa) {
    const float inf = std::numeric_limits<float>::infinity();
    const float odd[] = {NAN, inf, -inf, 3e38f, -3e38f, 1e9f, -1e30f, 0, 1, -0.5f / 6, 1 + 0.5f / 6, 1e-45f};
    Problem p(1, 1, 9, 12, 1, {4, 6}, 0.5f, 0.5f);
    for (int i = 0; i < 12; ++i) p.xy[2 * i] = odd[i];
    Results r = run(p, isa, {1, 1, false});
    compare_with_definition(p, r);
    for (int i = 0; i < 7; ++i) {
        expect(r.grad_xy[2 * i] == 0 && r.grad_xy[2 * i + 1] == 0 && r.grad_weights[i] == 0,
               "a location that is no place gets no gradient");
        for (int c = 0; c < 9; ++c)
            expect(r.output[9 * i + c] == 0, "a location that is no place contributes nothing");
    }
    for (int i = 0; i < 12; ++i) p.xy[2 * i + 1] = odd[11 - i];
    compare_with_definition(p, run(p, isa, {1, 1, false}));
}

// All 65536 numbers of a 16-bit type pass through a kernel unchanged (a NaN
// stays one), and floats in between round.
void check_16_bits(int32_t isa, int32_t dtype) {
    const int64_t channels = 65536;
    const ddetr_msda_dims dims = {1, 1, 1, channels, 1, 1, 1};
    const int64_t level_hw[] = {1, 1};
    std::vector<uint16_t> value(channels), output(channels);
    for (int64_t i = 0; i < channels; ++i) value[i] = static_cast<uint16_t>(i);
    const float xy[] = {0.5f, 0.5f}, weight = 1.0f;
    std::vector<uint16_t> scratch(channels);
    const int64_t strides[] = {channels, channels, channels};
    expect(ddetr_msda_forward_cpu(&dims, dtype, level_hw, value.data(), strides, xy, &weight, output.data(),
                                  scratch.data(), 2 * channels, isa, nullptr) == DDETR_OK,
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
    // 1 + 2^-11 lies between two halves, 1 + 2^-8 between two bfloat16: ties go
    // to even, more than half goes up
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
        ddetr_msda_forward_cpu(&single, dtype, level_hw, &one, strides, xy, &c.weight, &result, scratch.data(), 2,
                               isa, nullptr);
        expect(result == c.rounded, "sums round to nearest even");
    }
}

// A thread pool that does the last item alone.
int32_t last_only(int64_t, int64_t end, int64_t, ddetr_task task, void* context) {
    task(end - 1, end, context);
    return 0;
}

// More than 2^31 elements: address space without memory behind it, of which
// only the last query is touched.
void check_large_indices(int32_t isa) {
    constexpr int64_t channels = 16;
    const int64_t side = 8192, heads = 8, queries = int64_t{1} << 25;
    const ddetr_msda_dims dims = {1, side * side, heads, channels, queries, 1, 1};
    const int64_t level_hw[] = {side, side};
    const int64_t values = side * side * heads * channels,
                  rows = heads * queries;  // 2^33 and 2^28
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
        float scratch[channels];
        expect(ddetr_msda_forward_cpu(&dims, DDETR_DTYPE_F32, level_hw, value, strides_of(dims).data(), xy, weights,
                                      output, scratch, sizeof(scratch), isa, last_only) == DDETR_OK,
               "a query beyond 2^31 elements returns 0");
        for (int64_t c = 0; c < channels; ++c) {
            expect(output[(rows - 1) * channels + c] == 2 * static_cast<float>(c + 1), "indices do not wrap at 2^31");
        }
    }
    for (const auto& [at, bytes] : mappings) munmap(at, bytes);
}

void check_refusals() {
    const Problem p(1, 1, 4, 2, 1, {2, 3}, 0, 1);
    float output[8], grad_value[24], grad_xy[4], grad_weights[2], scratch[4];
    const auto strides = strides_of(p.dims);
    const auto forward = [&](ddetr_msda_dims dims, int32_t dtype, std::vector<int64_t> level_hw, int32_t isa,
                             const void* value, int64_t scratch_bytes) {
        return ddetr_msda_forward_cpu(&dims, dtype, level_hw.data(), value, strides.data(), p.xy.get(),
                                      p.weights.get(), output, scratch, scratch_bytes, isa, nullptr);
    };
    const auto changed = [&](int64_t ddetr_msda_dims::* field, int64_t size) {
        ddetr_msda_dims dims = p.dims;
        dims.*field = size;
        return forward(dims, 0, p.level_hw, 0, p.value.get(), 16);
    };
    const float* value = p.value.get();
    expect(forward(p.dims, 0, p.level_hw, 0, value, 16) == DDETR_OK, "a right call returns 0");
    expect(forward(p.dims, 4, p.level_hw, 0, value, 16) == DDETR_ERROR_DTYPE, "unknown dtype");
    expect(forward(p.dims, -1, p.level_hw, 0, value, 16) == DDETR_ERROR_DTYPE, "negative dtype");
    expect(forward(p.dims, 0, {2, 4}, 0, value, 16) == DDETR_ERROR_LEVELS, "a level too large");
    expect(forward(p.dims, 0, {2, 2}, 0, value, 16) == DDETR_ERROR_LEVELS, "a level too small");
    expect(forward(p.dims, 0, {-2, -3}, 0, value, 16) == DDETR_ERROR_LEVELS, "negative level");
    expect(forward(p.dims, 0, {0, 3}, 0, value, 16) == DDETR_ERROR_LEVELS, "empty level");
    expect(forward(p.dims, 0, {INT64_MAX, INT64_MAX}, 0, value, 16) == DDETR_ERROR_LEVELS, "vast level");
    expect(forward(p.dims, 0, p.level_hw, 0, value, 15) == DDETR_ERROR_SCRATCH, "no room for a row of zeros");
    expect(forward(p.dims, 0, p.level_hw, 9, value, 16) == DDETR_ERROR_ISA, "unknown instruction set");
    expect(forward(p.dims, 0, p.level_hw, 0, nullptr, 16) == DDETR_ERROR_DIMS, "null value");
    expect(ddetr_msda_forward_cpu(nullptr, 0, p.level_hw.data(), value, strides.data(), p.xy.get(), p.weights.get(),
                                  output, scratch, 16, 0, nullptr) == DDETR_ERROR_DIMS,
           "null dims");
    const auto fused = [&](int64_t points, int32_t numbers) {
        ddetr_msda_dims dims = p.dims;
        dims.points = points;
        const int64_t projected_strides[] = {0, 0};
        return ddetr_msda_fused_cpu(&dims, 0, p.level_hw.data(), value, strides.data(), p.xy.get(), projected_strides,
                                    grad_value, numbers, output, scratch, 16, 0, nullptr);
    };
    expect(fused(1, 3) == DDETR_ERROR_DIMS, "references of three numbers");
    expect(fused(DDETR_FUSED_MAX_SAMPLES + 1, 2) == DDETR_ERROR_DIMS, "more points than the fused form takes");
    for (const auto field : {&ddetr_msda_dims::batch, &ddetr_msda_dims::heads, &ddetr_msda_dims::channels,
                             &ddetr_msda_dims::queries, &ddetr_msda_dims::points, &ddetr_msda_dims::positions}) {
        expect(changed(field, -1) == DDETR_ERROR_DIMS, "negative size");
        expect(changed(field, INT64_MAX) < 0, "overflowing size");
    }
    const auto refuse = [](int64_t, int64_t, int64_t, ddetr_task, void*) -> int32_t { return 5; };
    const auto backward = [&](int32_t dtype, const float* grad, int64_t bands, const std::vector<int64_t>& strides,
                              ddetr_parallel_for parallel_for) {
        return ddetr_msda_backward_cpu(&p.dims, dtype, p.level_hw.data(), grad, value, strides.data(), p.xy.get(),
                                       p.weights.get(), grad_value, grad_xy, grad_weights, scratch, 16, bands, 0,
                                       parallel_for);
    };
    const float* grad = p.grad_output.get();
    expect(backward(0, grad, 1, strides, refuse) == DDETR_ERROR_PARALLEL, "a failing parallel_for is passed on");
    expect(backward(0, nullptr, 1, strides, nullptr) == DDETR_ERROR_DIMS, "null gradient");
    expect(backward(0, grad, 0, strides, nullptr) == DDETR_ERROR_DIMS, "no bands");
    expect(backward(DDETR_DTYPE_BF16, grad, 1, strides, nullptr) == DDETR_ERROR_SCRATCH,
           "16-bit sums need room of their own");
    expect(backward(0, grad, 1, {24, 5, 4}, nullptr) == DDETR_ERROR_SCRATCH, "strided values need room of their own");
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
