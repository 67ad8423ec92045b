// The bodies of the CUDA kernels of squared_distances and inner_products, and their launch
// configuration. A block has a tile of pairs: 64 rows by 64 others, whose numbers pass through
// shared memory 16 columns at a time. Tiles below the diagonal are those above it.
//
// Sums are made of slices of the columns, in order. Where there are too few tiles for the card,
// slices are divided over blocks, and a second kernel adds up their sums in the same order: a
// pair's result depends on nothing but its two rows.
#pragma once

#include <algorithm>

#include "../../math/distances.h"
#include "../distances_args.h"
#include "rows.h"

namespace coded_torch {

constexpr int kPairsTile = 64;
constexpr int kPairsSide = 4;  // a thread has so many rows, and as many others
constexpr int kPairsAcross = kPairsTile / kPairsSide;
constexpr int kPairsThreads = kPairsAcross * kPairsAcross;
constexpr int kPairsStep = 16;  // columns in shared memory at once
constexpr int kPairsMine = kPairsTile * kPairsStep / kPairsThreads;  // numbers a thread fetches
constexpr int64_t kMostSlices = 64;
constexpr int64_t kLeastSlice = 256;  // columns: a sum is written for 256 multiplications
constexpr int64_t kPairsInTile = kPairsTile * kPairsTile;

// From one column in shared memory to the next: 16-byte loads stay aligned, and 16 columns do not
// start in the same bank.
template <class T>
constexpr int kPairsStride = kPairsTile + 16 / sizeof(T);
template <class T>
constexpr int kPairsShared = 2 * kPairsStep * kPairsStride<T> * static_cast<int>(sizeof(T));

struct PairsGrid {
  int64_t side;    // tiles across
  int64_t tiles;   // on and above the diagonal
  int64_t slice;   // columns of a slice
  int64_t slices;  // in all
  int64_t parts;   // blocks of a tile: 1, or the slices
  int64_t blocks;
};

inline PairsGrid plan_pairs(const DistancesArgs& args, int multiprocessors) {
  const auto over = [](int64_t count, int64_t by) { return (count + by - 1) / by; };
  PairsGrid grid{};
  grid.side = over(args.num_rows, kPairsTile);
  grid.tiles = grid.side * (grid.side + 1) / 2;
  grid.slice =
      std::max(kLeastSlice, over(over(args.num_columns, kMostSlices), kPairsStep) * kPairsStep);
  grid.slices = std::max<int64_t>(over(args.num_columns, grid.slice), 1);
  // Twice as many tiles as half the card takes would fill it by themselves; and workspaces stay
  // below 70 MB of float32 on an H100.
  grid.parts = 2 * grid.tiles <= multiprocessors ? grid.slices : 1;
  grid.blocks = grid.tiles * grid.parts;
  return grid;
}

// The rows and the others that a tile begins with; tiles go from left to right, then down.
struct PairsTile {
  int64_t first, other;

  CODED_TORCH_HD PairsTile(int64_t tile, int64_t side) {
    int64_t row = 0;
    while (tile >= side - row) tile -= side - row++;
    first = row * kPairsTile;
    other = (row + tile) * kPairsTile;
  }
};

// Writes a pair's result to both of its places.
template <Pairs kPairs, class T>
CODED_TORCH_HD void store_pair(const DistancesArgs& args, int64_t left, int64_t right, T sum) {
  const int64_t n = args.num_rows;
  if (right < left || right >= n) return;  // below the diagonal, or no pair
  if constexpr (kPairs == Pairs::kDistances) {
    const T* squares = static_cast<const T*>(args.squares);
    sum = beyond_rounding(sum, squares[left], squares[right], static_cast<T>(args.nothing));
  }
  T* out = static_cast<T*>(args.out);
  out[left * n + right] = sum;
  out[right * n + left] = sum;
}

// One block of pairs. `partial` receives its sums where grid.parts > 1.
template <Pairs kPairs, class T, class Barrier>
CODED_TORCH_HD void pairs_thread(const DistancesArgs& args, const PairsGrid& grid, int64_t block,
                                 int thread, void* shared, T* partial, const Barrier& barrier) {
  constexpr int kStride = kPairsStride<T>;
  using Sides = Pack<T, kPairsSide>;
  const int64_t part = block / grid.tiles;
  const PairsTile tile(block % grid.tiles, grid.side);
  const int64_t length = grid.parts > 1 ? grid.slice : args.num_columns;
  const int64_t begin = part * length;
  const int64_t end = begin + length < args.num_columns ? begin + length : args.num_columns;
  T* rows = static_cast<T*>(shared);
  T* others = rows + kPairsStep * kStride;
  // Neighbouring threads fetch neighbouring columns.
  const int column = thread % kPairsStep, line = thread / kPairsStep;
  constexpr int kLines = kPairsThreads / kPairsStep;
  T next[2][kPairsMine];
  const auto fetch = [&](int64_t from) {
    const int64_t at = from + column;
    CODED_TORCH_UNROLL
    for (int i = 0; i < kPairsMine; ++i) {
      const int64_t a = tile.first + line + i * kLines, b = tile.other + line + i * kLines;
      const T* numbers = static_cast<const T*>(args.rows);
      next[0][i] = at < end && a < args.num_rows ? numbers[a * args.stride + at] : T{0};
      next[1][i] = at < end && b < args.num_rows ? numbers[b * args.stride + at] : T{0};
    }
  };
  const int across = thread % kPairsAcross * kPairsSide, down = thread / kPairsAcross * kPairsSide;
  T sums[kPairsSide][kPairsSide]{}, totals[kPairsSide][kPairsSide]{};
  fetch(begin);
  int64_t slice_end = begin + grid.slice;
  for (int64_t from = begin; from < end; from += kPairsStep) {
    barrier();  // nobody reads the columns before these any more
    CODED_TORCH_UNROLL
    for (int i = 0; i < kPairsMine; ++i) {
      rows[column * kStride + line + i * kLines] = next[0][i];
      others[column * kStride + line + i * kLines] = next[1][i];
    }
    barrier();
    fetch(from + kPairsStep);
    CODED_TORCH_UNROLL
    for (int k = 0; k < kPairsStep; ++k) {
      const auto a = *reinterpret_cast<const Sides*>(rows + k * kStride + down);
      const auto b = *reinterpret_cast<const Sides*>(others + k * kStride + across);
      add_terms<kPairs>(a.lane, b.lane, sums);
    }
    if (from + kPairsStep >= (slice_end < end ? slice_end : end)) {
      slice_end += grid.slice;
      CODED_TORCH_UNROLL
      for (int i = 0; i < kPairsSide; ++i) {
        CODED_TORCH_UNROLL
        for (int j = 0; j < kPairsSide; ++j) {
          totals[i][j] = totals[i][j] + sums[i][j];
          sums[i][j] = 0;
        }
      }
    }
  }
  CODED_TORCH_UNROLL
  for (int i = 0; i < kPairsSide; ++i) {
    CODED_TORCH_UNROLL
    for (int j = 0; j < kPairsSide; ++j) {
      if (grid.parts > 1) {
        partial[block * kPairsInTile + (down + i) * kPairsTile + across + j] = totals[i][j];
      } else {
        store_pair<kPairs>(args, tile.first + down + i, tile.other + across + j, totals[i][j]);
      }
    }
  }
}

// Adds up the slices of one pair.
template <Pairs kPairs, class T>
CODED_TORCH_HD void add_slices_thread(const DistancesArgs& args, const PairsGrid& grid,
                                      const T* partial, int64_t thread) {
  const int64_t pairs = grid.tiles * kPairsInTile;
  if (thread >= pairs) return;
  const PairsTile tile(thread / kPairsInTile, grid.side);
  const int64_t at = thread % kPairsInTile;
  T sum{0};
  for (int64_t part = 0; part < grid.parts; ++part) sum = sum + partial[part * pairs + thread];
  store_pair<kPairs>(args, tile.first + at / kPairsTile, tile.other + at % kPairsTile, sum);
}

}  // namespace coded_torch
