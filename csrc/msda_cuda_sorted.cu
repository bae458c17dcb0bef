// The gradient of the value in an order that is always the same, without atomics on numbers.
//
// Samples are sorted by the cell of four pixels they lie in, equal ones in the order they are stored. Then
//   1. a warp takes 64 samples of that order and adds, cell by cell, what they give to the four pixels of the cell;
//      a cell that began in the samples before has its sum continued apart;
//   2. a thread per number of the result adds those of the four cells that touch its pixel.
// Cells reach one pixel beyond the map. Large batches are done some images at a time, to bound the workspace.
#include "radix_sort.cuh"

namespace ddetr {
namespace {

constexpr int kWindow = 64;                         // samples that a warp takes
constexpr int64_t kMostSamples = int64_t(1) << 24;  // at a time, unless one image has more
constexpr int64_t kAlignment = 256;

struct CellStarts {
    int64_t at[kMaxLevels];  // first cell of each level, within a head
    int64_t all;             // cells of all levels
};

CellStarts cell_starts(const ddetr_msda_dims& dims, const int64_t* level_hw) {
    CellStarts starts = {};
    for (int64_t level = 0; level < dims.levels; ++level) {
        starts.at[level] = starts.all;
        starts.all += (level_hw[2 * level] + 1) * (level_hw[2 * level + 1] + 1);
    }
    return starts;
}

// Where in the workspace what lies, for so many images at a time.
struct Layout {
    int64_t images, samples, cells, windows;
    int64_t keys[2], sorted[2], counts, begins, ends, sums, continued, bytes;

    Layout(const ddetr_msda_dims& dims, int64_t cells_of_head, int64_t real_bytes) {
        const int64_t of_image = dims.queries * dims.heads * dims.levels * dims.points;
        images = of_image > 0 ? kMostSamples / of_image : 1;
        images = images < 1 ? 1 : images > dims.batch ? dims.batch : images;
        samples = images * of_image;
        cells = images * dims.heads * cells_of_head;
        windows = (samples + kWindow - 1) / kWindow;
        bytes = 0;
        for (int i = 0; i < 2; ++i) {
            keys[i] = take(samples * 4);
            sorted[i] = take(samples * 4);
        }
        counts = take(sort_counts(samples) * 4);
        begins = take(cells * 4);
        ends = take(cells * 4);
        sums = take(cells * 4 * dims.channels * real_bytes);
        continued = take(windows * 4 * dims.channels * real_bytes);
    }

  private:
    int64_t take(int64_t size) {
        const int64_t offset = bytes;
        bytes += (size + kAlignment - 1) / kAlignment * kAlignment;
        return offset;
    }
};

// The cell of every sample; of those that count nowhere, the number of cells.
template <typename Real>
__global__ void __launch_bounds__(kThreads)
    key_kernel(ddetr_msda_dims dims, Levels levels, CellStarts starts, const Real* __restrict__ sampling_xy,
               uint32_t samples, uint32_t none, uint32_t* __restrict__ keys) {
    const uint32_t of_row = static_cast<uint32_t>(dims.levels * dims.points);
    const uint32_t heads = static_cast<uint32_t>(dims.heads), queries = static_cast<uint32_t>(dims.queries);
    for (uint64_t sample = uint64_t(blockIdx.x) * kThreads + threadIdx.x; sample < samples;
         sample += uint64_t(gridDim.x) * kThreads) {
        const uint32_t i = static_cast<uint32_t>(sample), row = i / of_row;
        const uint32_t level = i % of_row / static_cast<uint32_t>(dims.points);
        const uint32_t m = row % heads, b = row / heads / queries;
        const int32_t height = levels.height[level], width = levels.width[level];
        const Cell<Real> cell = locate(sampling_xy[2 * sample], sampling_xy[2 * sample + 1],
                                       static_cast<Real>(height), static_cast<Real>(width));
        const int64_t in_level = static_cast<int64_t>(cell.line + 1) * (width + 1) + cell.column + 1;
        const int64_t key = (static_cast<int64_t>(b) * heads + m) * starts.all + starts.at[level] + in_level;
        keys[i] = cell.is_used ? static_cast<uint32_t>(key) : none;
    }
}

// Where in the order each cell's samples begin and end; both stay 0 for a cell without.
__global__ void __launch_bounds__(kThreads)
    bounds_kernel(const uint32_t* __restrict__ keys, uint32_t samples, uint32_t none, uint32_t* __restrict__ begins,
                  uint32_t* __restrict__ ends) {
    for (uint64_t place = uint64_t(blockIdx.x) * kThreads + threadIdx.x; place < samples;
         place += uint64_t(gridDim.x) * kThreads) {
        const uint32_t key = keys[place];
        if (key == none) continue;
        if (place == 0 || keys[place - 1] != key) begins[key] = static_cast<uint32_t>(place);
        if (place + 1 == samples || keys[place + 1] != key) ends[key] = static_cast<uint32_t>(place + 1);
    }
}

// sums[cell][corner][channel], of the samples of a cell up to the end of the window it begins in, and
// continued[window][corner][channel], of those at the begin of a window whose cell began before.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    cell_kernel(ddetr_msda_dims dims, Levels levels, const T* __restrict__ grad_output,
                const typename ComputeOf<T>::Real* __restrict__ sampling_xy,
                const typename ComputeOf<T>::Real* __restrict__ weights, const uint32_t* __restrict__ keys,
                const uint32_t* __restrict__ sorted, uint32_t samples, uint32_t none,
                typename ComputeOf<T>::Real* __restrict__ sums, typename ComputeOf<T>::Real* __restrict__ continued) {
    using Real = typename ComputeOf<T>::Real;
    struct Record {
        Real factor[4];
        uint32_t row, key;
    };
    __shared__ Record shared[kThreads];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    Record* records = shared + warp * kWarp;
    const uint32_t of_row = static_cast<uint32_t>(dims.levels * dims.points);
    const uint64_t first = (uint64_t(blockIdx.x) * kThreads + threadIdx.x) / kWarp * kWindow;
    if (first >= samples) return;  // the whole warp
    const uint32_t begun_before = first > 0 ? keys[first - 1] : none;
    for (int64_t chunk = 0; chunk < dims.channels; chunk += kWarp) {
        const int64_t channel = chunk + lane;
        const bool has_channel = channel < dims.channels;
        Real sum[4] = {0, 0, 0, 0};
        uint32_t current = none;
        const auto write = [&] {
            if (current == none || !has_channel) return;
            // a cell's samples follow each other: only the first of a window can have begun before it
            Real* to = current == begun_before ? continued + first / kWindow * 4 * dims.channels
                                               : sums + static_cast<int64_t>(current) * 4 * dims.channels;
            for (int c = 0; c < 4; ++c) to[c * dims.channels + channel] = sum[c];
        };
        for (int batch = 0; batch < kWindow; batch += kWarp) {
            const uint64_t place = first + batch + lane;
            Record record = {{0, 0, 0, 0}, 0, none};
            if (place < samples && keys[place] != none) {
                const uint32_t sample = sorted[place];
                const uint32_t level = sample % of_row / static_cast<uint32_t>(dims.points);
                const Cell<Real> cell = locate(
                    sampling_xy[2 * static_cast<int64_t>(sample)], sampling_xy[2 * static_cast<int64_t>(sample) + 1],
                    static_cast<Real>(levels.height[level]), static_cast<Real>(levels.width[level]));
                const Real weight = weights[sample];
                const Real high = (1 - cell.low) * weight, low = cell.low * weight;
                record = {{high * (1 - cell.right), high * cell.right, low * (1 - cell.right), low * cell.right},
                          sample / of_row,
                          keys[place]};
            }
            __syncwarp();  // everyone has read the batch before
            records[lane] = record;
            __syncwarp();
            for (int s = 0; s < kWarp; ++s) {
                const Record& at = records[s];
                if (at.key != current) {
                    write();
                    for (int c = 0; c < 4; ++c) sum[c] = 0;
                    current = at.key;
                }
                if (at.key == none || !has_channel) continue;
                const Real grad = to_real(grad_output[at.row * dims.channels + channel]);
                for (int c = 0; c < 4; ++c) sum[c] += at.factor[c] * grad;
            }
        }
        write();
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    pixel_kernel(ddetr_msda_dims dims, Levels levels, CellStarts starts, const uint32_t* __restrict__ begins,
                 const uint32_t* __restrict__ ends, const typename ComputeOf<T>::Real* __restrict__ sums,
                 const typename ComputeOf<T>::Real* __restrict__ continued, int64_t images,
                 T* __restrict__ grad_value) {
    using Real = typename ComputeOf<T>::Real;
    const int64_t elements = images * dims.positions * dims.heads * dims.channels;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    for (int64_t element = first; element < elements; element += static_cast<int64_t>(gridDim.x) * kThreads) {
        const int64_t channel = element % dims.channels, row = element / dims.channels;  // row (b, position, m)
        const int64_t m = row % dims.heads, position = row / dims.heads % dims.positions;
        const int64_t b = row / dims.heads / dims.positions;
        int level = 0;
        while (level + 1 < dims.levels && levels.start[level + 1] <= position) ++level;
        const int64_t width = levels.width[level], in_level = position - levels.start[level];
        const int64_t line = in_level / width, column = in_level % width;
        const int64_t head = (b * dims.heads + m) * starts.all + starts.at[level];
        Real sum = 0;
        for (int corner = 3; corner >= 0; --corner) {  // this pixel is the lower right one of the first cell
            const int64_t cell = head + (line + 1 - (corner >> 1)) * (width + 1) + column + 1 - (corner & 1);
            const int64_t begin = begins[cell], end = ends[cell];
            if (begin == end) continue;
            sum += sums[(cell * 4 + corner) * dims.channels + channel];
            for (int64_t window = begin / kWindow + 1; window <= (end - 1) / kWindow; ++window) {
                sum += continued[(window * 4 + corner) * dims.channels + channel];
            }
        }
        from_real(sum, grad_value + element);
    }
}

template <typename T>
int32_t run(const Problem& problem, const BackwardBuffers& at, T* grad_value, char* workspace) {
    using Real = typename ComputeOf<T>::Real;
    const ddetr_msda_dims& dims = problem.dims;
    const CellStarts starts = cell_starts(dims, problem.level_hw);
    const Layout layout(dims, starts.all, sizeof(Real));
    const auto numbers = [&](int64_t offset) { return reinterpret_cast<uint32_t*>(workspace + offset); };
    uint32_t* const keys[2] = {numbers(layout.keys[0]), numbers(layout.keys[1])};
    uint32_t* const sorted[2] = {numbers(layout.sorted[0]), numbers(layout.sorted[1])};
    uint32_t *counts = numbers(layout.counts), *begins = numbers(layout.begins), *ends = numbers(layout.ends);
    Real* sums = reinterpret_cast<Real*>(workspace + layout.sums);
    Real* continued = reinterpret_cast<Real*>(workspace + layout.continued);
    const int64_t of_image = dims.queries * dims.heads * dims.levels * dims.points;
    for (int64_t b = 0; b < dims.batch; b += layout.images) {
        const int64_t images = b + layout.images <= dims.batch ? layout.images : dims.batch - b;
        const uint32_t samples = static_cast<uint32_t>(images * of_image);
        const uint32_t none = static_cast<uint32_t>(images * dims.heads * starts.all);
        const Real* xy = static_cast<const Real*>(at.sampling_xy) + 2 * b * of_image;
        const Real* weights = static_cast<const Real*>(at.weights) + b * of_image;
        const int64_t row = dims.heads * dims.channels;
        int32_t status = cudaMemsetAsync(begins, 0, static_cast<size_t>(layout.sums - layout.begins), problem.stream);
        if (status == 0) {
            status = launch(key_kernel<Real>, blocks_for(samples, kThreads), problem.stream, dims, problem.levels,
                            starts, xy, samples, none, keys[0]);
        }
        const int passes = sort_passes(none);
        if (status == 0) status = sort_keys(keys, sorted, counts, samples, passes, problem.stream);
        const uint32_t *ordered = keys[passes % 2], *order = sorted[passes % 2];
        if (status == 0) {
            status = launch(bounds_kernel, blocks_for(samples, kThreads), problem.stream, ordered, samples, none,
                            begins, ends);
        }
        if (status == 0) {
            status = launch(cell_kernel<T>, blocks_for(samples, kWarps * kWindow), problem.stream, dims,
                            problem.levels, static_cast<const T*>(at.grad_output) + b * dims.queries * row, xy,
                            weights, ordered, order, samples, none, sums, continued);
        }
        if (status == 0) {
            status = launch(pixel_kernel<T>, blocks_for(images * dims.positions * row, kThreads), problem.stream,
                            dims, problem.levels, starts, begins, ends, sums, continued, images,
                            grad_value + b * dims.positions * row);
        }
        if (status != 0) return status;
    }
    return 0;
}

}  // namespace

int64_t sorted_bytes(const ddetr_msda_dims& dims, int32_t dtype, const int64_t* level_hw) {
    const int64_t cells = cell_starts(dims, level_hw).all;
    const Layout layout(dims, cells, dtype == DDETR_DTYPE_F64 ? 8 : 4);
    const int64_t most = INT32_MAX;
    return layout.samples <= most && layout.cells < most ? layout.bytes : DDETR_ERROR_TOO_LARGE;
}

int32_t grad_value_sorted(const Problem& problem, const BackwardBuffers& at, void* grad_value, void* workspace) {
    char* bytes = static_cast<char*>(workspace);
    switch (problem.dtype) {
        case DDETR_DTYPE_F64:
            return run(problem, at, static_cast<double*>(grad_value), bytes);
        case DDETR_DTYPE_F16:
            return run(problem, at, static_cast<__half*>(grad_value), bytes);
        case DDETR_DTYPE_BF16:
            return run(problem, at, static_cast<__nv_bfloat16*>(grad_value), bytes);
        default:
            return run(problem, at, static_cast<float*>(grad_value), bytes);
    }
}

}  // namespace ddetr
