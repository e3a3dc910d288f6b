// The kernels as compiled into the library: each entry is the launcher of csrc/kernels/<name>.cuh,
// which documents its parameters. Include that file too to fill them in.
//
// All are asynchronous, allocate nothing, and return an error instead of launching what the device
// or the kernel cannot do: cudaErrorInvalidValue for what `<name>_problem` there finds. How large
// the arrays are they cannot know; `<name>_sizes` tells.
#pragma once

#include <cuda_runtime.h>

namespace dbp {

struct GramBoxParams;
struct GramDirectParams;
struct GramMatrixParams;
struct GramShiftParams;
struct PackParams;
struct ReduceParams;
struct StatsParams;
struct UpdateParams;

namespace compiled {

cudaError_t gram_box(const GramBoxParams& params, cudaStream_t stream);
cudaError_t gram_direct(const GramDirectParams& params, cudaStream_t stream);
cudaError_t gram_shift(const GramShiftParams& params, cudaStream_t stream);
// bf16 and fp16, on devices of compute capability 9.0 with code for 9.0a; elsewhere
// cudaErrorNoKernelImageForDevice.
cudaError_t gram_matrix_sm90(const GramMatrixParams& params, cudaStream_t stream);
cudaError_t gram_shift_sm90(const GramShiftParams& params, cudaStream_t stream);
cudaError_t pack(const PackParams& params, cudaStream_t stream);
cudaError_t reduce(const ReduceParams& params, cudaStream_t stream);
cudaError_t stats(const StatsParams& params, cudaStream_t stream);
cudaError_t update(const UpdateParams& params, cudaStream_t stream);

}  // namespace compiled
}  // namespace dbp
