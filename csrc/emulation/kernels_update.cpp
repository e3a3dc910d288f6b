#include "../kernels/update.cuh"
#include "registry.h"

namespace dbp::emulation {

static Register update("update", [](Arguments& a) {
  UpdateParams p{};
  a("m", p.m)("e", p.e)("partials", p.partials)("loss", p.loss);
  a("groups", p.groups)("dim", p.dim);
  a("c_weight", p.c_weight)("v_weight", p.v_weight)("c_loss", p.c_loss)("v_loss", p.v_loss);
  return launch_update(p, nullptr);
});

}  // namespace dbp::emulation
