#include "../kernels/reduce.cuh"
#include "registry.h"

namespace dbp::emulation {

static Register reduce("reduce", [](Arguments& a) {
  ReduceParams p{};
  int32_t entries = 0;
  a("workspace", p.workspace)("out", p.out)("tiles", p.tiles)("taps", p.taps)("slots", p.slots);
  a("upper", p.upper)("channels", p.channels)("group_channels", p.group_channels);
  a("tap_count", p.tap_count)("block", p.block)("straight", p.straight);
  a("symmetric", p.symmetric)("symmetric_base", p.symmetric_base)("scale", p.scale);
  a("entries", entries);
  if (!reduce_problem(p).found) a(reduce_sizes(p, entries));
  return launch_reduce(p, nullptr);
});

}  // namespace dbp::emulation
