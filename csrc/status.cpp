// What both libraries answer about themselves.
#include "ddetr.h"

int32_t ddetr_abi_version(void) {
    return DDETR_ABI_VERSION;
}

const char* ddetr_error_string(int32_t code) {
    switch (code) {
        case DDETR_OK:
            return "no error";
        case DDETR_ERROR_DIMS:
            return "a negative size, a size beyond 64-bit indices, or a null pointer";
        case DDETR_ERROR_DTYPE:
            return "an unknown storage type";
        case DDETR_ERROR_LEVELS:
            return "a level of height or width below 1, or levels that do not sum to "
                   "the number of positions";
        case DDETR_ERROR_SCRATCH:
            return "scratch memory missing or too small";
        case DDETR_ERROR_ISA:
            return "an instruction set that this processor or this build lacks";
        case DDETR_ERROR_PARALLEL:
            return "the caller's thread pool reported a failure";
        case DDETR_ERROR_TOO_MANY_LEVELS:
            return "more levels than the CUDA kernels take";
        case DDETR_ERROR_TOO_LARGE:
            return "more samples in an image than can be sorted";
        default:
            return code > 0 ? "a CUDA error" : "an unknown error code";
    }
}
