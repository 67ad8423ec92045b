// The CPU kernels of one instruction set, as the operators see them.
#pragma once

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

// Of those numbers of a row that `columns` name; as many as the arguments' count.
using MaternAmongFunction = void (*)(const MaternArgs& args, const int64_t* columns);

struct MaternKernels {
  MaternFunction run[2];  // float64, float32
  MaternAmongFunction run_among[2];
};

// Pairs of rows whose squared distance is less than this share of their squared lengths are near:
// of inner products, so many digits would cancel. It was not tuned.
constexpr float kNear = 1e-3f;

// Results that are estimated from each other, at one length.
struct LeftOutArgs {
  const float* squared;  // [n, n]
  const float* results;  // [C, n]
  int64_t num_results;   // n
  int64_t num_columns;   // C
  float nugget;
};

// Aligned to 64 bytes. Rows of the matrix have the `stride`, rows of y and half have `columns`;
// both are multiples of 16.
struct LeftOutSpace {
  float *matrix, *inverses, *diagonal, *mean, *squares;  // [n + 3, stride], then [stride] each
  float *y, *half;                                       // [n, columns]
  double* precisions;                                    // [n], not aligned
  int64_t stride, columns;
};

// The results by which the errors of missing rows are bounded: csrc/README.md.
struct ThresholdsArgs {
  const double *variances, *residuals, *shrunk, *deviations;  // [n]
  int64_t num_left_out;                                       // n
  int64_t count;                                              // of all results
  double trust;
  bool is_signed;
};

// Of features, in float64 or float32.
template <class T>
struct FeatureKernels {
  T (*largest)(const T* from, int64_t count);
  void (*add)(const T* from, int64_t count, double factor, double* sums);
  void (*centre)(const T* from, const double* mean, int64_t count, double factor, float* to,
                 double* squares);
};

struct EstimateKernels {
  // Turns a symmetric matrix L D L' into the inverse of L, and of D; false if it is not positive.
  bool (*invert)(float* matrix, int64_t n, int64_t stride, float* inverses);
  // Fills the squares of the residuals, summed over columns, and the precisions of one length.
  // Returns false if its covariance is not positive.
  bool (*left_out)(const LeftOutArgs& args, double scale, const LeftOutSpace& space);
  float (*apart)(const float* one, const float* other, int64_t count);
  bool (*distances)(float* row, float own, const float* squares, int64_t count);
  void (*scale)(const float* from, const float* by, int64_t count, float* to);
  void (*thresholds)(const ThresholdsArgs& args, double variance, double moved,
                     const double* weights, double* limits, double* others);
  FeatureKernels<double> doubles;
  FeatureKernels<float> floats;
};

extern const TileKernels kBaselineTiles;
extern const MaternKernels kBaselineMatern;
extern const EstimateKernels kBaselineEstimate;
#ifdef CODED_TORCH_X86_KERNELS
extern const TileKernels kAvx2Tiles, kAvx512Tiles;
extern const MaternKernels kAvx2Matern, kAvx512Matern;
extern const EstimateKernels kAvx2Estimate, kAvx512Estimate;
#endif

}  // namespace coded_torch
