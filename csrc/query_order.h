// In which order the CUDA kernels take queries: those whose places in the picture are near each other, on all levels,
// one after the other, so that a block of threads reads few pixels often. Arithmetic alone, no table: the order
// depends on the sizes of the levels only, and nothing has to be kept between calls.
#ifndef DDETR_QUERY_ORDER_H
#define DDETR_QUERY_ORDER_H

#include "bilinear.h"

namespace ddetr {

constexpr int32_t kMaxTiledLevels = 8;
constexpr int32_t kMaxTiledSide = 1 << 14;  // products with a step, below, then fit into 32 bits
constexpr int32_t kTilePixels = 8;          // a side of a tile on the first level

// The picture in lines x columns of tiles; lines 0: queries stay in their own order. A level begins in tile t at
// (t * step) >> 16, for lines and columns alike.
struct QueryTiles {
    int32_t lines, columns, levels;
    uint32_t line_step[kMaxTiledLevels], column_step[kMaxTiledLevels];
    int32_t height[kMaxTiledLevels], width[kMaxTiledLevels], start[kMaxTiledLevels];
};

DDETR_HD int32_t tile_begin(uint32_t tile, uint32_t step, int32_t size) {
    const int32_t begin = static_cast<int32_t>((tile * step) >> 16);
    return begin < size ? begin : size;  // steps are rounded up: of the tiles past the last pixel all are empty
}

// Tiles for queries that are the positions of the levels; none where they are something else, or too many.
inline QueryTiles tiles_for(int64_t queries, int64_t positions, int64_t levels, const int64_t* level_hw) {
    QueryTiles tiles = {};
    if (queries != positions || queries > INT32_MAX || levels < 1 || levels > kMaxTiledLevels) return tiles;
    int64_t start = 0;
    for (int64_t level = 0; level < levels; ++level) {
        const int64_t height = level_hw[2 * level], width = level_hw[2 * level + 1];
        if (height > kMaxTiledSide || width > kMaxTiledSide) return tiles;
        tiles.height[level] = static_cast<int32_t>(height);
        tiles.width[level] = static_cast<int32_t>(width);
        tiles.start[level] = static_cast<int32_t>(start);
        start += height * width;
    }
    const int32_t lines = (tiles.height[0] + kTilePixels / 2) / kTilePixels;
    const int32_t columns = (tiles.width[0] + kTilePixels / 2) / kTilePixels;
    tiles.lines = lines < 1 ? 1 : lines;
    tiles.columns = columns < 1 ? 1 : columns;
    tiles.levels = static_cast<int32_t>(levels);
    for (int32_t level = 0; level < tiles.levels; ++level) {
        const auto step = [](int32_t size, int32_t count) {
            return static_cast<uint32_t>(((static_cast<int64_t>(size) << 16) + count - 1) / count);
        };
        tiles.line_step[level] = step(tiles.height[level], tiles.lines);
        tiles.column_step[level] = step(tiles.width[level], tiles.columns);
    }
    return tiles;
}

// The query that comes at `place` in the order; each comes once.
DDETR_HD int32_t query_at(const QueryTiles& tiles, int32_t place) {
    if (tiles.lines == 0) return place;
    // the last line of tiles before which at most `place` queries lie
    int32_t low = 0, high = tiles.lines;
    while (high - low > 1) {
        const int32_t middle = (low + high) / 2;
        int32_t before = 0;
        for (int32_t level = 0; level < tiles.levels; ++level) {
            before += tile_begin(middle, tiles.line_step[level], tiles.height[level]) * tiles.width[level];
        }
        if (before <= place) {
            low = middle;
        } else {
            high = middle;
        }
    }
    const int32_t line = low;
    for (int32_t level = 0; level < tiles.levels; ++level) {
        place -= tile_begin(line, tiles.line_step[level], tiles.height[level]) * tiles.width[level];
    }
    const auto pixel_lines = [&](int32_t level) {
        return tile_begin(line + 1, tiles.line_step[level], tiles.height[level]) -
               tile_begin(line, tiles.line_step[level], tiles.height[level]);
    };
    low = 0, high = tiles.columns;
    while (high - low > 1) {
        const int32_t middle = (low + high) / 2;
        int32_t before = 0;
        for (int32_t level = 0; level < tiles.levels; ++level) {
            before += tile_begin(middle, tiles.column_step[level], tiles.width[level]) * pixel_lines(level);
        }
        if (before <= place) {
            low = middle;
        } else {
            high = middle;
        }
    }
    const int32_t column = low;
    for (int32_t level = 0; level < tiles.levels; ++level) {
        place -= tile_begin(column, tiles.column_step[level], tiles.width[level]) * pixel_lines(level);
    }
    for (int32_t level = 0;; ++level) {
        const int32_t left = tile_begin(column, tiles.column_step[level], tiles.width[level]);
        const int32_t columns = tile_begin(column + 1, tiles.column_step[level], tiles.width[level]) - left;
        const int32_t count = columns * pixel_lines(level);
        if (place < count || level == tiles.levels - 1) {
            const int32_t top = tile_begin(line, tiles.line_step[level], tiles.height[level]);
            const int32_t row = top + place / columns;
            return tiles.start[level] + row * tiles.width[level] + left + place % columns;
        }
        place -= count;
    }
}

}  // namespace ddetr

#endif
