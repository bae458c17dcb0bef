// What tests set of the emulated GPU.
#include "cuda_runtime.h"

extern "C" {

// The order in which threads take turns: 0 as numbered, 1 backwards, 2 mixed.
__attribute__((visibility("default"))) void emulated_order(int order) {
    emulated::state.order = order;
}

// How many multiprocessors it has; few make few queries look like many.
__attribute__((visibility("default"))) void emulated_processors(int count) {
    emulated::processors = count;
}

// How many kernels ran so far.
__attribute__((visibility("default"))) uint64_t emulated_launches() {
    return emulated::state.launches;
}
}
