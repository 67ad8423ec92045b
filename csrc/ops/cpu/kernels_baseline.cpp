// Whatever the compiler takes as given: SSE2 on x86-64, NEON on ARM.
#define CODED_TORCH_TILES kBaselineTiles
#define CODED_TORCH_MATERN kBaselineMatern
#define CODED_TORCH_ESTIMATE kBaselineEstimate
#define CODED_TORCH_VECTOR_BYTES 16
#include "estimate.inc"
#include "matern.inc"
#include "spline.inc"
