// The second moment's matrix kernels under emulation.
#include "../kernels/gram_box.cuh"
#include "../kernels/gram_direct.cuh"
#include "../kernels/gram_shift.cuh"
#include "registry.h"

namespace dbp::emulation {

static Register gram_shift("gram_shift", [](Arguments& a) {
  GramShiftParams p{};
  int32_t slots = 0, sets = 0;
  a("x", p.x)("workspace", p.workspace)("items", p.items)("shifts", p.shifts)("masks", p.masks);
  a("pixels", p.pixels)("row_stride", p.row_stride)("channels", p.channels)("size", p.size);
  a("halo", p.halo)("item_count", p.item_count)("block", p.block)("dtype", p.dtype);
  a("slots", slots)("sets", sets);
  if (!gram_shift_problem(p).found) a(gram_shift_sizes(p, slots, sets, gram_shift_set(p.block)));
  return launch_gram_shift(p, nullptr);
});

static Register gram_box("gram_box", [](Arguments& a) {
  GramBoxParams p{};
  int32_t slots = 0, boxes = 0;
  a("x", p.x)("workspace", p.workspace)("items", p.items)("boxes", p.boxes);
  a("stride_n", p.stride_n)("stride", p.stride)("step", p.step)("channels", p.channels);
  a("item_count", p.item_count)("block", p.block)("dtype", p.dtype);
  a("slots", slots)("box_count", boxes);
  if (!gram_box_problem(p).found) a(gram_box_sizes(p, slots, boxes));
  return launch_gram_box(p, nullptr);
});

static Register gram_direct("gram_direct", [](Arguments& a) {
  GramDirectParams p{};
  int32_t slots = 0;
  a("x", p.x)("workspace", p.workspace)("items", p.items);
  a("stride_n", p.stride_n)("stride_c", p.stride_c)("stride", p.stride)("size", p.size);
  a("output", p.output)("kernel", p.kernel)("conv_stride", p.conv_stride)("padding", p.padding);
  a("dilation", p.dilation)("columns", p.columns)("item_count", p.item_count);
  a("block", p.block)("dtype", p.dtype);
  a("slots", slots);
  if (!gram_direct_problem(p).found) a(gram_direct_sizes(p, slots));
  return launch_gram_direct(p, nullptr);
});

}  // namespace dbp::emulation
