#include "../kernels/reduce.cuh"
#include "registry.h"

namespace dbp::emulation {

static Register reduce("reduce", [](Arguments& a) {
  ReduceParams p{};
  a("workspace", p.workspace)("out", p.out)("tiles", p.tiles)("taps", p.taps)("slots", p.slots);
  a("upper", p.upper)("channels", p.channels)("group_channels", p.group_channels);
  a("tap_count", p.tap_count)("block", p.block)("straight", p.straight);
  a("symmetric", p.symmetric)("symmetric_base", p.symmetric_base)("scale", p.scale);
  return launch_reduce(p, nullptr);
});

}  // namespace dbp::emulation
