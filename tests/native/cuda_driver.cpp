// Drives the C ABI of libddetr_cuda on the emulated GPU without Python, to be built with sanitizers
// (test_cuda_kernels.py does). Every buffer is its own heap block of exactly the needed size, so that
// AddressSanitizer sees the first byte too many that any thread of any kernel touches. Results are compared with a
// naive sum in double.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "ddetr_cuda.h"
#include "msda_cuda_rows.cuh"

extern "C" void emulated_order(int order);

namespace {

int failures = 0;
bool is_first_enough = false;

void expect(bool is_true, const char* what) {
    if (is_true) return;
    std::fprintf(stderr, "FAILED: %s\n", what);
    ++failures;
    if (is_first_enough) std::exit(1);
}

// ---- arithmetic alone ----

void check_order(const std::vector<int64_t>& level_hw) {
    int64_t positions = 0;
    for (size_t i = 0; i < level_hw.size(); i += 2) positions += level_hw[i] * level_hw[i + 1];
    const auto tiles = ddetr::tiles_for(positions, positions, level_hw.size() / 2, level_hw.data());
    expect(tiles.lines > 0, "positions of levels are tiled");
    std::vector<char> is_seen(positions, 0);
    int64_t seen = 0;
    for (int64_t place = 0; place < positions; ++place) {
        const int32_t query = ddetr::query_at(tiles, static_cast<int32_t>(place));
        if (query < 0 || query >= positions || is_seen[query]) continue;
        is_seen[query] = 1;
        ++seen;
    }
    expect(seen == positions, "the order of the queries is a permutation");
}

void check_orders() {
    for (int64_t height = 1; height < 40; height += 3) {
        for (int64_t width = 1; width < 60; width += 4) {
            check_order({height, width});
            check_order({height, width, (height + 1) / 2, (width + 1) / 2, 1, 1});
            check_order({1, 3, height, width, 2 * height, width});  // the first level, which sets the tiles, is small
        }
    }
    check_order({100, 167, 50, 84, 25, 42, 13, 21});
    check_order({1, 16384, 1, 1});
    check_order({16384, 1, 5000, 7});
    const int64_t large[] = {16385, 2}, other[] = {4, 4};
    expect(ddetr::tiles_for(32770, 32770, 1, large).lines == 0, "sides past the limit are not tiled");
    expect(ddetr::tiles_for(300, 16, 1, other).lines == 0, "queries that are no positions are not tiled");
    expect(ddetr::query_at(ddetr::tiles_for(300, 16, 1, other), 123) == 123, "and stay in their order");
}

// How many different tiles of 8 x 8 pixels of the first level the queries of a block lie in: few, or nothing is won.
void check_that_neighbours_stay_together() {
    const std::vector<int64_t> level_hw = {100, 167, 50, 84, 25, 42, 13, 21};
    const auto tiles = ddetr::tiles_for(22223, 22223, 4, level_hw.data());
    int64_t most = 0;
    for (int32_t first = 0; first + 128 <= 22223; first += 128) {
        double low = 1, high = 0;  // of the lines, as shares of the picture
        for (int32_t place = first; place < first + 128; ++place) {
            int32_t query = ddetr::query_at(tiles, place);
            size_t level = 0;
            while (query >= level_hw[2 * level] * level_hw[2 * level + 1]) {
                query -= static_cast<int32_t>(level_hw[2 * level] * level_hw[2 * level + 1]);
                ++level;
            }
            const double y = (query / level_hw[2 * level + 1] + 0.5) / static_cast<double>(level_hw[2 * level]);
            low = std::fmin(low, y);
            high = std::fmax(high, y);
        }
        most += high - low < 2.0 / 13 ? 1 : 0;
    }
    expect(most > 22223 / 128 * 9 / 10, "a block's queries lie in one line of tiles, or at the end of one, in two");
}

void check_quotients() {
    for (int64_t divisor : {1, 2, 3, 4, 5, 7, 8, 15, 255, 256, 1000, 65535}) {
        const ddetr::Divider divider = ddetr::divider_for(divisor);
        bool is_right = true;
        for (int32_t n = 0; n < 65536; ++n) is_right &= divider.quotient(n) == n / divisor;
        expect(is_right, "quotients by multiplication are exact");
    }
}

// ---- kernels ----

struct Case {
    ddetr_msda_dims dims;
    std::vector<int64_t> level_hw;
    std::unique_ptr<float[]> value, xy, weights, grad_output, projected, reference;
    int64_t values, samples, outputs;

    Case(int64_t batch, int64_t heads, int64_t channels, int64_t queries, int64_t points, std::vector<int64_t> levels)
        : dims{batch, 0, heads, channels, queries, static_cast<int64_t>(levels.size() / 2), points},
          level_hw(std::move(levels)) {
        for (size_t i = 0; i < level_hw.size(); i += 2) dims.positions += level_hw[i] * level_hw[i + 1];
        if (queries == 0) dims.queries = dims.positions;
        values = batch * dims.positions * heads * channels;
        samples = batch * dims.queries * heads * dims.levels * points;
        outputs = batch * dims.queries * heads * channels;
        std::mt19937 random(7);
        const auto fill = [&](int64_t size, float low, float high) {
            std::uniform_real_distribution<float> number(low, high);
            std::unique_ptr<float[]> buffer(new float[size]);
            for (int64_t i = 0; i < size; ++i) buffer[i] = number(random);
            return buffer;
        };
        value = fill(values, -1, 1);
        xy = fill(2 * samples, -0.3f, 1.3f);
        weights = fill(samples, -1, 1);
        grad_output = fill(outputs, -1, 1);
        projected = fill(3 * samples, -3, 3);
        reference = fill(batch * dims.queries * dims.levels * 2, 0, 1);
        const float odd[] = {NAN, std::numeric_limits<float>::infinity(), -3e38f, 1e9f};
        for (int i = 0; i < 4 && i < samples; ++i) xy[2 * i] = odd[i];
    }
};

struct Definition {
    std::vector<double> output, grad_value, grad_weights;
};

Definition define(const Case& c, const float* xy, const float* weights) {
    const ddetr_msda_dims& n = c.dims;
    Definition d = {std::vector<double>(c.outputs), std::vector<double>(c.values), std::vector<double>(c.samples)};
    for (int64_t sample = 0; sample < c.samples; ++sample) {
        const int64_t row = sample / (n.levels * n.points), level = sample / n.points % n.levels;
        const int64_t m = row % n.heads, b = row / n.heads / n.queries;
        const int64_t height = c.level_hw[2 * level], width = c.level_hw[2 * level + 1];
        const double x = static_cast<double>(xy[2 * sample]) * width - 0.5;
        const double y = static_cast<double>(xy[2 * sample + 1]) * height - 0.5;
        if (!(x > -1 && y > -1 && x < width && y < height)) continue;
        int64_t start = 0;
        for (int64_t i = 0; i < level; ++i) start += c.level_hw[2 * i] * c.level_hw[2 * i + 1];
        for (int64_t position = 0; position < height * width; ++position) {
            const double by_x = 1 - std::fabs(x - position % width), by_y = 1 - std::fabs(y - position / width);
            if (by_x <= 0 || by_y <= 0) continue;
            for (int64_t k = 0; k < n.channels; ++k) {
                const int64_t at = ((b * n.positions + start + position) * n.heads + m) * n.channels + k;
                const double grad = c.grad_output[row * n.channels + k], factor = by_x * by_y;
                d.output[row * n.channels + k] += factor * weights[sample] * c.value[at];
                d.grad_value[at] += factor * weights[sample] * grad;
                d.grad_weights[sample] += factor * grad * c.value[at];
            }
        }
    }
    return d;
}

void compare(const std::vector<double>& wanted, const float* found, const char* what) {
    double worst = 0;
    for (size_t i = 0; i < wanted.size(); ++i) worst = std::fmax(worst, std::fabs(wanted[i] - found[i]));
    bool is_number = true;
    for (size_t i = 0; i < wanted.size(); ++i) is_number &= std::isfinite(found[i]);
    expect(is_number && worst < 1e-3, what);  // sums of some hundred float products
}

std::unique_ptr<float[]> poisoned(int64_t size) {
    std::unique_ptr<float[]> buffer(new float[size]);
    for (int64_t i = 0; i < size; ++i) buffer[i] = NAN;
    return buffer;
}

// Locations and weights that the fused form computes on the way.
void locate_all(const Case& c, std::vector<float>& xy, std::vector<float>& weights) {
    const ddetr_msda_dims& n = c.dims;
    const int64_t of_row = n.levels * n.points, all = n.heads * of_row;
    for (int64_t sample = 0; sample < c.samples; ++sample) {
        const int64_t q = sample / all, in_query = sample % all, level = in_query % of_row / n.points;
        const float* query = c.projected.get() + q * 3 * all;
        for (int64_t axis = 0; axis < 2; ++axis) {
            const float size = static_cast<float>(c.level_hw[2 * level + 1 - axis]);
            xy[2 * sample + axis] =
                c.reference[(q * n.levels + level) * 2 + axis] + query[2 * in_query + axis] / size;
        }
        double sum = 0;
        const float* logits = query + 2 * all + in_query / of_row * of_row;
        for (int64_t i = 0; i < of_row; ++i) sum += std::exp(static_cast<double>(logits[i]));
        weights[sample] = static_cast<float>(std::exp(static_cast<double>(query[2 * all + in_query])) / sum);
    }
}

// The softmax backward: of every logit, from the gradients of the weights.
std::vector<double> by_logits(const Case& c, const std::vector<float>& weights,
                              const std::vector<double>& by_weights) {
    const int64_t of_row = c.dims.levels * c.dims.points;
    std::vector<double> result(c.samples);
    for (int64_t sample = 0; sample < c.samples; ++sample) {
        double sum = 0;
        for (int64_t i = sample / of_row * of_row; i < (sample / of_row + 1) * of_row; ++i) {
            sum += weights[i] * by_weights[i];
        }
        result[sample] = weights[sample] * (by_weights[sample] - sum);
    }
    return result;
}

// The logits' part of what lies side by side for every query; its offsets must be numbers too.
std::vector<float> logits_of(const Case& c, const float* projected) {
    const int64_t all = c.dims.heads * c.dims.levels * c.dims.points;
    std::vector<float> result(c.samples);
    for (int64_t sample = 0; sample < c.samples; ++sample) {
        const float* query = projected + sample / all * 3 * all;
        const bool has_offsets =
            std::isfinite(query[2 * (sample % all)]) && std::isfinite(query[2 * (sample % all) + 1]);
        result[sample] = has_offsets ? query[2 * all + sample % all] : NAN;
    }
    return result;
}

void check_kernels(const Case& c) {
    const ddetr_msda_dims& n = c.dims;
    const Definition d = define(c, c.xy.get(), c.weights.get());
    std::vector<float> xy(2 * c.samples), weights(c.samples);
    locate_all(c, xy, weights);
    const Definition fused = define(c, xy.data(), weights.data());
    const int64_t strides[] = {n.positions * n.heads * n.channels, n.heads * n.channels, n.channels};
    const int64_t row = 3 * n.heads * n.levels * n.points, projected_strides[] = {n.queries * row, row};
    for (int32_t kernels = DDETR_CUDA_PLAIN; kernels <= DDETR_CUDA_FAST_WARPS; ++kernels) {
        const auto output = poisoned(c.outputs);
        expect(ddetr_msda_forward_cuda(&n, DDETR_DTYPE_F32, c.level_hw.data(), c.value.get(), strides, c.xy.get(),
                                       c.weights.get(), output.get(), kernels, 0, nullptr) == 0,
               "forward returns 0");
        compare(d.output, output.get(), "the output equals the definition");
        expect(
            ddetr_msda_fused_cuda(&n, DDETR_DTYPE_F32, c.level_hw.data(), c.value.get(), strides, c.projected.get(),
                                  projected_strides, c.reference.get(), 2, output.get(), kernels, 0, nullptr) == 0,
            "fused returns 0");
        compare(fused.output, output.get(), "the output of the fused form equals the definition");
        std::unique_ptr<float[]> grad_value(new float[c.values]());
        auto grad_xy = poisoned(2 * c.samples), grad_weights = poisoned(c.samples);
        expect(ddetr_msda_backward_cuda(&n, DDETR_DTYPE_F32, c.level_hw.data(), c.grad_output.get(), c.value.get(),
                                        c.xy.get(), c.weights.get(), grad_value.get(), grad_xy.get(),
                                        grad_weights.get(), kernels, 0, nullptr) == 0,
               "backward returns 0");
        compare(d.grad_value, grad_value.get(), "the gradient of the value equals the definition");
        compare(d.grad_weights, grad_weights.get(), "the gradient of the weights equals the definition");
        grad_value.reset(new float[c.values]());
        const auto grad_projected = poisoned(c.dims.queries * n.batch * row);
        expect(ddetr_msda_fused_backward_cuda(&n, DDETR_DTYPE_F32, c.level_hw.data(), c.grad_output.get(),
                                              c.value.get(), c.projected.get(), projected_strides, c.reference.get(),
                                              2, grad_value.get(), grad_projected.get(), kernels, 0, nullptr) == 0,
               "fused backward returns 0");
        compare(fused.grad_value, grad_value.get(),
                "the gradient of the value of the fused form is the definition's");
        compare(by_logits(c, weights, fused.grad_weights), logits_of(c, grad_projected.get()).data(),
                "the gradient of the logits equals the definition");
        const int64_t bytes = ddetr_msda_backward_sorted_bytes(&n, DDETR_DTYPE_F32, c.level_hw.data());
        std::unique_ptr<char[]> workspace(new char[bytes]);
        grad_value = poisoned(c.values), grad_weights = poisoned(c.samples);
        expect(ddetr_msda_backward_sorted_cuda(&n, DDETR_DTYPE_F32, c.level_hw.data(), c.grad_output.get(),
                                               c.value.get(), c.xy.get(), c.weights.get(), grad_value.get(),
                                               grad_xy.get(), grad_weights.get(), workspace.get(), bytes, kernels, 0,
                                               nullptr) == 0,
               "sorted backward returns 0");
        compare(d.grad_value, grad_value.get(), "the sorted gradient of the value equals the definition");
        compare(d.grad_weights, grad_weights.get(), "the gradient of the weights is written by both");
    }
}

}  // namespace

int main(int argc, char** argv) {
    is_first_enough = argc > 1 && std::strcmp(argv[1], "--first") == 0;
    check_orders();
    check_that_neighbours_stay_together();
    check_quotients();
    for (const int64_t channels : {7, 16, 32, 64}) check_kernels(Case(2, 3, channels, 3, 3, {4, 6, 1, 1, 3, 1}));
    check_kernels(Case(1, 1, 32, 5, 20, {5, 6}));  // more samples than lanes
    emulated_order(1);
    check_kernels(Case(1, 1, 32, 0, 3, {5, 9, 3, 5}));  // a query for every position
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
