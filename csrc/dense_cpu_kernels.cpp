// The dense layers of libddetr_cpu, compiled once per engine with DDETR_DENSE_KERNELS naming the copy.
//
// A product runs panel by panel over a chunk of rows that stays in the second-level cache, tile by tile
// (dense_cpu_tiles.h); a tile's sums stay in the first level until bias, addend and activation are applied.
#include "dense_cpu_maps.h"
#include "dense_cpu_product.h"
#include "dense_cpu_transformer.h"

extern const DenseKernels DDETR_DENSE_KERNELS = {
    {kPanel, Engine::kDepthStep > 1 ? 2 : 1, Engine::kDepthStep, kBlockRows, static_cast<int64_t>(sizeof(T)),
     static_cast<int64_t>(sizeof(Weight))},
    Engine::begin,
    Engine::end,
    {product_items, run_product<>},
    product_scratch<>,
    {attention_inputs_items, run_attention_inputs},
    {feed_forward_items, run_feed_forward},
    {group_norm_items, run_group_statistics},
    {group_norm_items, run_group_scale},
    {pixel_items, run_pixels},
    {pool_items, run_max_pool},
};
