// The CPU kernels of one instruction set, as the operators see them.
#pragma once

#include "../distances_args.h"
#include "../left_out_args.h"
#include "../matern_args.h"
#include "../spline_args.h"

// Other compilers do not know the pragma that sets an instruction set for a whole file.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CODED_TORCH_X86_KERNELS
#endif

namespace coded_torch {

// Runs tiles begin .. end - 1 of the (group, column tile) grid. `kept` holds num_kept_states * 2 *
// kTileBytes bytes, aligned to 64. `stream`: results bypass the cache; rows must allow it.
using TileFunction = void (*)(const SplineArgs& args, int64_t begin, int64_t end, void* kept,
                              bool stream);

struct TileKernels {
  int tile_bytes;          // of one row of a tile, in the accumulation type
  TileFunction run[4][2];  // [DType][transpose]
};

// Of numbers begin .. end - 1.
using MaternFunction = void (*)(const MaternArgs& args, int64_t begin, int64_t end);

// Of rows begin .. end - 1 of the result.
using MaternAmongFunction = void (*)(const MaternAmongArgs& args, int64_t begin, int64_t end);

struct MaternKernels {
  MaternFunction run[2];  // float64, float32
  MaternAmongFunction run_among[2];
};

// So many rows are taken with a few of a block at a time; blocks stay in cache meanwhile.
constexpr int kDistancesRows = 4;
constexpr int64_t kDistancesBlock = 64;

// Of blocks begin .. end - 1. Rows are aligned to 64 bytes, their stride too; beyond the columns,
// up to the stride, they are 0, and so are kDistancesRows rows behind the last.
using DistancesFunction = void (*)(const DistancesArgs& args, int64_t begin, int64_t end);

struct DistancesKernels {
  DistancesFunction distances[2], products[2];  // float64, float32
};

// The memory of one length, aligned to 64 bytes. Rows of the matrix have the `stride`, rows of y
// and half have `columns`; both are multiples of 16.
struct LeftOutSpace {
  float *matrix, *inverses, *diagonal, *mean, *squares;  // [n + 3, stride], then [stride] each
  float *y, *half;                                       // [n, columns]
  double* precisions;                                    // [n], not aligned
  int64_t stride, columns;
};

// Fills the squares of the residuals, summed over columns, and the precisions of one length.
// Returns false if its covariance is not positive.
using LeftOutFunction = bool (*)(const LeftOutArgs& args, int64_t length,
                                 const LeftOutSpace& space);

extern const TileKernels kBaselineTiles;
extern const MaternKernels kBaselineMatern;
extern const DistancesKernels kBaselineDistances;
extern const LeftOutFunction kBaselineLeftOut;
#ifdef CODED_TORCH_X86_KERNELS
extern const TileKernels kAvx2Tiles, kAvx512Tiles;
extern const MaternKernels kAvx2Matern, kAvx512Matern;
extern const DistancesKernels kAvx2Distances, kAvx512Distances;
extern const LeftOutFunction kAvx2LeftOut, kAvx512LeftOut;
#endif

}  // namespace coded_torch
