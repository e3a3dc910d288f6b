// pack and reduce under emulation.
#include "../kernels/pack.cuh"
#include "../kernels/reduce.cuh"
#include "registry.h"

namespace dbp::emulation {

static Register pack("pack", [](Arguments& a) {
  PackParams p{};
  a("x", p.x)("out", p.out)("mean", p.mean);
  a("size", p.size)("x_stride", p.x_stride)("out_stride", p.out_stride);
  a("x_channel_stride", p.x_channel_stride)("channels", p.channels)("row", p.row);
  a("x_dtype", p.x_dtype)("out_dtype", p.out_dtype);
  return launch_pack(p, nullptr);
});

static Register reduce("reduce", [](Arguments& a) {
  ReduceParams p{};
  a("workspace", p.workspace)("out", p.out)("tiles", p.tiles)("taps", p.taps)("slots", p.slots);
  a("upper", p.upper)("channels", p.channels)("group_channels", p.group_channels);
  a("tap_count", p.tap_count)("block", p.block)("straight", p.straight);
  a("symmetric", p.symmetric)("symmetric_base", p.symmetric_base)("scale", p.scale);
  return launch_reduce(p, nullptr);
});

}  // namespace dbp::emulation
