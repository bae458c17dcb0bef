// Drives the dense C ABI of libddetr_cpu (ddetr_dense.h) without Python, to be built with sanitizers (test_c_abi.py
// does): every engine of this machine, odd sizes, borders, against sums in double.
//
// Every buffer has exactly the needed size, once as a heap block, where AddressSanitizer sees the first byte too
// many, and once before a page that may not be touched, because it does not see what tile instructions read.
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "ddetr_dense.h"

namespace {

int failures = 0;

void expect(bool is_true, const std::string& what) {
    if (!is_true) {
        std::fprintf(stderr, "FAILED: %s\n", what.c_str());
        ++failures;
    }
}

bool before_guards = false;  // where new buffers lie

class Buffer {
  public:
    explicit Buffer(size_t bytes) {
        if (!before_guards) {
            const size_t whole = bytes % 64 == 0 ? bytes : 0;  // as aligned as it can be
            memory = whole > 0 ? std::aligned_alloc(64, whole) : std::malloc(bytes);
            at = static_cast<char*>(memory);
        } else {
            const size_t page = 4096;
            mapped = (bytes + page - 1) / page * page + page;
            memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            at = static_cast<char*>(memory) + mapped - page - bytes;
            mprotect(static_cast<char*>(memory) + mapped - page, page, PROT_NONE);
        }
        std::memset(at, 0xff, bytes);  // NaN in both types
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() {
        if (mapped > 0) {
            munmap(memory, mapped);
        } else {
            std::free(memory);
        }
    }
    char* get() const { return at; }
    template <typename T>
    T* as() const {
        return reinterpret_cast<T*>(at);
    }

  private:
    void* memory;
    char* at;
    size_t mapped = 0;
};

std::mt19937 random_numbers(7);

// A number that bfloat16 holds exactly.
float random_number() {
    return static_cast<float>(static_cast<int>(random_numbers() % 255) - 127) / 64;
}

uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

int32_t parallel_for(int64_t begin, int64_t end, int64_t, ddetr_task task, void* context) {
    std::vector<std::thread> pool;
    for (int64_t i = begin; i < end; ++i) pool.emplace_back([=] { task(i, i + 1, context); });
    for (std::thread& thread : pool) thread.join();
    return 0;
}

struct Engine {
    int32_t number;
    ddetr_engine_form form;
    std::string name;

    explicit Engine(int32_t engine) : number(engine), name("engine " + std::to_string(engine) + ": ") {
        expect(ddetr_dense_engine_form(engine, &form) == DDETR_OK, name + "has a form");
    }
    bool is_float() const { return form.element_bytes == 4; }
    double tolerance() const { return is_float() ? 1e-5 : 1e-2; }

    double read(const Buffer& from, int64_t i) const {
        return is_float() ? from.as<float>()[i] : from_bits(static_cast<uint32_t>(from.as<uint16_t>()[i]) << 16);
    }
    void write(const Buffer& to, int64_t i, float x) const {
        if (is_float()) {
            to.as<float>()[i] = x;
        } else {
            to.as<uint16_t>()[i] = static_cast<uint16_t>(bits_of(x) >> 16);
        }
    }
    std::unique_ptr<Buffer> elements(int64_t count) const {
        auto buffer = std::make_unique<Buffer>(count * form.element_bytes);
        for (int64_t i = 0; i < count; ++i) write(*buffer, i, random_number());
        return buffer;
    }
    std::unique_ptr<Buffer> nothing(int64_t count) const {
        return std::make_unique<Buffer>(count * form.element_bytes);
    }
};

std::unique_ptr<Buffer> floats(int64_t count) {
    auto buffer = std::make_unique<Buffer>(count * 4);
    for (int64_t i = 0; i < count; ++i) buffer->as<float>()[i] = random_number();
    return buffer;
}

// A layer of weights [depth][columns], and the same packed as the header says.
struct Weights {
    std::vector<float> plain;
    std::unique_ptr<Buffer> packed, bias;
    int64_t depth, columns;

    Weights(const Engine& engine, int64_t depth, int64_t columns) : depth(depth), columns(columns) {
        const ddetr_engine_form& form = engine.form;
        const int64_t panels = (columns + form.panel - 1) / form.panel, all = panels * form.panel * depth;
        for (int64_t i = 0; i < depth * columns; ++i) plain.push_back(random_number() / 8);
        packed = std::make_unique<Buffer>(all * form.weight_bytes);
        bias = floats(panels * form.panel);
        for (int64_t n = 0; n < panels * form.panel; ++n) {
            for (int64_t k = 0; k < depth; ++k) {
                float weight = n < columns ? plain[k * columns + n] : 0;
                // A number that takes all of a float.
                if (form.weight_bytes != 2 && n < columns) {
                    weight = plain[k * columns + n] = weight + 1e-6f * static_cast<float>(n);
                }
                const int64_t panel = n / form.panel * form.panel * depth;
                const auto place = [&](int64_t row) {
                    return (row / form.pair * form.panel + n % form.panel) * form.pair + row % form.pair;
                };
                if (form.weight_bytes != 6) {
                    engine.write(*packed, panel + place(k), weight);
                    continue;
                }
                const int64_t step = form.depth_step * form.panel;
                for (int64_t part = 0; part < 3; ++part) {
                    const int64_t at =
                        3 * panel + (k / form.depth_step * 3 + part) * step + place(k % form.depth_step);
                    packed->as<uint16_t>()[at] = static_cast<uint16_t>(bits_of(weight) >> 16);
                    weight -= from_bits(bits_of(weight) & 0xffff0000u);
                }
            }
        }
    }
    double at(int64_t k, int64_t n) const { return plain[k * columns + n]; }
    double bias_at(int64_t n) const { return bias->as<float>()[n]; }
};

// Largest difference as a share of the largest value.
struct Errors {
    double worst = 0, largest = 0;

    void compare(double found, double wanted) {
        const double error = std::fabs(found - wanted);
        if (worst == worst && !(error <= worst)) worst = error;  // NaN stays
        largest = std::fmax(largest, std::fabs(wanted));
    }
    bool are_below(double tolerance) const { return worst <= tolerance * largest; }
};

ddetr_crew crew_of(const Engine& engine, int32_t threads, const Buffer* scratch, int64_t bytes) {
    return {engine.number, threads, threads > 1 ? parallel_for : nullptr, scratch ? scratch->get() : nullptr, bytes};
}

struct Convolution {
    int64_t lines, width, taps_y, taps_x, stride, dilation, channels, columns;
    bool is_dense;  // lines of the inputs follow each other without a border
    int64_t second_channels = 0, second_stride = 1;
};

void check_product(const Engine& engine, const Convolution& c, bool has_scratch, int32_t threads) {
    const int64_t first_depth = c.taps_y * c.taps_x * c.channels;
    const Weights weights(engine, first_depth + c.second_channels, c.columns);
    const int64_t needed = (c.width - 1) * c.stride + (c.taps_x - 1) * c.dilation + 1;
    ddetr_product p = {};
    p.lines = c.lines, p.width = c.width, p.taps_y = c.taps_y, p.taps_x = c.taps_x;
    p.depth = c.channels, p.columns = c.columns;
    const int64_t line = (needed + (c.is_dense ? 0 : 3)) * c.channels;
    p.input_line = c.stride * line, p.input_pixel = c.stride * c.channels;
    p.tap_line = c.dilation * line, p.tap_pixel = c.dilation * c.channels;
    // to the last pixel that is read, and no further
    const int64_t inputs = ((c.lines - 1) * c.stride + (c.taps_y - 1) * c.dilation) * line + needed * c.channels;
    const auto input = engine.elements(inputs);
    p.second_depth = c.second_channels, p.second_pixel = c.second_stride * c.second_channels;
    const int64_t second_needed = (c.width - 1) * c.second_stride + 1;
    p.second_line = c.second_stride * (second_needed + (c.is_dense ? 0 : 2)) * c.second_channels;
    const auto second = engine.elements((c.lines - 1) * p.second_line + second_needed * c.second_channels);
    const int64_t outputs = c.lines * c.width * c.columns;
    const auto added = engine.elements(outputs);
    const Buffer output(outputs * 4);
    p.output_line = p.added_line = c.width * c.columns, p.output_pixel = p.added_pixel = c.columns;
    p.group = c.columns, p.relu = 1, p.output_is_float = 1;
    p.input = input->get(), p.packed = weights.packed->get(), p.bias = weights.bias->as<float>();
    p.added = added->get(), p.output = output.get();
    if (c.second_channels > 0) p.second = second->get();
    const int64_t bytes = has_scratch ? ddetr_dense_scratch_bytes(engine.number, 256, 1024) : 0;
    const Buffer scratch(threads * bytes + 64);
    const ddetr_crew crew = crew_of(engine, threads, has_scratch ? &scratch : nullptr, bytes);
    expect(ddetr_dense_product(&p, &crew) == DDETR_OK, engine.name + "a product returns 0");
    Errors errors;
    for (int64_t y = 0; y < c.lines; ++y) {
        for (int64_t x = 0; x < c.width; ++x) {
            for (int64_t n = 0; n < c.columns; ++n) {
                const int64_t at = (y * c.width + x) * c.columns + n;
                double sum = weights.bias_at(n) + engine.read(*added, at);
                for (int64_t tap = 0; tap < c.taps_y * c.taps_x; ++tap) {
                    const int64_t first = y * p.input_line + x * p.input_pixel + tap / c.taps_x * p.tap_line +
                                          tap % c.taps_x * p.tap_pixel;
                    for (int64_t k = 0; k < c.channels; ++k) {
                        sum += engine.read(*input, first + k) * weights.at(tap * c.channels + k, n);
                    }
                }
                for (int64_t k = 0; k < c.second_channels; ++k) {
                    sum += engine.read(*second, y * p.second_line + x * p.second_pixel + k) *
                           weights.at(first_depth + k, n);
                }
                errors.compare(output.as<float>()[at], sum > 0 ? sum : 0);
            }
        }
    }
    expect(errors.are_below(1e-5), engine.name + "a product of " + std::to_string(c.lines) + "x" +
                                       std::to_string(c.width) + ", " + std::to_string(c.taps_x) + " taps, with " +
                                       std::to_string(c.second_channels) +
                                       " numbers of a second input, equals the sums");
}

void check_products(const Engine& engine) {
    const Convolution convolutions[] = {
        {1, 1, 1, 1, 1, 1, 32, 1, true},           {1, 70, 1, 1, 1, 1, 96, 33, true},
        {3, 17, 1, 1, 2, 1, 64, 70, false},        {5, 37, 3, 3, 1, 1, 32, 31, false},
        {5, 33, 3, 3, 2, 1, 64, 64, false},        {7, 9, 3, 3, 1, 2, 32, 40, false},
        {2, 49, 7, 1, 2, 1, 32, 33, false},        {1, 1, 3, 3, 1, 1, 160, 32, true},
        {40, 5, 3, 3, 1, 1, 32, 32, false},        {6, 16, 3, 3, 1, 1, 32, 65, true},
        {1, 1, 1, 1, 1, 1, 32, 1, true, 32},       {5, 37, 1, 1, 1, 1, 64, 40, true, 96},
        {5, 37, 1, 1, 1, 1, 32, 33, false, 32},    {7, 21, 1, 1, 1, 1, 64, 65, true, 160, 2},
        {4, 33, 3, 3, 1, 1, 32, 40, false, 64, 2},
    };
    for (const Convolution& c : convolutions) {
        check_product(engine, c, false, 1);
        check_product(engine, c, true, 1);
        check_product(engine, c, true, 3);
    }
}

void normalise(std::vector<double>& row, const float* weight, const float* bias, double epsilon) {
    double mean = 0, squares = 0;
    for (const double x : row) mean += x / row.size();
    for (const double x : row) squares += (x - mean) * (x - mean) / row.size();
    for (size_t c = 0; c < row.size(); ++c)
        row[c] = (row[c] - mean) / std::sqrt(squares + epsilon) * weight[c] + bias[c];
}

std::vector<double> multiply(const std::vector<double>& row, const Weights& weights) {
    std::vector<double> sums(weights.columns);
    for (int64_t n = 0; n < weights.columns; ++n) {
        sums[n] = weights.bias_at(n);
        for (int64_t k = 0; k < weights.depth; ++k) sums[n] += row[k] * weights.at(k, n);
    }
    return sums;
}

std::vector<double> row_of(const Engine& engine, const Buffer& from, int64_t row, int64_t channels) {
    std::vector<double> numbers(channels);
    for (int64_t c = 0; c < channels; ++c) numbers[c] = engine.read(from, row * channels + c);
    return numbers;
}

void check_attention_inputs(const Engine& engine) {
    const int64_t channels = 128, half = 64, projected_columns = 41, levels[] = {9, 14, 3, 5, 1, 1}, rows = 142;
    const auto x = engine.elements(rows * channels), lines = floats(13 * half), columns = floats(20 * half);
    const Weights value(engine, channels, channels), projection(engine, channels, projected_columns);
    const auto value_to = engine.nothing(rows * channels);
    const Buffer projected(rows * projected_columns * 4);
    const int64_t bytes = ddetr_dense_scratch_bytes(engine.number, channels, 0);
    const Buffer scratch(2 * bytes);
    ddetr_attention_inputs layer = {};
    layer.levels = 3, layer.level_hw = levels, layer.channels = channels;
    layer.value_group = 32, layer.value_output_group = rows * 32, layer.value_pixel = 32;
    layer.projected_columns = projected_columns, layer.x = x->get();
    layer.line_positions = lines->as<float>(), layer.column_positions = columns->as<float>();
    layer.packed_value = value.packed->get(), layer.value_bias = value.bias->as<float>();
    layer.packed_projection = projection.packed->get(), layer.projection_bias = projection.bias->as<float>();
    layer.value = value_to->get(), layer.projected = projected.as<float>();
    const ddetr_crew crew = crew_of(engine, 2, &scratch, bytes);
    expect(ddetr_dense_attention_inputs(&layer, &crew) == DDETR_OK, engine.name + "attention inputs return 0");
    Errors values, projections;
    int64_t row = 0, line_start = 0, column_start = 0;
    for (int64_t level = 0; level < 3; ++level) {
        const int64_t height = levels[2 * level], width = levels[2 * level + 1];
        for (int64_t place = 0; place < height * width; ++place, ++row) {
            std::vector<double> input = row_of(engine, *x, row, channels);
            const std::vector<double> wanted = multiply(input, value);
            for (int64_t c = 0; c < channels; ++c) {
                values.compare(engine.read(*value_to, c / 32 * rows * 32 + row * 32 + c % 32), wanted[c]);
            }
            for (int64_t c = 0; c < half; ++c) {
                input[c] += lines->as<float>()[(line_start + place / width) * half + c];
                input[half + c] += columns->as<float>()[(column_start + place % width) * half + c];
            }
            const std::vector<double> offsets = multiply(input, projection);
            for (int64_t n = 0; n < projected_columns; ++n) {
                projections.compare(projected.as<float>()[row * projected_columns + n], offsets[n]);
            }
        }
        line_start += height;
        column_start += width;
    }
    expect(values.are_below(engine.tolerance()), engine.name + "values of a layer");
    expect(projections.are_below(engine.tolerance()), engine.name + "projections of a layer");
}

void check_feed_forward(const Engine& engine, int64_t rows) {
    const int64_t channels = 64, hidden = 96;
    const auto sampled = engine.elements(rows * channels), x = engine.elements(rows * channels);
    const auto output = engine.nothing(rows * channels);
    const Weights out(engine, channels, channels), first(engine, channels, hidden), second(engine, hidden, channels);
    std::unique_ptr<Buffer> norms[4];
    for (auto& norm : norms) norm = floats(channels);
    const int64_t bytes = ddetr_dense_scratch_bytes(engine.number, channels, hidden);
    const Buffer scratch(2 * bytes);
    ddetr_feed_forward layer = {};
    layer.rows = rows, layer.channels = channels, layer.hidden = hidden, layer.epsilon = 1e-5f;
    layer.sampled = sampled->get(), layer.x = x->get(), layer.output = output->get();
    layer.packed_output = out.packed->get(), layer.packed_1 = first.packed->get();
    layer.packed_2 = second.packed->get(), layer.output_bias = out.bias->as<float>();
    layer.bias_1 = first.bias->as<float>(), layer.bias_2 = second.bias->as<float>();
    layer.norm1_weight = norms[0]->as<float>(), layer.norm1_bias = norms[1]->as<float>();
    layer.norm2_weight = norms[2]->as<float>(), layer.norm2_bias = norms[3]->as<float>();
    const ddetr_crew crew = crew_of(engine, 2, &scratch, bytes);
    expect(ddetr_dense_feed_forward(&layer, &crew) == DDETR_OK, engine.name + "feed forward returns 0");
    Errors errors;
    for (int64_t row = 0; row < rows; ++row) {
        std::vector<double> y = multiply(row_of(engine, *sampled, row, channels), out);
        for (int64_t c = 0; c < channels; ++c) y[c] += engine.read(*x, row * channels + c);
        normalise(y, layer.norm1_weight, layer.norm1_bias, 1e-5);
        std::vector<double> inner = multiply(y, first);
        for (double& h : inner) h = h > 0 ? h : 0;
        std::vector<double> sums = multiply(inner, second);
        for (int64_t c = 0; c < channels; ++c) sums[c] += y[c];
        normalise(sums, layer.norm2_weight, layer.norm2_bias, 1e-5);
        for (int64_t c = 0; c < channels; ++c) errors.compare(engine.read(*output, row * channels + c), sums[c]);
    }
    expect(errors.are_below(2 * engine.tolerance()),
           engine.name + "feed forward of " + std::to_string(rows) + " rows");
}

void check_group_norm(const Engine& engine, int64_t rows) {
    const int64_t channels = 64, groups = 8, wide = channels / groups;
    const auto input = floats(rows * channels), weight = floats(channels), bias = floats(channels);
    const auto output = engine.nothing(rows * channels);
    const Buffer partials((rows + 63) / 64 * channels * 2 * 4), scratch(2 * channels * 8);
    const ddetr_group_norm norm = {
        rows, channels, groups, 1e-5f, input->as<float>(), weight->as<float>(), bias->as<float>(), output->get()};
    const ddetr_crew crew = crew_of(engine, 2, &scratch, channels * 8);
    expect(ddetr_dense_group_norm(&norm, partials.as<float>(), &crew) == DDETR_OK, engine.name + "norm returns 0");
    Errors errors;
    for (int64_t group = 0; group < groups; ++group) {
        double mean = 0, squares = 0;
        const auto visit = [&](const std::function<void(int64_t, int64_t)>& of) {
            for (int64_t row = 0; row < rows; ++row) {
                for (int64_t c = group * wide; c < (group + 1) * wide; ++c) of(row * channels + c, c);
            }
        };
        const double count = static_cast<double>(rows * wide);
        visit([&](int64_t i, int64_t) { mean += input->as<float>()[i] / count; });
        visit([&](int64_t i, int64_t) { squares += std::pow(input->as<float>()[i] - mean, 2) / count; });
        visit([&](int64_t i, int64_t c) {
            const double scaled = (input->as<float>()[i] - mean) / std::sqrt(squares + 1e-5);
            errors.compare(engine.read(*output, i), scaled * weight->as<float>()[c] + bias->as<float>()[c]);
        });
    }
    expect(errors.are_below(engine.tolerance()), engine.name + "group norm of " + std::to_string(rows) + " rows");
}

void check_maps(const Engine& engine, int64_t height, int64_t width) {
    const ddetr_crew crew = crew_of(engine, 3, nullptr, 0);
    const auto pixels = floats(3 * height * width);
    const auto fours = engine.nothing(height * width * 4);
    expect(ddetr_dense_pixels(pixels->as<float>(), height, width, fours->get(), width * 4, &crew) == DDETR_OK,
           engine.name + "pixels return 0");
    for (int64_t i = 0; i < height * width; ++i) {
        for (int64_t c = 0; c < 4; ++c) {
            const double wanted = c < 3 ? pixels->as<float>()[c * height * width + i] : 0;
            expect(engine.read(*fours, 4 * i + c) == wanted, engine.name + "pixels are laid out in fours");
        }
    }
    // The map has a border of zeros on the first sides; on the last ones as far as windows reach.
    const int64_t channels = 64, lines = (height + 1) / 2, columns = (width + 1) / 2;
    const int64_t line = (2 * columns + 1) * channels, size = (2 * lines + 1) * line;
    const auto map = engine.elements(size), output = engine.nothing(lines * columns * channels);
    for (int64_t i = 0; i < size; ++i) {
        const int64_t y = i / line - 1, x = i % line / channels - 1;
        const bool is_inside = y >= 0 && x >= 0 && y < height && x < width;
        engine.write(*map, i, is_inside ? static_cast<float>(std::fabs(engine.read(*map, i))) : 0);
    }
    const char* first = map->get() + (line + channels) * engine.form.element_bytes;
    expect(ddetr_dense_max_pool(first, line, lines, columns, channels, output->get(), columns * channels, &crew) ==
               DDETR_OK,
           engine.name + "pooling returns 0");
    for (int64_t i = 0; i < lines * columns * channels; ++i) {
        const int64_t y = i / channels / columns, x = i / channels % columns;
        double best = 0;
        for (int64_t tap = 0; tap < 9; ++tap) {
            const int64_t at = (2 * y + tap / 3) * line + (2 * x + tap % 3) * channels + i % channels;
            best = std::fmax(best, engine.read(*map, at));
        }
        expect(engine.read(*output, i) == best, engine.name + "pooling takes the largest of nine");
    }
}

void check_refusals(const Engine& engine) {
    const ddetr_crew crew = crew_of(engine, 1, nullptr, 0);
    ddetr_product p = {};
    p.taps_y = p.taps_x = p.columns = p.group = 1;
    p.depth = engine.form.depth_step;
    expect(ddetr_dense_product(&p, &crew) == DDETR_OK, engine.name + "an empty product returns 0");
    p.depth = 0;
    expect(ddetr_dense_product(&p, &crew) == DDETR_ERROR_DIMS, engine.name + "no depth");
    p.depth = engine.form.depth_step;
    p.second_depth = -1;
    expect(ddetr_dense_product(&p, &crew) == DDETR_ERROR_DIMS, engine.name + "a second input of negative depth");
    p.second_depth = engine.form.depth_step;
    expect(ddetr_dense_product(&p, &crew) == DDETR_ERROR_DIMS, engine.name + "a second input that is not there");
    p.second_depth = 0;
    p.lines = -1;
    expect(ddetr_dense_product(&p, &crew) == DDETR_ERROR_DIMS, engine.name + "negative lines");
    ddetr_feed_forward layer = {};
    layer.rows = 1, layer.channels = layer.hidden = engine.form.panel;
    expect(ddetr_dense_feed_forward(&layer, &crew) == DDETR_ERROR_DIMS, engine.name + "no scratch");
    ddetr_crew unknown = crew;
    unknown.engine = 99;
    expect(ddetr_dense_product(&p, &unknown) == DDETR_ERROR_ISA, "an unknown engine");
    expect(ddetr_dense_product(&p, nullptr) == DDETR_ERROR_ISA, "no crew");
}

// All engines that the best one of a type stands above.
std::vector<int32_t> engines_here() {
    const std::vector<int32_t> orders[] = {
        {DDETR_ENGINE_F32_AVX2, DDETR_ENGINE_F32_AVX512, DDETR_ENGINE_F32_AMX},
        {DDETR_ENGINE_BF16_AVX512, DDETR_ENGINE_BF16_AMX},
    };
    std::vector<int32_t> found;
    for (int i = 0; i < 2; ++i) {
        const int32_t best = ddetr_dense_engine(i == 0 ? DDETR_DTYPE_F32 : DDETR_DTYPE_BF16, DDETR_ISA_BEST);
        if (best < 0) continue;
        for (const int32_t engine : orders[i]) {
            found.push_back(engine);
            if (engine == best) break;
        }
    }
    return found;
}

}  // namespace

int main() {
    for (const int32_t number_of_engine : engines_here()) {
        const Engine engine(number_of_engine);
        check_refusals(engine);
        for (const bool guarded : {false, true}) {
            before_guards = guarded;
            check_products(engine);
            check_attention_inputs(engine);
            for (const int64_t rows : {1, 16, 17, 47, 131}) check_feed_forward(engine, rows);
            for (const int64_t rows : {1, 64, 130}) check_group_norm(engine, rows);
            check_maps(engine, 1, 1);
            check_maps(engine, 7, 12);
        }
        std::printf("engine %d: done\n", number_of_engine);
    }
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
