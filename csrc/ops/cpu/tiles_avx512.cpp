#include "tiles.h"

#ifdef CODED_TORCH_X86_TILES
#pragma GCC target("arch=x86-64-v4")
#define CODED_TORCH_TILES kAvx512Tiles
#define CODED_TORCH_VECTOR_BYTES 64
#include "tiles.inc"
#endif
