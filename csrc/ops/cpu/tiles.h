// The CPU kernels of one instruction set, as the operator sees them.
#pragma once

#include "../spline_args.h"

// Other compilers do not know the pragma that sets an instruction set for a whole file.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CODED_TORCH_X86_TILES
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

extern const TileKernels kBaselineTiles;
#ifdef CODED_TORCH_X86_TILES
extern const TileKernels kAvx2Tiles;
extern const TileKernels kAvx512Tiles;
#endif

}  // namespace coded_torch
