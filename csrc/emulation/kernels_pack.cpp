#include "../kernels/pack.cuh"
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

}  // namespace dbp::emulation
