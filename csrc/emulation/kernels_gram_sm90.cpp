// The second moment's sm_90a kernels under emulation.
#include "../kernels/gram_matrix_sm90.cuh"
#include "../kernels/gram_shift_sm90.cuh"
#include "registry.h"

namespace dbp::emulation {

static Register gram_shift_sm90("gram_shift_sm90", [](Arguments& a) {
  GramShiftParams p{};
  int32_t slots = 0, sets = 0;
  a("x", p.x)("workspace", p.workspace)("items", p.items)("shifts", p.shifts)("masks", p.masks);
  a("pixels", p.pixels)("row_stride", p.row_stride)("channels", p.channels)("size", p.size);
  a("halo", p.halo)("item_count", p.item_count)("block", p.block)("dtype", p.dtype);
  a("slots", slots)("sets", sets);
  if (!gram_shift_sm90_problem(p).found)
    a(gram_shift_sizes(p, slots, sets, GramShiftSm90Shape::shifts()));
  return launch_gram_shift_sm90(p, nullptr);
});

static Register gram_matrix_sm90("gram_matrix_sm90", [](Arguments& a) {
  GramMatrixParams p{};
  int32_t slots = 0;
  a("x", p.x)("workspace", p.workspace)("items", p.items)("rows", p.rows);
  a("row_stride", p.row_stride)("channels", p.channels)("item_count", p.item_count);
  a("dtype", p.dtype);
  a("slots", slots);
  if (!gram_matrix_sm90_problem(p).found) a(gram_matrix_sm90_sizes(p, slots));
  return launch_gram_matrix_sm90(p, nullptr);
});

}  // namespace dbp::emulation
