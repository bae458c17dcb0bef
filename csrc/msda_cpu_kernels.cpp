// The arithmetic of libddetr_cpu, compiled once per instruction set with
// DDETR_KERNELS naming the copy.
#include "msda_cpu_kernels.h"

#include "msda_cpu_backward.h"
#include "msda_cpu_forward.h"
#include "msda_cpu_pack.h"

extern const CpuKernels DDETR_KERNELS = {
    pack,
    {forward_queries<float>, forward_queries<double>, forward_queries<Half>, forward_queries<Bfloat16>},
    {fused_queries<float>, fused_queries<double>, fused_queries<Half>, fused_queries<Bfloat16>},
    clear,
    {backward_bands<float>, backward_bands<double>, backward_bands<Half>, backward_bands<Bfloat16>},
    {unpack<float>, unpack<double>, unpack<Half>, unpack<Bfloat16>},
};
