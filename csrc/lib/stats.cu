#include "../kernels/stats.cuh"
#include "kernels.h"

cudaError_t dbp::compiled::stats(const StatsParams& params, cudaStream_t stream) {
  return launch_stats(params, stream);
}
