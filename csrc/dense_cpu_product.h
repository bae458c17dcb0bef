// Products over windows of a map.
#ifndef DDETR_DENSE_CPU_PRODUCT_H
#define DDETR_DENSE_CPU_PRODUCT_H

#include "dense_cpu_rows.h"

namespace {

// How a product's rows are cut. Where lines follow each other evenly, of both inputs alike, they are taken as one,
// and the pixels between them, which belong to no output, are computed and dropped.
struct Cut {
    int64_t lines, width, tiles_per_line, chunks, groups, panels_per_group;
    bool is_folded;
    int64_t fold;

    explicit Cut(const ddetr_product& p) {
        fold = p.input_pixel > 0 && p.input_line % p.input_pixel == 0 ? p.input_line / p.input_pixel : 0;
        is_folded = p.lines > 1 && fold >= p.width && fold * 8 <= p.width * 9 &&
                    (p.second_depth == 0 || p.second_line == fold * p.second_pixel);
        lines = is_folded ? 1 : p.lines;
        width = is_folded ? (p.lines - 1) * fold + p.width : p.width;
        tiles_per_line = ceil_divide(width, kTileRows);
        chunks = ceil_divide(lines * tiles_per_line, kChunkTiles);
        const int64_t panels = ceil_divide(p.columns, kPanel), wanted = 16;
        groups = chunks >= wanted ? 1 : smaller(panels, ceil_divide(wanted, chunks));
        panels_per_group = ceil_divide(panels, groups);
        groups = ceil_divide(panels, panels_per_group);
    }
};

int64_t product_items(const ddetr_product& p) {
    const Cut cut(p);
    return cut.chunks * cut.groups;
}

template <typename Out>
DDETR_INLINE void finish_tile(const ddetr_product& p, const Cut& cut, int64_t line, int64_t first, int64_t count,
                              int64_t column, const float* sums) {
    int64_t y = line, x = first;
    if (cut.is_folded) {
        y = first / cut.fold;
        x = first % cut.fold;
    }
    const int64_t columns = smaller(kPanel, p.columns - column);
    Out* output = static_cast<Out*>(p.output) + column / p.group * p.output_group + column % p.group;
    const T* added = static_cast<const T*>(p.added);
    const bool past_caches =
        added == nullptr && columns == kPanel &&
        is_written_past_caches(static_cast<const Out*>(p.output), p.lines * p.width * p.columns,
                               {p.output_line, p.output_pixel, p.columns > p.group ? p.output_group : 0});
    for (int64_t r = 0; r < count; ++r, ++x) {
        if (cut.is_folded && x == cut.fold) {
            x = 0;
            ++y;
        }
        if (x >= p.width) continue;
        finish_row(sums + r * kPanel, p.bias + column,
                   added == nullptr ? kNothing : added + y * p.added_line + x * p.added_pixel + column, p.relu != 0,
                   output + y * p.output_line + x * p.output_pixel, columns, past_caches);
    }
}

// Which pixels the taps of a tile's rows meet: on each of taps_y lines so many in a row.
struct TilePixels {
    int64_t step, row, tap;  // from pixel to pixel in elements; from row to row, and from tap to tap, in pixels
    int64_t of_a_line;       // 0: they are not in a row

    explicit TilePixels(const ddetr_product& p) {
        const bool is_one = p.taps_x == 1;
        step = is_one ? p.input_pixel : smaller(p.input_pixel, p.tap_pixel);
        const bool is_even = step > 0 && p.input_pixel % step == 0 && (is_one || p.tap_pixel % step == 0);
        row = is_even ? p.input_pixel / step : 0;
        tap = is_one || !is_even ? 0 : p.tap_pixel / step;
        of_a_line = is_even ? among(kTileRows, p.taps_x) : 0;
    }

    int64_t among(int64_t rows, int64_t taps_x) const { return (rows - 1) * row + (taps_x - 1) * tap + 1; }
};

// Bytes that a tile's rows of the first input take when they are split; 0: they are not.
template <typename E>
int64_t split_bytes(const ddetr_product& p) {
    return p.taps_y * TilePixels(p).of_a_line * p.depth * E::kSplitBytes;
}

// Bytes of scratch with which an item is computed faster, for an engine that splits its rows; else 0.
template <typename E = Engine>
int64_t product_scratch(const ddetr_product& p) {
    const int64_t bytes = split_bytes<E>(p);
    return bytes == 0 ? 0 : kChunkTiles * (bytes + kTileRows * p.second_depth * E::kSplitBytes);
}

// A tile of a chunk: where it is, its rows of both inputs, and the same split.
struct ProductTile {
    int64_t line, first, count;
    const T *rows, *second;
    char *split, *second_split;
};

// An engine that splits its rows does so once for all panels and taps where `slot` has room for them; it is null
// where not.
template <typename E = Engine>
void run_product(const ddetr_product& p, int64_t item, void* slot) {
    alignas(64) float sums[kTileRows * kPanel];
    const Cut cut(p);
    const int64_t tile_begin = item / cut.groups * kChunkTiles;
    const int64_t tile_end = smaller(tile_begin + kChunkTiles, cut.lines * cut.tiles_per_line);
    const int64_t column_begin = item % cut.groups * cut.panels_per_group * kPanel;
    const int64_t column_end = smaller(column_begin + cut.panels_per_group * kPanel, p.columns);
    const T *input = static_cast<const T*>(p.input), *second = static_cast<const T*>(p.second);
    const TilePixels pixels(p);
    const int64_t tile_bytes = product_scratch<E>(p) / kChunkTiles, first_bytes = split_bytes<E>(p);
    const bool is_split = slot != nullptr && tile_bytes > 0;
    const auto visit_tiles = [&](const auto& visit) {
        char* split = static_cast<char*>(slot);
        for (int64_t tile = tile_begin; tile < tile_end; ++tile, split += tile_bytes) {
            const int64_t line = tile / cut.tiles_per_line, first = tile % cut.tiles_per_line * kTileRows;
            visit(ProductTile{line, first, smaller(kTileRows, cut.width - first),
                              input + line * p.input_line + first * p.input_pixel,
                              second + line * p.second_line + first * p.second_pixel, split, split + first_bytes});
        }
    };
    if constexpr (E::kSplitBytes > 0) {
        if (is_split) {
            visit_tiles([&](const ProductTile& tile) {
                for (int64_t y = 0; y < p.taps_y; ++y) {
                    E::split(tile.rows + y * p.tap_line, pixels.step, pixels.among(tile.count, p.taps_x),
                             pixels.of_a_line, p.depth, tile.split + y * first_bytes / p.taps_y);
                }
                if (p.second_depth == 0) return;
                E::split(tile.second, p.second_pixel, tile.count, kTileRows, p.second_depth, tile.second_split);
            });
        }
    }
    for (int64_t column = column_begin; column < column_end; column += kPanel) {
        const Weight* panel =
            static_cast<const Weight*>(p.packed) + column * (p.taps_y * p.taps_x * p.depth + p.second_depth);
        visit_tiles([&](const ProductTile& tile) {
            if constexpr (E::kSplitBytes > 0) {
                if (is_split) {
                    const typename E::Split then = {tile.second_split, kTileRows, 1, 1, 1, 0, p.second_depth};
                    E::tile_of_split({tile.split, pixels.of_a_line, p.taps_y, p.taps_x, pixels.row, pixels.tap,
                                      p.depth, p.second_depth > 0 ? &then : nullptr},
                                     panel, tile.count, sums);
                }
            }
            if (!is_split) {
                const Rows<T> then = {tile.second, p.second_pixel, 1, 1, 0, 0, p.second_depth};
                E::tile({tile.rows, p.input_pixel, p.taps_y, p.taps_x, p.tap_line, p.tap_pixel, p.depth,
                         p.second_depth > 0 ? &then : nullptr},
                        panel, tile.count, sums);
            }
            if (p.output_is_float) {
                finish_tile<float>(p, cut, tile.line, tile.first, tile.count, column, sums);
            } else {
                finish_tile<T>(p, cut, tile.line, tile.first, tile.count, column, sums);
            }
        });
    }
}

}  // namespace

#endif
