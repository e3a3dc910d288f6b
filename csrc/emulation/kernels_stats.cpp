#include "../kernels/stats.cuh"
#include "registry.h"

namespace dbp::emulation {

static Register stats("stats", [](Arguments& a) {
  StatsParams p{};
  a("x", p.x)("r", p.r)("workspace", p.workspace)("c", p.c)("v", p.v)("dtype", p.dtype);
  a("image_stride", p.image_stride)("channel_stride", p.channel_stride);
  a("pixel_stride", p.pixel_stride)("images", p.images)("size", p.size)("output", p.output);
  a("kernel", p.kernel)("stride", p.stride)("padding", p.padding)("dilation", p.dilation);
  a("groups", p.groups)("group_channels", p.group_channels)("splits", p.splits);
  return launch_stats(p, nullptr);
});

}  // namespace dbp::emulation
