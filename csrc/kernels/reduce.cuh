// reduce: the second pass of every second moment. Sums the partial tiles of the workspace into S,
// mirrored and scaled, by the tables of dbp_kernels/planning/work.py ("Work" there explains
// slots, tile pairs and kinds). Every element adds its slots in the order of its list, so two runs
// agree bit for bit; elements without a slot are zero, and nothing has to be cleared beforehand.
#pragma once

#include "arguments.cuh"
#include "simt.cuh"

namespace dbp {

struct ReduceParams {
  Global<const float> workspace;  // (slots, block, block)
  Global<float> out;              // (groups, D, D)
  Global<const int32_t> tiles;    // (upper pairs, 4): i, j, number of pair (i, j), of pair (j, i)
  Global<const int32_t> taps;     // (tap pairs, 3): first entry in slots, entries, kind
  Global<const int32_t> slots;
  int32_t upper;  // rows of tiles
  int32_t channels, group_channels, tap_count;
  int32_t block;      // side of a partial tile
  int32_t straight;   // slots of one tile pair
  int32_t symmetric;  // slots of one upper tile pair, for symmetric boxes
  int32_t symmetric_base;
  float scale;  // 1 / samples
};

namespace reduce {

enum Kind : int32_t { kStraight = 0, kTransposed = 1, kSymmetric = 2 };

constexpr int kSquare = 32, kRows = 8;  // a block of 32 x 8 threads writes a 32 x 32 square of S
constexpr int kPitch = kSquare + 1;

// Rows (c, k) with c in channel tile i, columns (d, l) with d in tile j; Taps = 0: any number.
template <int Taps>
__global__ void __launch_bounds__(kSquare* kRows) reduce_kernel(ReduceParams p) {
  auto square = shared_array<float>(0, kSquare * kPitch);
  const int taps = Taps ? Taps : p.tap_count;
  const int side = p.block * taps, squares = ceil_div(side, kSquare);
  const int64_t upper = blockIdx.x / (squares * squares);
  const int a = blockIdx.x / squares % squares, b = blockIdx.x % squares;
  const int i = p.tiles[upper * 4], j = p.tiles[upper * 4 + 1];
  if (i == j && a > b) return;  // written as the mirror image of (b, a)
  const int64_t pair = p.tiles[upper * 4 + 2], transposed_pair = p.tiles[upper * 4 + 3];
  const int64_t tile_size = int64_t{p.block} * p.block;
  const int64_t dim = int64_t{p.group_channels} * taps;

  // Rows and columns of the matrix of all channels; its diagonal blocks are the groups' S.
  auto inside = [&](int row, int column, int& group) {
    const int c = i * p.block + row / taps, d = j * p.block + column / taps;
    group = c / p.group_channels;
    return row < side && column < side && c < p.channels && d < p.channels &&
           group == d / p.group_channels;
  };

  const int column = b * kSquare + threadIdx.x;
  const int d = column / taps, l = column % taps;
  for (int y = threadIdx.y; y < kSquare; y += kRows) {
    const int row = a * kSquare + y;
    const int c = row / taps, k = row % taps;
    float total = 0.0f;
    int group;
    if (inside(row, column, group)) {
      const int64_t index = 3 * (k * taps + l);
      const int first = p.taps[index], count = p.taps[index + 1], kind = p.taps[index + 2];
      const int64_t base = kind == kSymmetric    ? p.symmetric_base + upper * p.symmetric
                           : kind == kTransposed ? transposed_pair * p.straight
                                                 : pair * p.straight;
      // of a symmetric block only the upper triangle is read, also within a tile
      const bool swap = kind == kTransposed || (kind == kSymmetric && i == j && c > d);
      const int within = swap ? d * p.block + c : c * p.block + d;
      for (int entry = 0; entry < count; ++entry) {
        const int64_t slot = base + p.slots[first + entry];
        total += p.workspace[slot * tile_size + within];
      }
      total *= p.scale;
      const int64_t corner = group * dim;  // first row and column of the group
      const int64_t r = int64_t{i} * side + row, s = int64_t{j} * side + column;
      p.out[r * dim + s - corner] = total;
    }
    square[y * kPitch + threadIdx.x] = total;
  }
  if (i == j && a == b) return;  // its own mirror image

  __syncthreads();
  const int mirrored = a * kSquare + threadIdx.x;  // rows become columns
  for (int y = threadIdx.y; y < kSquare; y += kRows) {
    const int from = b * kSquare + y;
    int group;
    if (inside(mirrored, from, group)) {
      const int64_t corner = group * dim;
      const int64_t r = int64_t{i} * side + mirrored, s = int64_t{j} * side + from;
      p.out[s * dim + r - corner] = square[threadIdx.x * kPitch + y];
    }
  }
}

inline int64_t block_count(const ReduceParams& p) {
  const int64_t squares = ceil_div(int64_t{p.block} * p.tap_count, kSquare);
  return elements({p.upper, squares, squares});
}

}  // namespace reduce

inline Problem reduce_problem(const ReduceParams& p) {
  return first_problem({
      {p.tap_count < 1, "tap_count", p.tap_count, "1 or more"},
      {p.block < 1, "block", p.block, "1 or more"},
      {p.channels < 0, "channels", p.channels, "0 or more"},
      {p.group_channels < 1 || p.channels % p.group_channels != 0, "group_channels",
       p.group_channels, "a divisor of channels"},
      {p.straight < 0, "straight", p.straight, "0 or more"},
      {p.symmetric < 0, "symmetric", p.symmetric, "0 or more"},
      {p.symmetric_base < 0 || (p.straight > 0 && p.symmetric_base % p.straight != 0),
       "symmetric_base", p.symmetric_base, "a multiple of straight"},
      {p.upper < 0 || reduce::block_count(p) > 0x7fffffff, "upper", p.upper,
       "0 or more, and a grid of at most 2147483647 blocks"},
  });
}

// For `entries` of all lists of slots.
inline std::array<ArraySize, 5> reduce_sizes(const ReduceParams& p, int64_t entries) {
  const int64_t groups = p.channels / p.group_channels,
                dim = int64_t{p.group_channels} * p.tap_count;
  const int64_t slots = p.symmetric_base + int64_t{p.upper} * p.symmetric;
  return {{{"workspace", elements({slots, p.block, p.block}), false},
           {"out", elements({groups, dim, dim}), true},
           {"tiles", elements({p.upper, 4}), true},
           {"taps", elements({p.tap_count, p.tap_count, 3}), true},
           {"slots", entries, true}}};
}

inline cudaError_t launch_reduce(const ReduceParams& p, cudaStream_t stream) {
  if (reduce_problem(p).found) return cudaErrorInvalidValue;
  const auto blocks = static_cast<unsigned>(reduce::block_count(p));
  const auto kernel = p.tap_count == 1 ? reduce::reduce_kernel<1> : reduce::reduce_kernel<0>;
  return launch(kernel, dim3(blocks), dim3(reduce::kSquare, reduce::kRows),
                sizeof(float) * reduce::kSquare * reduce::kPitch, stream, p);
}

}  // namespace dbp
