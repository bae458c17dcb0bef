// Between the C ABI of the dense layers (dense_cpu.cpp) and their kernels, which are compiled once per engine
// (dense_cpu_kernels.cpp).
#ifndef DDETR_DENSE_CPU_KERNELS_H
#define DDETR_DENSE_CPU_KERNELS_H

#include "ddetr_dense.h"

struct PixelRows {
    const float* pixels;
    int64_t height, width;
    void* output;
    int64_t output_line;
};

struct PoolRows {
    const void* input;
    int64_t input_line, lines, width, channels;
    void* output;
    int64_t output_line;
};

struct GroupNormRows {
    ddetr_group_norm norm;
    float* partials;
};

// A layer's work in items that may run in any order; `slot` is the calling thread's scratch.
template <typename Layer>
struct DenseLayer {
    int64_t (*items)(const Layer& layer);
    void (*run)(const Layer& layer, int64_t item, void* slot);
};

struct DenseKernels {
    ddetr_engine_form form;
    void (*begin)();  // before a thread's first item, and after its last
    void (*end)();
    DenseLayer<ddetr_product> product;
    int64_t (*product_scratch)(const ddetr_product& p);  // bytes of a slot that make it faster
    DenseLayer<ddetr_attention_inputs> attention_inputs;
    DenseLayer<ddetr_feed_forward> feed_forward;
    DenseLayer<GroupNormRows> group_statistics, group_scale;
    DenseLayer<PixelRows> pixels;
    DenseLayer<PoolRows> max_pool;
};

#define DDETR_STATISTIC_ROWS 64

extern const DenseKernels ddetr_dense_f32_avx2, ddetr_dense_f32_avx512, ddetr_dense_bf16_avx512, ddetr_dense_bf16_amx,
    ddetr_dense_f32_amx;

#endif
