// What the staged-halo kernels are given (gram_shift.cuh, gram_shift_sm90.cuh), and which shifts a
// pixel takes part in.
#pragma once

#include "arguments.cuh"
#include "simt.cuh"

namespace dbp {

struct GramShiftParams {
  // (pixels, row_stride) elements of `dtype`: images, z, y, x in order, nothing between the pixels.
  // Base and row_stride are multiples of 16 bytes.
  Global<const void> x;
  Global<void> workspace;  // float32 (slots, block, block)
  // (item_count, 8): channel tiles i and j, part of the tile's columns, set of shifts, first and
  // last pixel, slot of the item's first straight shift, slot of its first symmetric one (-1: it
  // computes none)
  Global<const int32_t> items;
  // (sets, groups of warps, shifts of a group, 4): pixels from left to right (<= 0), the slot to
  // add to the item's, 1 if symmetric, 1 if used. Those that are not used, and before them a
  // symmetric one, are a group's last.
  Global<const int32_t> shifts;
  // (sets, size z + size y + size x): bit s: this coordinate of a left pixel lies in the box of
  // the set's shift s
  Global<const int32_t> masks;
  int64_t pixels;
  int64_t row_stride;
  int32_t channels;  // that may be read: all, padded to a multiple of 16 bytes
  int32_t size[3];   // z, y, x
  int32_t halo;      // pixels the farthest shift reaches back
  int32_t item_count;
  int32_t block;  // channels of a tile: 16, 32 or 64
  DType dtype;
};

// What neither of the kernels takes. `block_fits` and `shared_bytes`, of a block of threads, are
// the kernel's own.
inline Problem gram_shift_problem(const GramShiftParams& p, bool block_fits, const char* blocks,
                                  int64_t shared_bytes) {
  const int64_t vector = 16 / size_of(p.dtype), image = elements({p.size[0], p.size[1], p.size[2]});
  return first_problem({
      {p.item_count < 0, "item_count", p.item_count, "0 or more"},
      {!block_fits, "block", p.block, blocks},
      {p.size[0] < 1, "size", p.size[0], "1 or more along z"},
      {p.size[1] < 1, "size", p.size[1], "1 or more along y"},
      {p.size[2] < 1, "size", p.size[2], "1 or more along x"},
      {p.pixels < 0 || p.pixels > kMaxPixels || (image > 0 && p.pixels % image), "pixels", p.pixels,
       "those of whole images of this size, at most 2147418112"},
      {p.row_stride < 1 || p.row_stride % vector != 0, "row_stride", p.row_stride,
       "a multiple of 16 bytes"},
      {p.channels < 1 || p.channels % vector != 0 || p.channels > p.row_stride, "channels",
       p.channels, "a multiple of 16 bytes, at most row_stride"},
      {p.halo < 0 || shared_bytes > 227 * 1024, "halo", p.halo,
       "0 or more, and no more than fits into 227 KB of shared memory"},
  });
}

// For `sets` rows of masks, `set_shifts` shifts of each, and `slots` tiles in the workspace.
inline std::array<ArraySize, 4> gram_shift_sizes(const GramShiftParams& p, int64_t slots,
                                                 int64_t sets, int64_t set_shifts) {
  return {{{"workspace", elements({slots, p.block, p.block}), false},
           {"items", elements({p.item_count, 8}), true},
           {"shifts", elements({sets, set_shifts, 4}), true},
           {"masks", elements({sets, int64_t{p.size[0]} + p.size[1] + p.size[2]}), true}}};
}

// Which shifts' boxes the left pixels first, first + step, ... of a set lie in, as bits.
struct GramShiftMasks {
  Global<const int32_t> of_z, of_y, of_x;
  int32_t size_z, size_y, size_x;
  int32_t step, step_z, step_y, step_x;
  int32_t pixel, z, y, x, last;

  __device__ GramShiftMasks(const GramShiftParams& p, int set, int first, int last, int step)
      : size_z(p.size[0]),
        size_y(p.size[1]),
        size_x(p.size[2]),
        step(step),
        step_z(step / size_x / size_y % size_z),
        step_y(step / size_x % size_y),
        step_x(step % size_x),
        pixel(first),
        z(first / size_x / size_y % size_z),
        y(first / size_x % size_y),
        x(first % size_x),
        last(last) {
    of_z = p.masks + int64_t{set} * (size_z + size_y + size_x);
    of_y = of_z + size_z;
    of_x = of_y + size_y;
  }

  __device__ __forceinline__ uint32_t next() {
    uint32_t mask = 0;  // of a pixel that is not the item's
    if (pixel < last) mask = of_x[x] & of_y[y] & of_z[z];
    pixel += step;
    if ((x += step_x) >= size_x) x -= size_x, ++y;
    if ((y += step_y) >= size_y) y -= size_y, ++z;
    if ((z += step_z) >= size_z) z -= size_z;
    return mask;
  }
};

}  // namespace dbp
