// The kernels' launchers with operands more than 2^32 elements apart: offsets must be 64-bit.
// Arrays of the emulation lie that far from each other; nothing large is allocated.
#include "emulation/registry.h"
#include "pack.cuh"
#include "reduce.cuh"
#include "stats.cuh"

namespace dbp::emulation {

static constexpr int64_t kFar = int64_t{1} << 32;

static int64_t distance(Global<const float> from, Global<const float> to) {
  const int64_t elements = to.raw - from.raw;
  if (elements < kFar && elements > -kFar) throw std::logic_error("arrays are too close");
  return elements;
}

// Two images (pixels, channels), one per array, to two arrays.
static Register pack_far("far_pack", [](Arguments& a) {
  Global<const float> x[2];
  Global<float> out[2];
  int pixels = 0, channels = 0, last_first = 0;
  a("last_first", last_first);  // which image comes first in the address space
  if (last_first)
    a("x1", x[1])("x0", x[0])("out1", out[1])("out0", out[0]);
  else
    a("x0", x[0])("x1", x[1])("out0", out[0])("out1", out[1]);
  a("pixels", pixels)("channels", channels);
  PackParams p{x[0],
               out[0],
               nullptr,
               {2, 1, 1, pixels},
               {distance(x[0], x[1]), 0, 0, channels},
               {distance(out[0], out[1]), 0, 0, channels},
               1,
               channels,
               channels,
               DType::fp32,
               DType::fp32};
  return launch_pack(p, nullptr);
});

// Two rows, one per array.
static Register stats_far("far_stats", [](Arguments& a) {
  Global<const float> x[2];
  StatsParams p{};
  a("x0", x[0])("x1", x[1])("r", p.r)("workspace", p.workspace)("c", p.c)("v", p.v);
  a("channels", p.group_channels);
  p.x = x[0];
  p.dtype = DType::fp32;
  p.image_stride = distance(x[0], x[1]);
  p.channel_stride = 1;
  p.images = 2;
  for (int d = 0; d < 3; ++d)
    p.size[d] = p.output[d] = p.kernel[d] = p.stride[d] = p.dilation[d] = 1;
  p.groups = p.splits = 1;
  return launch_stats(p, nullptr);
});

// Slots that begin kFar elements into a workspace.
static Register reduce_far("far_reduce", [](Arguments& a) {
  ReduceParams p{};
  a("workspace", p.workspace)("out", p.out)("tiles", p.tiles)("taps", p.taps)("slots", p.slots);
  a("upper", p.upper)("channels", p.channels)("group_channels", p.group_channels);
  a("tap_count", p.tap_count)("block", p.block)("straight", p.straight);
  a("symmetric", p.symmetric)("symmetric_base", p.symmetric_base)("scale", p.scale);
  const int64_t tile = int64_t{p.block} * p.block;
  p.symmetric_base += static_cast<int32_t>(kFar / tile);
  p.workspace = p.workspace - kFar;
  return launch_reduce(p, nullptr);
});

}  // namespace dbp::emulation
