/* The kernels of libddetr_cuda: multi-scale deformable attention on NVIDIA GPUs. Shapes, types, places and errors are
 * those of ddetr.h. Buffers lie on `device`, work is queued on `stream` (a cudaStream_t) of it and may be captured
 * into a graph; level_hw and strides stay on the host and may go when the call returns. Nothing is allocated, and no
 * call waits for the device. Besides the codes of ddetr.h, a positive cudaError_t is returned: all launches succeeded
 * if it is 0, which says nothing yet about how they end.
 */
#ifndef DDETR_CUDA_H
#define DDETR_CUDA_H

#include "ddetr.h"

#ifdef __cplusplus
extern "C" {
#endif

#define DDETR_CUDA_MAX_LEVELS 64

/* Which kernels compute. Both give the same numbers up to rounding; fast ones read 16 bytes at a time and take 16, 32
 * or 64 channels in float, half or bfloat16, aligned to 16 bytes, whose images have fewer than 2^31 elements. For all
 * else FAST means PLAIN. Where a pixel of the value is infinite, a fast one may give NaN on the border of a map. */
#define DDETR_CUDA_PLAIN 0
#define DDETR_CUDA_FAST 1       /* one of the next two, by how many queries there are */
#define DDETR_CUDA_FAST_ROWS 2  /* forward, as many threads per query and head as its channels need */
#define DDETR_CUDA_FAST_WARPS 3 /* forward, 32 of them */

/* A sentence for a positive cudaError_t; never null. */
DDETR_API const char* ddetr_cuda_error_string(int32_t code);

/* Writes all of output. value_strides as on the CPU: those of batch, positions and heads, in elements. */
DDETR_API int32_t ddetr_msda_forward_cuda(const ddetr_msda_dims* dims, int32_t dtype, const int64_t* level_hw,
                                          const void* value, const int64_t* value_strides, const void* sampling_xy,
                                          const void* weights, void* output, int32_t kernels, int32_t device,
                                          void* stream);

/* The same from what the projections of a query give, as ddetr_msda_fused_cpu takes it; any number of points. */
DDETR_API int32_t ddetr_msda_fused_cuda(const ddetr_msda_dims* dims, int32_t dtype, const int64_t* level_hw,
                                        const void* value, const int64_t* value_strides, const void* projected,
                                        const int64_t* projected_strides, const void* reference,
                                        int32_t reference_numbers, void* output, int32_t kernels, int32_t device,
                                        void* stream);

/* Adds to grad_value, in the compute type (16-bit sums would lose small terms), which the caller has set to zero and
 * rounds, and writes all of the other two. The additions are atomic and come in any order: grad_value repeats only up
 * to rounding. */
DDETR_API int32_t ddetr_msda_backward_cuda(const ddetr_msda_dims* dims, int32_t dtype, const int64_t* level_hw,
                                           const void* grad_output, const void* value, const void* sampling_xy,
                                           const void* weights, void* grad_value, void* grad_sampling_xy,
                                           void* grad_weights, int32_t kernels, int32_t device, void* stream);

/* The same for the fused form: writes all of grad_projected, (B,Q,3*M*L*P) side by side in the compute type, and adds
 * to grad_value. The gradient of reference is not computed: that of a centre follows from those of its offsets. */
DDETR_API int32_t ddetr_msda_fused_backward_cuda(const ddetr_msda_dims* dims, int32_t dtype, const int64_t* level_hw,
                                                 const void* grad_output, const void* value, const void* projected,
                                                 const int64_t* projected_strides, const void* reference,
                                                 int32_t reference_numbers, void* grad_value, void* grad_projected,
                                                 int32_t kernels, int32_t device, void* stream);

/* Bytes of workspace that ddetr_msda_backward_sorted_cuda needs, or a negative code. */
DDETR_API int64_t ddetr_msda_backward_sorted_bytes(const ddetr_msda_dims* dims, int32_t dtype,
                                                   const int64_t* level_hw);

/* As ddetr_msda_backward_cuda, but the same bits at every call: samples are sorted by where they lie and added in
 * that order, without atomics on numbers. Writes all of grad_value, in the storage type, rounded once. workspace, of
 * any content, is aligned to 256 bytes. An image has at most 2^31 - 1 samples. */
DDETR_API int32_t ddetr_msda_backward_sorted_cuda(const ddetr_msda_dims* dims, int32_t dtype, const int64_t* level_hw,
                                                  const void* grad_output, const void* value, const void* sampling_xy,
                                                  const void* weights, void* grad_value, void* grad_sampling_xy,
                                                  void* grad_weights, void* workspace, int64_t workspace_bytes,
                                                  int32_t kernels, int32_t device, void* stream);

#ifdef __cplusplus
}
#endif

#endif
