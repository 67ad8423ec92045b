#include "kernels.h"

#ifdef CODED_TORCH_X86_KERNELS
#pragma GCC target("arch=x86-64-v4")
#define CODED_TORCH_TILES kAvx512Tiles
#define CODED_TORCH_MATERN kAvx512Matern
#define CODED_TORCH_DISTANCES kAvx512Distances
#define CODED_TORCH_LEFT_OUT kAvx512LeftOut
#define CODED_TORCH_VECTOR_BYTES 64
#include "distances.inc"
#include "left_out.inc"
#include "matern.inc"
#include "spline.inc"
#endif
