// How the CUDA kernels of splines find, read and write rows of columns, and meet. Their bodies are
// functions of (block, thread, shared memory) that run on the host as well: the CPU tests run them
// over whole grids.
#pragma once

#include <cstddef>
#include <cstring>

#include "../../math/half.h"
#include "../spline_args.h"

namespace coded_torch {

constexpr int kWarp = 32;
// Of a multiprocessor, at 128 registers a thread.
constexpr int kResidentThreads = 512;

// The kernels: sweeps whose states lie in shared memory or in a workspace, and products of packs of
// one column or of several.
enum class Kind { kSweep, kWorkspaceSweep, kProduct, kWideProduct };

// A launch. All but blocks, threads and bytes is for products.
struct Grid {
  int64_t rows_in;
  int64_t rows_out;
  int64_t packs;   // of columns, over all groups
  int64_t tiles;   // of 32 packs
  int64_t chunks;  // of rows_out; a block has one, and strides over tiles
  int64_t blocks;
  int64_t workspace_bytes;  // in all
  int threads;              // a block
  int shared_bytes;         // a block
};
// The host's compiler and NVRTC agree how large they are.
static_assert(sizeof(Grid) == 64 && sizeof(SplineArgs) == 168);

// Where all threads of a block meet. Hosts pass their own.
struct BlockBarrier {
  CODED_TORCH_HD void operator()() const {
#if defined(__CUDA_ARCH__)
    __syncthreads();
#endif
  }
};

// A row's worth of a thread's columns, moved as one access.
template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) RowPack {
  T value[kWidth];

  CODED_TORCH_HD T operator[](int i) const { return value[i]; }
};

// Numbers that no kernel writes while another reads them, 16 bytes in one load, which NVRTC may
// move ahead of stores.
template <class Row>
CODED_TORCH_HD Row load_constant(const void* from) {
#if defined(__CUDA_ARCH__)
  static_assert(sizeof(Row) % sizeof(uint4) == 0);
  uint4 bits[sizeof(Row) / sizeof(uint4)];
  CODED_TORCH_UNROLL
  for (int i = 0; i < static_cast<int>(sizeof(Row) / sizeof(uint4)); ++i) {
    bits[i] = __ldg(static_cast<const uint4*>(from) + i);
  }
  Row row;
  memcpy(&row, bits, sizeof row);
  return row;
#else
  return *static_cast<const Row*>(from);
#endif
}

CODED_TORCH_HD int32_t load_constant(const int32_t* from) {
#if defined(__CUDA_ARCH__)
  return __ldg(from);
#else
  return *from;
#endif
}

// Results are not read again here, so they are the first to leave the cache. As one access of 16
// bytes, into which NVRTC does not join a pack's stores by itself.
template <class Row>
CODED_TORCH_HD void store_row(void* to, const Row& row) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Row) == sizeof(uint4)) {
    uint4 bits;
    memcpy(&bits, &row, sizeof bits);
    __stcs(static_cast<uint4*>(to), bits);
    return;
  } else if constexpr (sizeof(Row) == sizeof(uint2)) {
    uint2 bits;
    memcpy(&bits, &row, sizeof bits);
    __stcs(static_cast<uint2*>(to), bits);
    return;
  }
#endif
  *static_cast<Row*>(to) = row;
}

// Asks for the memory's line, to be in the second-level cache when it is read.
CODED_TORCH_HD void prefetch(const void* line) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(line)));
#else
  static_cast<void>(line);
#endif
}

// The numbers first, first + 1, .. of a sequence of `count`, each fetched `kAhead` before it is
// handed out.
template <class Row, int kAhead, class Fetch>
class RowsAhead {
 public:
  // fetch(k) reads the k-th row of `count`.
  CODED_TORCH_HD RowsAhead(const Fetch& fetch, int32_t count) : fetch_(fetch), count_(count) {
    CODED_TORCH_UNROLL
    for (int k = 0; k < kAhead; ++k) fetch_next(&rows_[k]);
  }
  CODED_TORCH_HD Row next() {
    const Row row = rows_[0];
    CODED_TORCH_UNROLL
    for (int k = 1; k < kAhead; ++k) rows_[k - 1] = rows_[k];
    fetch_next(&rows_[kAhead - 1]);
    return row;
  }

 private:
  CODED_TORCH_HD void fetch_next(Row* row) {
    if (fetched_ < count_) *row = fetch_(fetched_++);
  }

  const Fetch& fetch_;
  int32_t count_, fetched_ = 0;
  Row rows_[kAhead];
};

// The columns of one thread: `kWidth` of one group.
template <class T, int kWidth>
struct ColumnPack {
  using Row = RowPack<T, kWidth>;
  using Columns = Pack<acc_t<T>, kWidth>;
  const SplineArgs& args;
  int64_t group;
  const T* in;
  T* out;

  // Packs are numbered over all groups.
  CODED_TORCH_HD ColumnPack(const SplineArgs& arguments, int64_t index) : args(arguments) {
    const int64_t packs = args.num_columns / kWidth;
    group = index / packs;
    const int64_t column = index % packs * kWidth;
    in = static_cast<const T*>(args.in) + group * args.in_group_stride + column;
    out = static_cast<T*>(args.out) + group * args.out_group_stride + column;
  }
  // Null where the group has no such row.
  CODED_TORCH_HD const T* row(int64_t k) const {
    const int64_t at = args.gather.at(k, group);
    return at < 0 ? nullptr : in + at * args.in_row_stride;
  }
  CODED_TORCH_HD Row fetch(int64_t k) const {
    const T* from = row(k);
    return from == nullptr ? Row{} : *reinterpret_cast<const Row*>(from);
  }
  CODED_TORCH_HD static Columns widen(const Row& row) {
    Columns columns;
    CODED_TORCH_UNROLL
    for (int i = 0; i < kWidth; ++i) columns.lane[i] = to_float(row.value[i]);
    return columns;
  }
  CODED_TORCH_HD void store(int64_t j, const Columns& columns) const {
    const int64_t at = args.scatter.at(j, group);
    if (at >= 0) write(out + at * args.out_row_stride, columns);
  }
  CODED_TORCH_HD static void write(T* to, const Columns& columns) {
    Row row;
    CODED_TORCH_UNROLL
    for (int i = 0; i < kWidth; ++i) from_float(columns.lane[i], &row.value[i]);
    store_row(to, row);
  }
};

}  // namespace coded_torch
