#include "../kernels/reduce.cuh"
#include "../lib/kernels.h"
#include "launch.h"

namespace {

using namespace dbp_torch;

void reduce(const Tensor& workspace, const Tensor& out, const Tensor& tiles, const Tensor& taps,
            const Tensor& slots, int64_t upper, int64_t channels, int64_t group_channels,
            int64_t tap_count, int64_t block, int64_t straight, int64_t symmetric,
            int64_t symmetric_base, int64_t entries, double scale) {
  const char* kernel = "reduce";
  const Tensors tensors = {
      {"workspace", workspace}, {"out", out}, {"tiles", tiles}, {"taps", taps}, {"slots", slots}};
  dbp::ReduceParams p{};
  p.upper = int32(kernel, "upper", upper);
  p.channels = int32(kernel, "channels", channels);
  p.group_channels = int32(kernel, "group_channels", group_channels);
  p.tap_count = int32(kernel, "tap_count", tap_count);
  p.block = int32(kernel, "block", block);
  p.straight = int32(kernel, "straight", straight);
  p.symmetric = int32(kernel, "symmetric", symmetric);
  p.symmetric_base = int32(kernel, "symmetric_base", symmetric_base);
  p.scale = static_cast<float>(scale);
  require_none(kernel, dbp::reduce_problem(p));
  require_sizes(kernel, dbp::reduce_sizes(p, int32(kernel, "entries", entries)), tensors);
  p.workspace = data<const float>(kernel, "workspace", workspace);
  p.out = data<float>(kernel, "out", out);
  p.tiles = data<const int32_t>(kernel, "tiles", tiles);
  p.taps = data<const int32_t>(kernel, "taps", taps);
  p.slots = data<const int32_t>(kernel, "slots", slots);
  launch(kernel, tensors, [&](cudaStream_t s) { return dbp::compiled::reduce(p, s); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dbp_cuda, m) {
  m.def(
      "reduce(Tensor workspace, Tensor(a!) out, Tensor tiles, Tensor taps, Tensor slots, "
      "int upper, int channels, int group_channels, int tap_count, int block, int straight, "
      "int symmetric, int symmetric_base, int entries, float scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dbp_cuda, CompositeExplicitAutograd, m) {
  m.impl("reduce", TORCH_BOX(&reduce));
}
