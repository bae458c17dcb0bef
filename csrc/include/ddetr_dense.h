/* The dense layers of an inference run on the CPU, part of libddetr_cpu: convolutions, linear layers, norms.
 *
 * The rules of ddetr.h hold: no PyTorch, no allocation, no printing, no globals. Why they exist beside PyTorch's:
 * they write into buffers that the caller keeps, so that no page is faulted in twice, and fuse what lies between two
 * matrix products. Results depend neither on the number of threads nor on neighbouring rows.
 *
 * Maps are (height, width, channels), channels innermost; steps between lines and pixels are free, in elements. The
 * elements are float or bfloat16, by the engine; sums, biases, norms and statistics are float.
 */
#ifndef DDETR_DENSE_H
#define DDETR_DENSE_H

#include "ddetr.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What multiplies: element type and instructions. */
#define DDETR_ENGINE_F32_AVX2 0
#define DDETR_ENGINE_F32_AVX512 1
#define DDETR_ENGINE_BF16_AVX512 2 /* AVX512_BF16 */
#define DDETR_ENGINE_BF16_AMX 3    /* AMX_BF16 */
/* AMX_BF16 on floats split into three bfloat16: as exact as the others, but an infinite number gives NaN */
#define DDETR_ENGINE_F32_AMX 4

/* What an engine asks of its callers. */
typedef struct ddetr_engine_form {
    int64_t panel;      /* columns of a panel of packed weights */
    int64_t pair;       /* weights of that many consecutive rows lie side by side: [rows/pair][panel][pair] */
    int64_t depth_step; /* depths are multiples of it */
    int64_t block_rows; /* rows that the transformer's layers handle at once */
    int64_t element_bytes;
    int64_t
        weight_bytes; /* 6: three bfloat16 instead of a float, [rows/depth_step][part][depth_step/pair][panel][pair],
                         each part the digits that the ones before it have left, cut off and not rounded */
} ddetr_engine_form;

/* How the work is spread: items are taken one by one by `threads` calls under parallel_for (null: the caller's own
 * thread). Each call has a slot of scratch. */
typedef struct ddetr_crew {
    int32_t engine;
    int32_t threads;
    ddetr_parallel_for parallel_for;
    void* scratch;         /* threads * scratch_bytes, 64-byte aligned */
    int64_t scratch_bytes; /* of one slot; products are faster with enough of it, the rest needs it */
} ddetr_crew;

/* A matrix product over windows of a map: a convolution, or a linear layer (one line, one tap).
 * output[y, x, n] = act(bias[n] + added[y, x, n] + sum over taps (i, j) and k < depth of
 *                       input[y * input_line + x * input_pixel + i * tap_line + j * tap_pixel + k] * weight
 *                       + sum over k < second_depth of
 *                       second[y * second_line + x * second_pixel + k] * weight) */
typedef struct ddetr_product {
    int64_t lines, width; /* of the output */
    int64_t taps_y, taps_x, depth;
    int64_t input_line, input_pixel, tap_line, tap_pixel;
    int64_t columns;
    int64_t output_line, output_pixel, added_line, added_pixel;
    int64_t group,
        output_group; /* column n goes to n / group * output_group + n % group; group: panels, or columns */
    int32_t relu;
    int32_t output_is_float; /* whatever the engine's elements are */
    const void* input;
    const void* packed; /* ceil(columns / panel) panels of [taps_y][taps_x][depth] and then [second_depth] rows, zeros
                           beyond the last column */
    const float* bias;
    const void* added; /* engine's elements; null for none; may be the output itself */
    void* output;
    const void* second;                              /* another input, of one tap; not the output */
    int64_t second_line, second_pixel, second_depth; /* depth 0: there is none */
} ddetr_product;

/* The start of an encoder layer: value = x W_v + b_v and projected = (x + position) W_p + b_p for every row. The
 * position of a pixel is its line's half vector beside its column's. */
typedef struct ddetr_attention_inputs {
    int64_t levels;
    const int64_t* level_hw;                              /* sum(height * width) rows */
    int64_t channels;                                     /* a multiple of 2 * depth_step */
    int64_t value_group, value_output_group, value_pixel; /* as in ddetr_product */
    int64_t projected_columns;
    const void* x;
    const float* line_positions;   /* (sum of heights, channels / 2) */
    const float* column_positions; /* (sum of widths, channels / 2) */
    const void* packed_value;
    const float* value_bias;
    const void* packed_projection;
    const float* projection_bias;
    void* value;      /* elements */
    float* projected; /* (rows, projected_columns) */
} ddetr_attention_inputs;

/* The rest of a transformer layer: y = norm1(x + sampled W_o + b_o); output = norm2(y + relu(y W_1 + b_1) W_2 + b_2).
 */
typedef struct ddetr_feed_forward {
    int64_t rows, channels, hidden;
    float epsilon;
    int32_t is_float;    /* x and output are, whatever the engine's elements */
    const void* sampled; /* (rows, channels) elements */
    const void* x;       /* (rows, channels), as output */
    void* output;        /* may be x */
    const void *packed_output, *packed_1, *packed_2;
    const float *output_bias, *bias_1, *bias_2;
    const float *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;
} ddetr_feed_forward;

/* Normalises (rows, channels) floats over rows and the channels of each group; writes elements, or floats. */
typedef struct ddetr_group_norm {
    int64_t rows, channels, groups;
    float epsilon;
    const float* input;
    const float *weight, *bias;
    void* output;
} ddetr_group_norm;

/* The best engine here for a storage type (DDETR_DTYPE_F32 or BF16) with instructions up to `isa`, or
 * DDETR_ERROR_ISA. AMX is only among DDETR_ISA_BEST; where it is the one, the system is asked for its use. */
DDETR_API int32_t ddetr_dense_engine(int32_t dtype, int32_t isa);

/* Whether that engine for bfloat16 multiplies faster than the one for float: 1 or 0. AMX does; AVX512_BF16 does at
 * twice the rate on AMD's processors, but at half of it on Intel's, which issue one such instruction in two cycles.
 */
DDETR_API int32_t ddetr_dense_gains_by_bf16(int32_t isa);

DDETR_API int32_t ddetr_dense_engine_form(int32_t engine, ddetr_engine_form* form);

DDETR_API int32_t ddetr_dense_product(const ddetr_product* product, const ddetr_crew* crew);

/* Bytes of scratch per thread for the layers of one transformer, and for group norms of as many channels. */
DDETR_API int64_t ddetr_dense_scratch_bytes(int32_t engine, int64_t channels, int64_t hidden);

DDETR_API int32_t ddetr_dense_attention_inputs(const ddetr_attention_inputs* layer, const ddetr_crew* crew);
DDETR_API int32_t ddetr_dense_feed_forward(const ddetr_feed_forward* layer, const ddetr_crew* crew);

/* partials: ceil(rows / 64) * channels * 2 floats of working memory. */
DDETR_API int32_t ddetr_dense_group_norm(const ddetr_group_norm* norm, float* partials, const ddetr_crew* crew);

/* Pixels (3, height, width) float to a map of 4 channels, the fourth zero. */
DDETR_API int32_t ddetr_dense_pixels(const float* pixels, int64_t height, int64_t width, void* output,
                                     int64_t output_line, const ddetr_crew* crew);

/* 3x3 maximum with stride 2 of a map that is nowhere negative and has a border of zeros around its first pixel. */
DDETR_API int32_t ddetr_dense_max_pool(const void* input, int64_t input_line, int64_t lines, int64_t width,
                                       int64_t channels, void* output, int64_t output_line, const ddetr_crew* crew);

#ifdef __cplusplus
}
#endif

#endif
