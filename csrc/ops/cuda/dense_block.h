// The body of the kernel that multiplies columns by a plan's dense matrix. A warp has 32 packs of
// columns and kDenseRows results of each; the warps of a block share the matrix, or a chunk of its
// rows. Terms are added in the order of the rows that they are made of, whatever the width of
// packs: a column's result depends on nothing but the column.
#pragma once

#include "rows.h"

namespace coded_torch {

// Results a thread adds up at once. Of four columns they make 64 multiplications for 5 loads of 16
// bytes, four of which all lanes share.
constexpr int kDenseRows = 16;
constexpr int kDenseWarps = 8;  // a block at most, at 128 registers a thread two of them
constexpr int kDenseAhead = 2;  // rows of the columns, asked for before they are needed
// Columns of a wide pack: as many as the sums of kDenseRows leave registers for.
template <class T>
constexpr int kDenseWidth = sizeof(T) == 8 ? 1 : 4;

// Entries of shared memory from one row of the matrix to the next: not a multiple of the banks.
CODED_TORCH_HD int dense_stride(int warps, int acc_bytes) {
  return warps * kDenseRows + 16 / acc_bytes;
}

// The block's chunk of the matrix, a row of it for each row in, 0 beyond its end.
template <class Acc>
CODED_TORCH_HD void load_matrix(const SplineArgs& args, const Grid& grid, bool transpose,
                                int first_row, int thread, Acc* to) {
  const Acc* matrix = static_cast<const Acc*>(args.matrix);  // [n, N]
  const int width = grid.threads / kWarp * kDenseRows, rows = static_cast<int>(grid.rows_in);
  const int stride = dense_stride(grid.threads / kWarp, sizeof(Acc));
  const int64_t points = args.num_points;
  for (int i = thread; i < rows * width; i += grid.threads) {
    // Neighbouring threads read neighbouring entries of the matrix, transposed or not.
    const int k = transpose ? i % rows : i / width, r = transpose ? i / rows : i % width;
    const int64_t row = first_row + r;
    const int64_t at = transpose ? row * points + k : k * points + row;
    to[k * stride + r] = row < grid.rows_out ? matrix[at] : Acc{0};
  }
}

// kDenseRows results of pack `index`, from `first_row` on, whose columns of the matrix start there.
template <class T, int kWidth>
CODED_TORCH_HD void dense_pack(const SplineArgs& args, const Grid& grid, int64_t index,
                               int64_t first_row, const acc_t<T>* matrix) {
  using Acc = acc_t<T>;
  using Columns = Pack<Acc, kWidth>;
  using Row = RowPack<T, kWidth>;
  constexpr int kLoad = 16 / sizeof(Acc);
  const int stride = dense_stride(grid.threads / kWarp, sizeof(Acc));
  const int rows_in = static_cast<int>(grid.rows_in);
  const ColumnPack<T, kWidth> pack(args, index);
  const bool gathers = args.gather.rows != nullptr;
  const T* next = pack.in;
  const auto fetch = [&](int32_t k) {
    if (gathers) return pack.fetch(k);
    const Row row = *reinterpret_cast<const Row*>(next);
    next += args.in_row_stride;  // an addition, where an index takes a dozen instructions
    return row;
  };
  RowsAhead<Row, kDenseAhead, decltype(fetch)> rows(fetch, rows_in);
  Columns sums[kDenseRows];
  CODED_TORCH_UNROLL
  for (int r = 0; r < kDenseRows; ++r) sums[r] = Columns::zero();
  CODED_TORCH_UNROLL_BY(kDenseAhead)
  for (int k = 0; k < rows_in; ++k, matrix += stride) {
    const Columns columns = pack.widen(rows.next());
    CODED_TORCH_UNROLL
    for (int r = 0; r < kDenseRows; r += kLoad) {
      const auto some = *reinterpret_cast<const RowPack<Acc, kLoad>*>(matrix + r);
      CODED_TORCH_UNROLL
      for (int i = 0; i < kLoad; ++i) sums[r + i] = sums[r + i] + some.value[i] * columns;
    }
  }
  const int64_t count = grid.rows_out - first_row;
  if (args.scatter.rows != nullptr) {
    CODED_TORCH_UNROLL
    for (int r = 0; r < kDenseRows; ++r) {
      if (r < count) pack.store(first_row + r, sums[r]);
    }
    return;
  }
  T* to = pack.out + first_row * args.out_row_stride;
  CODED_TORCH_UNROLL
  for (int r = 0; r < kDenseRows; ++r, to += args.out_row_stride) {
    if (r < count) pack.write(to, sums[r]);
  }
}

template <class T, int kWidth, class Barrier>
CODED_TORCH_HD void dense_thread(const SplineArgs& args, const Grid& grid, bool transpose,
                                 int64_t block, int thread, void* shared, const Barrier& barrier) {
  using Acc = acc_t<T>;
  const int warps = grid.threads / kWarp, warp = thread / kWarp, lane = thread % kWarp;
  const int64_t chunk = block % grid.chunks, first_row = chunk * warps * kDenseRows;
  const int64_t strides = grid.blocks / grid.chunks;
  const int rows_in = static_cast<int>(grid.rows_in);
  const bool gathers = args.gather.rows != nullptr;
  // The warps share out the rows of a tile that all of them will read.
  const auto ask_for = [&](int64_t tile) {
    const int64_t index = tile * kWarp + lane;
    if (index >= grid.packs) return;
    const ColumnPack<T, kWidth> pack(args, index);
    const T* next = pack.in + warp * args.in_row_stride;
    for (int k = warp; k < rows_in; k += warps, next += warps * args.in_row_stride) {
      const T* row = gathers ? pack.row(k) : next;
      if (row) prefetch(row);
    }
  };
  ask_for(block / grid.chunks);
  Acc* matrix = static_cast<Acc*>(shared);
  load_matrix(args, grid, transpose, static_cast<int>(first_row), thread, matrix);
  barrier();
  for (int64_t tile = block / grid.chunks; tile < grid.tiles; tile += strides) {
    ask_for(tile + strides);
    const int64_t index = tile * kWarp + lane;
    if (index >= grid.packs) continue;
    dense_pack<T, kWidth>(args, grid, index, first_row + warp * kDenseRows,
                          matrix + warp * kDenseRows);
  }
}

}  // namespace coded_torch
