// pack, reduce, update and stats under emulation.
#include "../kernels/pack.cuh"
#include "../kernels/reduce.cuh"
#include "../kernels/stats.cuh"
#include "../kernels/update.cuh"
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

static Register update("update", [](Arguments& a) {
  UpdateParams p{};
  a("m", p.m)("e", p.e)("partials", p.partials)("loss", p.loss);
  a("groups", p.groups)("dim", p.dim);
  a("c_weight", p.c_weight)("v_weight", p.v_weight)("c_loss", p.c_loss)("v_loss", p.v_loss);
  return launch_update(p, nullptr);
});

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
