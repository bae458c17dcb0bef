// The C ABI of the dense layers: checks, choice of the engine, and how the work is spread over threads.
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>

#include "dense_cpu_kernels.h"

namespace {

const DenseKernels* kernels_of(int32_t engine) {
    switch (engine) {
#ifdef DDETR_HAVE_X86_ISAS
        case DDETR_ENGINE_F32_AVX2:
            return &ddetr_dense_f32_avx2;
        case DDETR_ENGINE_F32_AVX512:
            return &ddetr_dense_f32_avx512;
#ifdef DDETR_HAVE_AMX
        case DDETR_ENGINE_BF16_AVX512:
            return &ddetr_dense_bf16_avx512;
        case DDETR_ENGINE_BF16_AMX:
            return &ddetr_dense_bf16_amx;
        case DDETR_ENGINE_F32_AMX:
            return &ddetr_dense_f32_amx;
#endif
#endif
        default:
            return nullptr;
    }
}

#ifdef DDETR_HAVE_AMX
// Linux lets a process use the tile registers once it has asked.
bool may_use_tiles() {
    const long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

template <typename Layer>
struct Job {
    const DenseKernels* kernels;
    const DenseLayer<Layer>* steps;
    const Layer* layer;
    const ddetr_crew* crew;
    int64_t items;
    bool has_one_slot;
    std::atomic<int64_t> next{0};
};

template <typename Layer>
void run_slots(int64_t begin, int64_t end, void* context) {
    Job<Layer>& job = *static_cast<Job<Layer>*>(context);
    for (int64_t slot = begin; slot < end; ++slot) {
        int64_t item = job.next.fetch_add(1, std::memory_order_relaxed);
        if (item >= job.items) return;
        job.kernels->begin();
        char* scratch = static_cast<char*>(job.crew->scratch);
        if (!job.has_one_slot) scratch += slot * job.crew->scratch_bytes;
        for (; item < job.items; item = job.next.fetch_add(1, std::memory_order_relaxed)) {
            job.steps->run(*job.layer, item, scratch);
        }
        job.kernels->end();
    }
}

template <typename Layer>
int32_t run(const DenseKernels* kernels, const DenseLayer<Layer>& steps, const Layer& layer, const ddetr_crew& crew,
            bool has_one_slot = false) {
    Job<Layer> job = {kernels, &steps, &layer, &crew, steps.items(layer), has_one_slot, {0}};
    if (crew.parallel_for == nullptr || crew.threads < 2) {
        run_slots<Layer>(0, 1, &job);
        return DDETR_OK;
    }
    return crew.parallel_for(0, crew.threads, 1, run_slots<Layer>, &job) == 0 ? DDETR_OK : DDETR_ERROR_PARALLEL;
}

int64_t scratch_of(const DenseKernels& kernels, int64_t channels, int64_t hidden) {
    const ddetr_engine_form& form = kernels.form;
    const int64_t split_bytes = form.weight_bytes > form.element_bytes ? form.weight_bytes : 0;
    return form.block_rows * (channels * (4 + form.element_bytes) + hidden * form.element_bytes +
                              (channels > hidden ? channels : hidden) * split_bytes);
}

const DenseKernels* kernels_for(const ddetr_crew* crew) {
    return crew == nullptr ? nullptr : kernels_of(crew->engine);
}

}  // namespace

int32_t ddetr_dense_engine(int32_t dtype, int32_t isa) {
#ifdef DDETR_HAVE_X86_ISAS
    const int32_t best = ddetr_cpu_isa(isa);
    bool has_tiles = false;
#ifdef DDETR_HAVE_AMX
    if (best == DDETR_ISA_AVX512) {
        has_tiles = isa == DDETR_ISA_BEST && __builtin_cpu_supports("amx-tile") &&
                    __builtin_cpu_supports("amx-bf16") && may_use_tiles();
        if (dtype == DDETR_DTYPE_BF16 && __builtin_cpu_supports("avx512bf16")) {
            return has_tiles ? DDETR_ENGINE_BF16_AMX : DDETR_ENGINE_BF16_AVX512;
        }
    }
#endif
    if (dtype == DDETR_DTYPE_F32 && has_tiles) return DDETR_ENGINE_F32_AMX;
    if (dtype == DDETR_DTYPE_F32 && best == DDETR_ISA_AVX512) return DDETR_ENGINE_F32_AVX512;
    if (dtype == DDETR_DTYPE_F32 && best == DDETR_ISA_AVX2) return DDETR_ENGINE_F32_AVX2;
#endif
    return dtype == DDETR_DTYPE_F32 || dtype == DDETR_DTYPE_BF16 ? DDETR_ERROR_ISA : DDETR_ERROR_DTYPE;
}

int32_t ddetr_dense_gains_by_bf16(int32_t isa) {
#ifdef DDETR_HAVE_AMX
    const int32_t engine = ddetr_dense_engine(DDETR_DTYPE_BF16, isa);
    if (engine == DDETR_ENGINE_BF16_AMX) return 1;
    return engine == DDETR_ENGINE_BF16_AVX512 && !__builtin_cpu_is("intel");
#else
    static_cast<void>(isa);
    return 0;
#endif
}

int32_t ddetr_dense_engine_form(int32_t engine, ddetr_engine_form* form) {
    const DenseKernels* kernels = kernels_of(engine);
    if (kernels == nullptr) return DDETR_ERROR_ISA;
    *form = kernels->form;
    return DDETR_OK;
}

int64_t ddetr_dense_scratch_bytes(int32_t engine, int64_t channels, int64_t hidden) {
    const DenseKernels* kernels = kernels_of(engine);
    return kernels == nullptr ? DDETR_ERROR_ISA : scratch_of(*kernels, channels, hidden);
}

int32_t ddetr_dense_product(const ddetr_product* product, const ddetr_crew* crew) {
    const DenseKernels* kernels = kernels_for(crew);
    if (kernels == nullptr) return DDETR_ERROR_ISA;
    const ddetr_product& p = *product;
    const int64_t step = kernels->form.depth_step, panel = kernels->form.panel;
    if (p.lines < 0 || p.width < 0 || p.taps_y < 1 || p.taps_x < 1 || p.depth < step || p.depth % step != 0 ||
        p.second_depth < 0 || p.second_depth % step != 0 || (p.second_depth > 0 && p.second == nullptr) ||
        p.columns < 1 || p.group < 1 || (p.group < p.columns && p.group % panel != 0)) {
        return DDETR_ERROR_DIMS;
    }
    if (p.lines == 0 || p.width == 0) return DDETR_OK;
    ddetr_crew all = *crew;
    if (all.scratch_bytes < kernels->product_scratch(p)) {
        all.scratch = nullptr;
        all.scratch_bytes = 0;
    }
    return run(kernels, kernels->product, p, all);
}

int32_t ddetr_dense_attention_inputs(const ddetr_attention_inputs* layer, const ddetr_crew* crew) {
    const DenseKernels* kernels = kernels_for(crew);
    if (kernels == nullptr) return DDETR_ERROR_ISA;
    const int64_t panel = kernels->form.panel;
    if (layer->channels < 1 || layer->channels % panel != 0 || layer->value_group % panel != 0 ||
        crew->scratch_bytes < scratch_of(*kernels, layer->channels, 0)) {
        return DDETR_ERROR_DIMS;
    }
    return run(kernels, kernels->attention_inputs, *layer, *crew);
}

int32_t ddetr_dense_feed_forward(const ddetr_feed_forward* layer, const ddetr_crew* crew) {
    const DenseKernels* kernels = kernels_for(crew);
    if (kernels == nullptr) return DDETR_ERROR_ISA;
    const int64_t panel = kernels->form.panel;
    if (layer->channels < 1 || layer->channels % panel != 0 || layer->hidden < 1 || layer->hidden % panel != 0 ||
        crew->scratch_bytes < scratch_of(*kernels, layer->channels, layer->hidden)) {
        return DDETR_ERROR_DIMS;
    }
    return run(kernels, kernels->feed_forward, *layer, *crew);
}

int32_t ddetr_dense_group_norm(const ddetr_group_norm* norm, float* partials, const ddetr_crew* crew) {
    const DenseKernels* kernels = kernels_for(crew);
    if (kernels == nullptr) return DDETR_ERROR_ISA;
    const ddetr_group_norm& n = *norm;
    if (n.rows < 1 || n.groups < 1 || n.channels % n.groups != 0 || n.channels % kernels->form.panel != 0 ||
        crew->scratch_bytes < n.channels * 8) {
        return DDETR_ERROR_DIMS;
    }
    const GroupNormRows job = {n, partials};
    const int32_t status = run(kernels, kernels->group_statistics, job, *crew);
    if (status != DDETR_OK) return status;
    // The first slot of scratch carries what all threads then read.
    float *scale = static_cast<float*>(crew->scratch), *shift = scale + n.channels;
    const int64_t wide = n.channels / n.groups, chunks = kernels->group_statistics.items(job);
    for (int64_t group = 0; group < n.groups; ++group) {
        double mean = 0, squares = 0, seen = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int64_t left = n.rows - chunk * DDETR_STATISTIC_ROWS;
            const double count = static_cast<double>(left < DDETR_STATISTIC_ROWS ? left : DDETR_STATISTIC_ROWS);
            for (int64_t c = group * wide; c < (group + 1) * wide; ++c) {
                const float* at = partials + chunk * n.channels * 2;
                const double distance = at[c] - mean, all = seen + count;
                mean += distance * count / all;
                squares += at[n.channels + c] + distance * distance * seen * count / all;
                seen = all;
            }
        }
        const double inverse = 1 / __builtin_sqrt(squares / seen + static_cast<double>(n.epsilon));
        for (int64_t c = group * wide; c < (group + 1) * wide; ++c) {
            scale[c] = static_cast<float>(inverse * static_cast<double>(n.weight[c]));
            shift[c] = static_cast<float>(static_cast<double>(n.bias[c]) -
                                          mean * inverse * static_cast<double>(n.weight[c]));
        }
    }
    return run(kernels, kernels->group_scale, job, *crew, true);
}

int32_t ddetr_dense_pixels(const float* pixels, int64_t height, int64_t width, void* output, int64_t output_line,
                           const ddetr_crew* crew) {
    const DenseKernels* kernels = kernels_for(crew);
    if (kernels == nullptr) return DDETR_ERROR_ISA;
    return run(kernels, kernels->pixels, PixelRows{pixels, height, width, output, output_line}, *crew);
}

int32_t ddetr_dense_max_pool(const void* input, int64_t input_line, int64_t lines, int64_t width, int64_t channels,
                             void* output, int64_t output_line, const ddetr_crew* crew) {
    const DenseKernels* kernels = kernels_for(crew);
    if (kernels == nullptr) return DDETR_ERROR_ISA;
    if (channels % kernels->form.panel != 0) return DDETR_ERROR_DIMS;
    return run(kernels, kernels->max_pool, PoolRows{input, input_line, lines, width, channels, output, output_line},
               *crew);
}
