#include "../kernels/update.cuh"
#include "registry.h"

namespace dbp::emulation {

static Register update("update", [](Arguments& a) {
  UpdateParams p{};
  a("m", p.m)("e", p.e)("partials", p.partials)("sums", p.sums);
  a("groups", p.groups)("dim", p.dim);
  a("c_weight", p.c_weight)("v_weight", p.v_weight)("idle_weight", p.idle_weight);
  return launch_update(p, nullptr);
});

}  // namespace dbp::emulation
