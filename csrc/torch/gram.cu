// The second moment's matrix kernels.
#include "../kernels/gram_box.cuh"
#include "../kernels/gram_direct.cuh"
#include "../kernels/gram_matrix_sm90.cuh"
#include "../kernels/gram_shift_work.cuh"
#include "../lib/kernels.h"
#include "launch.h"

namespace {

using namespace dbp_torch;
using Ints = std::vector<int64_t>;

// One of the two kernels that take these arguments.
template <cudaError_t (*Run)(const dbp::GramShiftParams&, cudaStream_t)>
void launch_shift(const char* kernel, const Tensor& x, const Tensor& workspace, const Tensor& items,
                  const Tensor& shifts, const Tensor& masks, int64_t pixels, int64_t row_stride,
                  int64_t channels, const Ints& size, int64_t halo, int64_t item_count,
                  int64_t block, int64_t element) {
  dbp::GramShiftParams p{};
  p.x = x.const_data_ptr();
  p.workspace = data<float>(kernel, "workspace", workspace, 0);
  p.items = data<const int32_t>(kernel, "items", items, 8 * item_count);
  p.shifts = data<const int32_t>(kernel, "shifts", shifts, 0);
  p.masks = data<const int32_t>(kernel, "masks", masks, 0);
  p.pixels = pixels;
  p.row_stride = row_stride;
  p.channels = int32(kernel, "channels", channels);
  fill(kernel, "size", size, p.size);
  p.halo = int32(kernel, "halo", halo);
  p.item_count = int32(kernel, "item_count", item_count);
  p.block = int32(kernel, "block", block);
  p.dtype = dtype(kernel, "x", x, element);
  check_aligned(kernel, "x", x);
  launch(
      kernel,
      {{"x", x}, {"workspace", workspace}, {"items", items}, {"shifts", shifts}, {"masks", masks}},
      [&](cudaStream_t stream) { return Run(p, stream); });
}

void gram_shift(const Tensor& x, const Tensor& workspace, const Tensor& items, const Tensor& shifts,
                const Tensor& masks, int64_t pixels, int64_t row_stride, int64_t channels,
                const Ints& size, int64_t halo, int64_t item_count, int64_t block,
                int64_t element) {
  launch_shift<dbp::compiled::gram_shift>("gram_shift", x, workspace, items, shifts, masks, pixels,
                                          row_stride, channels, size, halo, item_count, block,
                                          element);
}

void gram_shift_sm90(const Tensor& x, const Tensor& workspace, const Tensor& items,
                     const Tensor& shifts, const Tensor& masks, int64_t pixels, int64_t row_stride,
                     int64_t channels, const Ints& size, int64_t halo, int64_t item_count,
                     int64_t block, int64_t element) {
  launch_shift<dbp::compiled::gram_shift_sm90>("gram_shift_sm90", x, workspace, items, shifts,
                                               masks, pixels, row_stride, channels, size, halo,
                                               item_count, block, element);
}

void gram_matrix_sm90(const Tensor& x, const Tensor& workspace, const Tensor& items, int64_t rows,
                      int64_t row_stride, int64_t channels, int64_t item_count, int64_t element) {
  const char* kernel = "gram_matrix_sm90";
  dbp::GramMatrixParams p{};
  p.x = x.const_data_ptr();
  p.workspace = data<float>(kernel, "workspace", workspace, 0);
  p.items = data<const int32_t>(kernel, "items", items, 6 * item_count);
  p.rows = rows;
  p.row_stride = row_stride;
  p.channels = int32(kernel, "channels", channels);
  p.item_count = int32(kernel, "item_count", item_count);
  p.dtype = dtype(kernel, "x", x, element);
  check_aligned(kernel, "x", x);
  launch(kernel, {{"x", x}, {"workspace", workspace}, {"items", items}},
         [&](cudaStream_t stream) { return dbp::compiled::gram_matrix_sm90(p, stream); });
}

void gram_box(const Tensor& x, const Tensor& workspace, const Tensor& items, const Tensor& boxes,
              int64_t stride_n, const Ints& stride, const Ints& step, int64_t channels,
              int64_t item_count, int64_t block, int64_t element) {
  const char* kernel = "gram_box";
  dbp::GramBoxParams p{};
  p.x = x.const_data_ptr();
  p.workspace = data<float>(kernel, "workspace", workspace, 0);
  p.items = data<const int32_t>(kernel, "items", items, 6 * item_count);
  p.boxes = data<const int32_t>(kernel, "boxes", boxes, 0);
  p.stride_n = stride_n;
  fill(kernel, "stride", stride, p.stride);
  fill(kernel, "step", step, p.step);
  p.channels = int32(kernel, "channels", channels);
  p.item_count = int32(kernel, "item_count", item_count);
  p.block = int32(kernel, "block", block);
  p.dtype = dtype(kernel, "x", x, element);
  check_aligned(kernel, "x", x);
  launch(kernel, {{"x", x}, {"workspace", workspace}, {"items", items}, {"boxes", boxes}},
         [&](cudaStream_t stream) { return dbp::compiled::gram_box(p, stream); });
}

void gram_direct(const Tensor& x, const Tensor& workspace, const Tensor& items, int64_t stride_n,
                 int64_t stride_c, const Ints& stride, const Ints& size, const Ints& output,
                 const Ints& taps, const Ints& conv_stride, const Ints& padding,
                 const Ints& dilation, int64_t columns, int64_t item_count, int64_t block,
                 int64_t element) {
  const char* kernel = "gram_direct";
  dbp::GramDirectParams p{};
  p.x = x.const_data_ptr();
  p.workspace = data<float>(kernel, "workspace", workspace, 0);
  p.items = data<const int32_t>(kernel, "items", items, 6 * item_count);
  p.stride_n = stride_n;
  p.stride_c = stride_c;
  fill(kernel, "stride", stride, p.stride);
  fill(kernel, "size", size, p.size);
  fill(kernel, "output", output, p.output);
  fill(kernel, "kernel", taps, p.kernel);
  fill(kernel, "conv_stride", conv_stride, p.conv_stride);
  fill(kernel, "padding", padding, p.padding);
  fill(kernel, "dilation", dilation, p.dilation);
  p.columns = int32(kernel, "columns", columns);
  p.item_count = int32(kernel, "item_count", item_count);
  p.block = int32(kernel, "block", block);
  p.dtype = dtype(kernel, "x", x, element);
  launch(kernel, {{"x", x}, {"workspace", workspace}, {"items", items}},
         [&](cudaStream_t stream) { return dbp::compiled::gram_direct(p, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dbp_cuda, m) {
  const std::string shift =
      "(Tensor x, Tensor(a!) workspace, Tensor items, Tensor shifts, Tensor masks, int pixels, "
      "int row_stride, int channels, int[] size, int halo, int item_count, int block, int dtype) "
      "-> ()";
  m.def(("gram_shift" + shift).c_str());
  m.def(("gram_shift_sm90" + shift).c_str());
  m.def(
      "gram_matrix_sm90(Tensor x, Tensor(a!) workspace, Tensor items, int rows, int row_stride, "
      "int channels, int item_count, int dtype) -> ()");
  m.def(
      "gram_box(Tensor x, Tensor(a!) workspace, Tensor items, Tensor boxes, int stride_n, "
      "int[] stride, int[] step, int channels, int item_count, int block, int dtype) -> ()");
  m.def(
      "gram_direct(Tensor x, Tensor(a!) workspace, Tensor items, int stride_n, int stride_c, "
      "int[] stride, int[] size, int[] output, int[] kernel, int[] conv_stride, int[] padding, "
      "int[] dilation, int columns, int item_count, int block, int dtype) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dbp_cuda, CompositeExplicitAutograd, m) {
  m.impl("gram_shift", TORCH_BOX(&gram_shift));
  m.impl("gram_shift_sm90", TORCH_BOX(&gram_shift_sm90));
  m.impl("gram_matrix_sm90", TORCH_BOX(&gram_matrix_sm90));
  m.impl("gram_box", TORCH_BOX(&gram_box));
  m.impl("gram_direct", TORCH_BOX(&gram_direct));
}
