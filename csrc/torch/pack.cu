#include "../kernels/pack.cuh"
#include "../lib/kernels.h"
#include "launch.h"

namespace {

using namespace dbp_torch;

void pack(const Tensor& x, const Tensor& out, const std::optional<Tensor>& mean,
          const std::vector<int64_t>& size, const std::vector<int64_t>& x_stride,
          const std::vector<int64_t>& out_stride, int64_t x_channel_stride, int64_t channels,
          int64_t row, int64_t x_dtype, int64_t out_dtype) {
  dbp::PackParams p{};
  fill("pack", "size", size, p.size);
  fill("pack", "x_stride", x_stride, p.x_stride);
  fill("pack", "out_stride", out_stride, p.out_stride);
  p.x_channel_stride = x_channel_stride;
  p.channels = int32("pack", "channels", channels);
  p.row = int32("pack", "row", row);
  p.x_dtype = dtype("pack", "x", x, x_dtype);
  p.out_dtype = dtype("pack", "out", out, out_dtype);
  require_none("pack", dbp::pack_problem(p));
  std::vector<Dimension> read = {{channels, x_channel_stride}}, written = {{row, 1}};
  for (int d = 0; d < 4; ++d) {
    read.push_back({p.size[d], p.x_stride[d]});
    written.push_back({p.size[d], p.out_stride[d]});
  }
  require_extent("pack", "x", x, read);
  require_extent("pack", "out", out, written);
  require_aligned("pack", "out", out);
  p.x = x.const_data_ptr();
  p.out = out.mutable_data_ptr();
  if (mean) p.mean = data<const float>("pack", "mean", *mean, channels);
  launch("pack", {{"x", x}, {"out", out}, {"mean", mean}},
         [&](cudaStream_t stream) { return dbp::compiled::pack(p, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dbp_cuda, m) {
  m.def(
      "pack(Tensor x, Tensor(a!) out, Tensor? mean, int[] size, int[] x_stride, int[] out_stride, "
      "int x_channel_stride, int channels, int row, int x_dtype, int out_dtype) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dbp_cuda, CompositeExplicitAutograd, m) {
  m.impl("pack", TORCH_BOX(&pack));
}
