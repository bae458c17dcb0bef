/* The whole kernel boundary of ddetr: multi-scale deformable attention
 * (arXiv:2010.04159, eq. 3) as plain C.
 *
 * Two shared libraries implement it: libddetr_cpu and libddetr_cuda. Neither
 * knows PyTorch, allocates, prints, keeps mutable globals or ends the process.
 * src/ddetr_cli/ops/native.py is the only caller in the package; a test
 * compares its table of argument types with the prototypes below, so each
 * stands on one logical line ending in ';'.
 *
 * Shapes (all buffers contiguous, row-major):
 *   value         (batch, positions, heads, channels)            storage type
 *   sampling_xy   (batch, queries, heads, levels, points, 2)     compute type;
 * x then y, [0,1] of each map weights       (batch, queries, heads, levels,
 * points)        compute type output        (batch, queries, heads, channels)
 * storage type level_hw      levels pairs (height, width), host memory;
 * sum(height * width) == positions The compute type is double for double
 * storage, else float; sums are kept in it. Indices are 64-bit: any batch, any
 * size.
 *
 * A location x lies at pixel x * width - 0.5. A point counts where -1 < pixel <
 * size on both axes; any other, infinite or NaN, contributes nothing and gets
 * zero gradients. Neighbours outside the map read as zero and are not touched.
 *
 * Return values: 0, a negative DDETR_ERROR_*, or (CUDA) a positive cudaError_t.
 * Nothing was written for a negative one except DDETR_ERROR_PARALLEL. An empty
 * output, or no points at all, is not an error.
 */
#ifndef DDETR_H
#define DDETR_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DDETR_API __attribute__((visibility("default")))

/* Raised by every change of this file or of ddetr_dense.h that a caller could notice. */
#define DDETR_ABI_VERSION 4

#define DDETR_OK 0
#define DDETR_ERROR_DIMS (-1)    /* a negative size, a size beyond 64-bit indices, or a null pointer */
#define DDETR_ERROR_DTYPE (-2)   /* not one of DDETR_DTYPE_* */
#define DDETR_ERROR_LEVELS (-3)  /* a height or width below 1, or sum(height * width) != positions */
#define DDETR_ERROR_SCRATCH (-4) /* scratch memory missing, or too small for this problem */
#define DDETR_ERROR_ISA (-5)     /* instructions this processor or this build lacks */
#define DDETR_ERROR_PARALLEL                                                                                     \
    (-6)                                 /* the caller's parallel_for reported a failure; outputs are incomplete \
                                          */
#define DDETR_ERROR_TOO_MANY_LEVELS (-7) /* CUDA: more than DDETR_CUDA_MAX_LEVELS */
#define DDETR_ERROR_TOO_LARGE (-8)       /* CUDA: more samples than can be sorted */

#define DDETR_FUSED_MAX_SAMPLES 512 /* most levels * points that ddetr_msda_fused_cpu takes */
#define DDETR_MAX_BANDS 1024

/* Storage types. */
#define DDETR_DTYPE_F32 0
#define DDETR_DTYPE_F64 1
#define DDETR_DTYPE_F16 2
#define DDETR_DTYPE_BF16 3

/* Instruction sets of the CPU library; results differ between them only by
 * rounding. */
#define DDETR_ISA_BEST 0     /* the best one this processor has, AMX for dense layers */
#define DDETR_ISA_PORTABLE 1 /* the compiler's baseline for the platform */
#define DDETR_ISA_AVX2 2     /* AVX2, FMA, F16C */
#define DDETR_ISA_AVX512 3   /* AVX-512 F, BW, DQ, VL besides */

typedef struct ddetr_msda_dims {
    int64_t batch;
    int64_t positions; /* over all levels */
    int64_t heads;
    int64_t channels; /* per head */
    int64_t queries;
    int64_t levels;
    int64_t points; /* per level */
} ddetr_msda_dims;

/* Calls task(b, e, context) over chunks that together cover [begin, end),
 * possibly from several threads, and returns 0 when all are done. libtorch's
 * torch_parallel_for has this form, so its thread pool can be handed in. */
typedef void (*ddetr_task)(int64_t begin, int64_t end, void* context);
typedef int32_t (*ddetr_parallel_for)(int64_t begin, int64_t end, int64_t grain, ddetr_task task, void* context);

/* DDETR_ABI_VERSION of the library, to be compared at load. */
DDETR_API int32_t ddetr_abi_version(void);

/* A sentence for a negative code or 0; never null. */
DDETR_API const char* ddetr_error_string(int32_t code);

/* ---- libddetr_cpu ---- */

/* The instruction set that `wanted` means here (DDETR_ISA_BEST resolves), or
 * DDETR_ERROR_ISA. */
DDETR_API int32_t ddetr_cpu_isa(int32_t wanted);

/* On the CPU value may have gaps: value_strides are those of batch, positions
 * and heads, in elements; the channels of a head lie side by side. parallel_for
 * may be null: then the calling thread does it all.
 *
 * scratch is memory of the caller, of any content, aligned to the compute type.
 * With R = channels * (bytes of the storage type), forward takes as many heads
 * at a time as (positions + 1) * R bytes fit into it, copied into one head
 * after the other, which is faster where many queries read a value; with less,
 * R at least, value is read where it lies. Either way the results are bitwise
 * the same, as they are for any number of threads and any batch around them.
 */

/* Writes all of output. */
DDETR_API int32_t ddetr_msda_forward_cpu(const ddetr_msda_dims* dims, int32_t dtype, const int64_t* level_hw,
                                         const void* value, const int64_t* value_strides, const void* sampling_xy,
                                         const void* weights, void* output, void* scratch, int64_t scratch_bytes,
                                         int32_t isa, ddetr_parallel_for parallel_for);

/* The same from what the projections of a query give. projected (batch,
 * queries, 3 * heads * levels * points), compute type, has strides of its own
 * for batch and queries and holds first the offsets (heads, levels, points, 2),
 * then the logits (heads, levels, points); weights are their softmax over
 * levels and points. reference (batch, queries, levels, reference_numbers),
 * contiguous, compute type: with 2 numbers the centre x, y that offsets in
 * pixels of the level start from, with 4 a box cx, cy, w, h, and an offset of
 * `points` is half its size. */
DDETR_API int32_t ddetr_msda_fused_cpu(const ddetr_msda_dims* dims, int32_t dtype, const int64_t* level_hw,
                                       const void* value, const int64_t* value_strides, const void* projected,
                                       const int64_t* projected_strides, const void* reference,
                                       int32_t reference_numbers, void* output, void* scratch, int64_t scratch_bytes,
                                       int32_t isa, ddetr_parallel_for parallel_for);

/* Writes all three gradients, the one of value in the storage type, rounded
 * once. As many heads are taken at a time as (positions + 1) * R + positions *
 * channels * (bytes of the compute type) fit into scratch_bytes - 64. Less, R
 * at least, is enough where value is contiguous and of the compute type: then
 * value is read where it lies and grad_value holds the sums. A head is summed
 * by `bands` tasks, 1 to DDETR_MAX_BANDS, one for each part of its positions;
 * more than one repeat some work and serve threads beyond the number of heads.
 * No atomics; the results do not depend on bands, scratch or threads. */
DDETR_API int32_t ddetr_msda_backward_cpu(const ddetr_msda_dims* dims, int32_t dtype, const int64_t* level_hw,
                                          const void* grad_output, const void* value, const int64_t* value_strides,
                                          const void* sampling_xy, const void* weights, void* grad_value,
                                          void* grad_sampling_xy, void* grad_weights, void* scratch,
                                          int64_t scratch_bytes, int64_t bands, int32_t isa,
                                          ddetr_parallel_for parallel_for);

#ifdef __cplusplus
}
#endif

#endif
