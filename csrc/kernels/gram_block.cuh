// How a block of threads shares one (block, block) tile of products whose operands are both staged:
// what the box kernel and the direct kernel have in common.
#pragma once

#include "gram_tile.cuh"

namespace dbp {

constexpr bool gram_block_exists(int side) {
  return side == 16 || side == 32 || side == 64 || side == 128;
}

template <DType K, int Block>
struct GramBlock {
  static_assert(gram_block_exists(Block));
  // A warp's tile: 16 kM x 8 kS.
  static constexpr int kM = Block == 128 ? 4 : Block == 64 ? 2 : 1;
  static constexpr int kS = Block >= 64 ? 4 : Block == 32 ? 2 : 1;
  static constexpr int kDown = Block / (16 * kM), kAcross = Block / (8 * kS);
  static constexpr int kWarps = kDown * kAcross, kThreads = kWarps * kWarp;
  static constexpr int kPixels = kStep;  // staged at a time
  static constexpr uint32_t kPitch = row_pitch(K, Block);
  static constexpr uint32_t kOperand = kPixels * kPitch;  // bytes of one staged operand

  int row, column;  // of this warp's tile
  float acc[kS][kM][4] = {};

  __device__ GramBlock() {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    row = warp / kAcross * 16 * kM;
    column = warp % kAcross * 8 * kS;
  }

  // Adds the products of kPixels staged pixels; `left` and `right` are shared addresses.
  __device__ __forceinline__ void multiply_staged(uint32_t left, uint32_t right) {
    uint32_t rows[kS];
#pragma unroll
    for (int s = 0; s < kS; ++s)
      rows[s] = right + threadIdx.x % kWarp * kPitch + (column + 8 * s) * element_bytes(K);
    multiply<K, kM, kS>(acc, left + row * element_bytes(K), kPitch, rows, ~0u);
  }

  __device__ __forceinline__ void store(Global<void> workspace, int64_t slot) const {
#pragma unroll
    for (int s = 0; s < kS; ++s) store_partial(workspace, slot, Block, row, column + 8 * s, acc[s]);
  }
};

}  // namespace dbp
