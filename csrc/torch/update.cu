#include "../kernels/update.cuh"
#include "../lib/kernels.h"
#include "launch.h"

namespace {

using namespace dbp_torch;

void update(const Tensor& m, const Tensor& e, const Tensor& partials, const Tensor& sums,
            int64_t groups, int64_t dim, double c_weight, double v_weight, double idle_weight) {
  const char* kernel = "update";
  dbp::UpdateParams p{};
  p.groups = int32(kernel, "groups", groups);
  p.dim = int32(kernel, "dim", dim);
  p.c_weight = static_cast<float>(c_weight);
  p.v_weight = static_cast<float>(v_weight);
  p.idle_weight = static_cast<float>(idle_weight);
  require_none(kernel, dbp::update_problem(p));
  const auto parts = static_cast<int64_t>(dbp::update_workspace_bytes(groups, dim) / sizeof(float));
  p.m = data<const float>(kernel, "m", m, dbp::elements({groups, dim, dim}));
  p.e = data<float>(kernel, "e", e, dbp::elements({groups, dim, dim}));
  p.partials = data<float>(kernel, "partials", partials, parts);
  p.sums = data<float>(kernel, "sums", sums, 2 * groups);
  launch(kernel, {{"m", m}, {"e", e}, {"partials", partials}, {"sums", sums}},
         [&](cudaStream_t stream) { return dbp::compiled::update(p, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dbp_cuda, m) {
  m.def(
      "update(Tensor m, Tensor(a!) e, Tensor(b!) partials, Tensor(c!) sums, int groups, int dim, "
      "float c_weight, float v_weight, float idle_weight) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dbp_cuda, CompositeExplicitAutograd, m) {
  m.impl("update", TORCH_BOX(&update));
}
