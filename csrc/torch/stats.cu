#include "../kernels/stats.cuh"
#include "../lib/kernels.h"
#include "launch.h"

namespace {

using namespace dbp_torch;
using Ints = std::vector<int64_t>;

void stats(const Tensor& x, const Tensor& r, const Tensor& workspace, const Tensor& c,
           const Tensor& v, int64_t element, int64_t image_stride, int64_t channel_stride,
           const Ints& pixel_stride, int64_t images, const Ints& size, const Ints& output,
           const Ints& taps, const Ints& stride, const Ints& padding, const Ints& dilation,
           int64_t groups, int64_t group_channels, int64_t splits) {
  const char* name = "stats";
  dbp::StatsParams p{};
  fill(name, "pixel_stride", pixel_stride, p.pixel_stride);
  fill(name, "size", size, p.size);
  fill(name, "output", output, p.output);
  fill(name, "kernel", taps, p.kernel);
  fill(name, "stride", stride, p.stride);
  fill(name, "padding", padding, p.padding);
  fill(name, "dilation", dilation, p.dilation);
  p.dtype = dtype(name, "x", x, element);
  p.image_stride = image_stride;
  p.channel_stride = channel_stride;
  p.images = images;
  p.groups = int32(name, "groups", groups);
  p.group_channels = int32(name, "group_channels", group_channels);
  p.splits = int32(name, "splits", splits);
  require_none(name, dbp::stats_problem(p));
  require_extent(name, "x", x,
                 {{images, image_stride},
                  {groups * group_channels, channel_stride},
                  {p.size[0], p.pixel_stride[0]},
                  {p.size[1], p.pixel_stride[1]},
                  {p.size[2], p.pixel_stride[2]}});
  const int64_t dim = dbp::stats::patch_length(p);
  p.x = x.const_data_ptr();
  p.r = data<const float>(name, "r", r, groups * dim * dim);
  p.workspace =
      data<float>(name, "workspace", workspace, dbp::elements({groups, dim, dim, splits}));
  p.c = data<float>(name, "c", c, groups * dim * dim);
  p.v = data<float>(name, "v", v, groups * dim);
  launch(name, {{"x", x}, {"r", r}, {"workspace", workspace}, {"c", c}, {"v", v}},
         [&](cudaStream_t stream) { return dbp::compiled::stats(p, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dbp_cuda, m) {
  m.def(
      "stats(Tensor x, Tensor r, Tensor(a!) workspace, Tensor(b!) c, Tensor(c!) v, int dtype, "
      "int image_stride, int channel_stride, int[] pixel_stride, int images, int[] size, "
      "int[] output, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, "
      "int group_channels, int splits) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dbp_cuda, CompositeExplicitAutograd, m) {
  m.impl("stats", TORCH_BOX(&stats));
}
