// How the kernels are launched: threads of a block, and what each thread or block takes. csrc/cuda/resources.csv holds what the
// compiler makes of it.
#pragma once

#include <cstdint>

namespace idm::cuda {

// Elementwise: with a 16-byte piece of the widest element each, pieces of a thread; two are in flight before the first is used.
constexpr int ELEMENTWISE_THREADS = 256;
constexpr int PIECES = 2;

// Sums of the partial sums of all blocks, by one block.
constexpr int SUM_THREADS = 512;

// Norms: a block takes so many elements of a channel's plane (NCHW), or all channels of so many positions (NHWC).
constexpr int NORM_THREADS = 256;
constexpr int64_t PLANE_CHUNK = 4096;
constexpr int64_t POSITION_CHUNK = 128;
constexpr int COMBINE_THREADS = 128;

// Products with Φ: a block's rows and columns of the result, and how much of the sum is in shared memory at a time.
// Small tiles, as a batch has few rows (512 at 8 images of 256²) and every multiprocessor should get one.
constexpr int PRODUCT_THREADS = 128;
constexpr int TILE_ROWS = 16;
constexpr int TILE_COLUMNS = 32;
constexpr int TILE_DEPTH = 32;

// LayerNorm: a warp takes a row; sums for the weights take so many rows a block, and their second stage so many columns.
constexpr int64_t ROW_CHUNK = 32;
constexpr int SUM_COLUMNS = 32;

// Injector: threads of a block; blocks that a multiprocessor holds at least (the compiler, not told so, spills to have more); in
// NHWC, so many neighbouring threads take one pixel's channels in turn, so that together they read 128 bytes of float32; channels
// that a thread loads before it uses the first; channels whose sums for the weights a block keeps before it writes them out, a
// multiple of what it takes at a time.
constexpr int INJECT_THREADS = 128;
constexpr int INJECT_BLOCKS = 4;
constexpr int INJECT_LANES = 8;
constexpr int INJECT_DEPTH = 2;
constexpr int INJECT_CHUNK = 32;

}  // namespace idm::cuda
