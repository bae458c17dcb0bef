/* The whole kernel boundary of ddetr: multi-scale deformable attention (arXiv:2010.04159, eq. 3) as plain C.
 *
 * Two shared libraries implement it: libddetr_cpu and libddetr_cuda. Neither knows PyTorch, allocates, prints, keeps
 * mutable globals or ends the process. src/ddetr_cli/ops/native.py is the only caller in the package; a test compares
 * its table of argument types with the prototypes below, so each stands on one logical line ending in ';'.
 *
 * Shapes (all buffers contiguous, row-major):
 *   value         (batch, positions, heads, channels)            storage type
 *   sampling_xy   (batch, queries, heads, levels, points, 2)     compute type; x then y, [0,1] of each map
 *   weights       (batch, queries, heads, levels, points)        compute type
 *   output        (batch, queries, heads, channels)              storage type
 *   level_hw      levels pairs (height, width), host memory; sum(height * width) == positions
 * The compute type is double for double storage, else float; sums are kept in it. Gradients of value are in the
 * compute type (16-bit sums would lose them); the caller rounds. Indices are 64-bit: any batch, any size.
 *
 * A location x lies at pixel x * width - 0.5. A point counts where -1 < pixel < size on both axes; any other,
 * infinite or NaN, contributes nothing and gets zero gradients. Neighbours outside the map read as zero and are not
 * touched.
 *
 * Return values: 0, a negative DDETR_ERROR_*, or (CUDA) a positive cudaError_t. Nothing was written for a negative
 * one except DDETR_ERROR_PARALLEL. An empty output, or no points at all, is not an error.
 */
#ifndef DDETR_H
#define DDETR_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DDETR_API __attribute__((visibility("default")))

/* Raised by every change of this file that a caller could notice. */
#define DDETR_ABI_VERSION 1

#define DDETR_OK 0
#define DDETR_ERROR_DIMS (-1)            /* a negative size, a size beyond 64-bit indices, or a null pointer */
#define DDETR_ERROR_DTYPE (-2)           /* not one of DDETR_DTYPE_* */
#define DDETR_ERROR_LEVELS (-3)          /* a height or width below 1, or sum(height * width) != positions */
#define DDETR_ERROR_ROWS (-4)            /* rows that are not 0 <= row_begin <= row_end <= number of rows */
#define DDETR_ERROR_ISA (-5)             /* instructions this processor or this build lacks */
#define DDETR_ERROR_PARALLEL (-6)        /* the caller's parallel_for reported a failure; outputs are incomplete */
#define DDETR_ERROR_TOO_MANY_LEVELS (-7) /* CUDA: more than DDETR_CUDA_MAX_LEVELS */

#define DDETR_CUDA_MAX_LEVELS 64

/* Storage types. */
#define DDETR_DTYPE_F32 0
#define DDETR_DTYPE_F64 1
#define DDETR_DTYPE_F16 2
#define DDETR_DTYPE_BF16 3

/* Instruction sets of the CPU library; results differ between them only by rounding. */
#define DDETR_ISA_BEST 0     /* the best one this processor has */
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

/* Calls task(b, e, context) over chunks that together cover [begin, end), possibly from several threads, and returns
 * 0 when all are done. libtorch's torch_parallel_for has this form, so its thread pool can be handed in. */
typedef void (*ddetr_task)(int64_t begin, int64_t end, void* context);
typedef int32_t (*ddetr_parallel_for)(int64_t begin, int64_t end, int64_t grain, ddetr_task task, void* context);

/* DDETR_ABI_VERSION of the library, to be compared at load. */
DDETR_API int32_t ddetr_abi_version(void);

/* A sentence for a negative code or 0; never null. */
DDETR_API const char* ddetr_error_string(int32_t code);

/* ---- libddetr_cpu ---- */

/* The instruction set that `wanted` means here (DDETR_ISA_BEST resolves), or DDETR_ERROR_ISA. */
DDETR_API int32_t ddetr_cpu_isa(int32_t wanted);

/* Writes output for rows [row_begin, row_end) of batch * heads * queries, row = (b * heads + m) * queries + q.
 * parallel_for may be null: then the calling thread does it all. Each row is computed by one thread in one fixed
 * order: results depend neither on the number of threads nor on the other rows. */
DDETR_API int32_t ddetr_msda_forward_cpu(const ddetr_msda_dims* dims, int32_t dtype, const int64_t* level_hw,
                                         const void* value, const void* sampling_xy, const void* weights,
                                         void* output, int64_t row_begin, int64_t row_end, int32_t isa,
                                         ddetr_parallel_for parallel_for);

/* Writes the three gradients for rows [row_begin, row_end) of batch * heads, row = b * heads + m: all positions,
 * queries and points of that head. Every element is written, so the buffers may come uninitialised. A row belongs to
 * one thread: no atomics, bitwise repeatable. */
DDETR_API int32_t ddetr_msda_backward_cpu(const ddetr_msda_dims* dims, int32_t dtype, const int64_t* level_hw,
                                          const void* grad_output, const void* value, const void* sampling_xy,
                                          const void* weights, void* grad_value, void* grad_sampling_xy,
                                          void* grad_weights, int64_t row_begin, int64_t row_end, int32_t isa,
                                          ddetr_parallel_for parallel_for);

/* ---- libddetr_cuda: buffers on `device`, work queued on `stream` (a cudaStream_t); level_hw stays on the host ----
 */

/* A sentence for a positive cudaError_t; never null. */
DDETR_API const char* ddetr_cuda_error_string(int32_t code);

/* Writes all of output. */
DDETR_API int32_t ddetr_msda_forward_cuda(const ddetr_msda_dims* dims, int32_t dtype, const int64_t* level_hw,
                                          const void* value, const void* sampling_xy, const void* weights,
                                          void* output, int32_t device, void* stream);

/* Adds to grad_value, which the caller has set to zero, and writes all of the other two. The additions are atomic and
 * come in any order: grad_value repeats only up to rounding. */
DDETR_API int32_t ddetr_msda_backward_cuda(const ddetr_msda_dims* dims, int32_t dtype, const int64_t* level_hw,
                                           const void* grad_output, const void* value, const void* sampling_xy,
                                           const void* weights, void* grad_value, void* grad_sampling_xy,
                                           void* grad_weights, int32_t device, void* stream);

#ifdef __cplusplus
}
#endif

#endif
