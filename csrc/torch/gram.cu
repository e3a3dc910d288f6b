// The second moment's matrix kernels.
#include "../kernels/gram_box.cuh"
#include "../kernels/gram_direct.cuh"
#include "../kernels/gram_matrix_sm90.cuh"
#include "../kernels/gram_shift.cuh"
#include "../kernels/gram_shift_sm90.cuh"
#include "../lib/kernels.h"
#include "launch.h"

namespace {

using namespace dbp_torch;
using Ints = std::vector<int64_t>;

const char* const kSm90 = "9.0, and code for 9.0a";

struct Shift {
  static constexpr const char* name = "gram_shift";
  static dbp::Problem problem(const dbp::GramShiftParams& p) { return dbp::gram_shift_problem(p); }
  static int set_shifts(int block) { return dbp::gram_shift_set(block); }
  static void launch_on(Tensors tensors, const dbp::GramShiftParams& p) {
    launch(name, tensors, [&](cudaStream_t s) { return dbp::compiled::gram_shift(p, s); });
  }
};

struct ShiftSm90 {
  static constexpr const char* name = "gram_shift_sm90";
  static dbp::Problem problem(const dbp::GramShiftParams& p) {
    return dbp::gram_shift_sm90_problem(p);
  }
  static int set_shifts(int) { return dbp::GramShiftSm90Shape::shifts(); }
  static void launch_on(Tensors tensors, const dbp::GramShiftParams& p) {
    const auto run = [&](cudaStream_t s) { return dbp::compiled::gram_shift_sm90(p, s); };
    launch(name, tensors, run, kSm90);
  }
};

// One of the two kernels that take these arguments.
template <class Kernel>
void gram_shift(const Tensor& x, const Tensor& workspace, const Tensor& items, const Tensor& shifts,
                const Tensor& masks, int64_t pixels, int64_t row_stride, int64_t channels,
                const Ints& size, int64_t halo, int64_t item_count, int64_t block, int64_t element,
                int64_t slots, int64_t sets) {
  const char* kernel = Kernel::name;
  const Tensors tensors = {
      {"x", x}, {"workspace", workspace}, {"items", items}, {"shifts", shifts}, {"masks", masks}};
  dbp::GramShiftParams p{};
  p.pixels = pixels;
  p.row_stride = row_stride;
  p.channels = int32(kernel, "channels", channels);
  fill(kernel, "size", size, p.size);
  p.halo = int32(kernel, "halo", halo);
  p.item_count = int32(kernel, "item_count", item_count);
  p.block = int32(kernel, "block", block);
  p.dtype = dtype(kernel, "x", x, element);
  require_none(kernel, Kernel::problem(p));
  require_sizes(kernel,
                dbp::gram_shift_sizes(p, int32(kernel, "slots", slots), int32(kernel, "sets", sets),
                                      Kernel::set_shifts(p.block)),
                tensors);
  require_extent(kernel, "x", x, {{pixels, row_stride}, {channels, 1}});
  require_aligned(kernel, "x", x);
  p.x = x.const_data_ptr();
  p.workspace = data<float>(kernel, "workspace", workspace);
  p.items = data<const int32_t>(kernel, "items", items);
  p.shifts = data<const int32_t>(kernel, "shifts", shifts);
  p.masks = data<const int32_t>(kernel, "masks", masks);
  Kernel::launch_on(tensors, p);
}

void gram_matrix_sm90(const Tensor& x, const Tensor& workspace, const Tensor& items, int64_t rows,
                      int64_t row_stride, int64_t channels, int64_t item_count, int64_t element,
                      int64_t slots) {
  const char* kernel = "gram_matrix_sm90";
  const Tensors tensors = {{"x", x}, {"workspace", workspace}, {"items", items}};
  dbp::GramMatrixParams p{};
  p.rows = rows;
  p.row_stride = row_stride;
  p.channels = int32(kernel, "channels", channels);
  p.item_count = int32(kernel, "item_count", item_count);
  p.dtype = dtype(kernel, "x", x, element);
  require_none(kernel, dbp::gram_matrix_sm90_problem(p));
  require_sizes(kernel, dbp::gram_matrix_sm90_sizes(p, int32(kernel, "slots", slots)), tensors);
  require_extent(kernel, "x", x, {{rows, row_stride}, {channels, 1}});
  require_aligned(kernel, "x", x);
  p.x = x.const_data_ptr();
  p.workspace = data<float>(kernel, "workspace", workspace);
  p.items = data<const int32_t>(kernel, "items", items);
  const auto run = [&](cudaStream_t s) { return dbp::compiled::gram_matrix_sm90(p, s); };
  launch(kernel, tensors, run, kSm90);
}

void gram_box(const Tensor& x, const Tensor& workspace, const Tensor& items, const Tensor& boxes,
              int64_t stride_n, const Ints& stride, const Ints& step, int64_t channels,
              int64_t item_count, int64_t block, int64_t element, int64_t slots,
              int64_t box_count) {
  const char* kernel = "gram_box";
  const Tensors tensors = {{"x", x}, {"workspace", workspace}, {"items", items}, {"boxes", boxes}};
  dbp::GramBoxParams p{};
  p.stride_n = stride_n;
  fill(kernel, "stride", stride, p.stride);
  fill(kernel, "step", step, p.step);
  p.channels = int32(kernel, "channels", channels);
  p.item_count = int32(kernel, "item_count", item_count);
  p.block = int32(kernel, "block", block);
  p.dtype = dtype(kernel, "x", x, element);
  require_none(kernel, dbp::gram_box_problem(p));
  require_sizes(
      kernel,
      dbp::gram_box_sizes(p, int32(kernel, "slots", slots), int32(kernel, "box_count", box_count)),
      tensors);
  require_aligned(kernel, "x", x);
  p.x = x.const_data_ptr();
  p.workspace = data<float>(kernel, "workspace", workspace);
  p.items = data<const int32_t>(kernel, "items", items);
  p.boxes = data<const int32_t>(kernel, "boxes", boxes);
  launch(kernel, tensors, [&](cudaStream_t s) { return dbp::compiled::gram_box(p, s); });
}

void gram_direct(const Tensor& x, const Tensor& workspace, const Tensor& items, int64_t stride_n,
                 int64_t stride_c, const Ints& stride, const Ints& size, const Ints& output,
                 const Ints& taps, const Ints& conv_stride, const Ints& padding,
                 const Ints& dilation, int64_t columns, int64_t item_count, int64_t block,
                 int64_t element, int64_t slots) {
  const char* kernel = "gram_direct";
  const Tensors tensors = {{"x", x}, {"workspace", workspace}, {"items", items}};
  dbp::GramDirectParams p{};
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
  require_none(kernel, dbp::gram_direct_problem(p));
  require_sizes(kernel, dbp::gram_direct_sizes(p, int32(kernel, "slots", slots)), tensors);
  const int64_t channels = columns / (p.kernel[0] * p.kernel[1] * p.kernel[2]);
  require_extent(kernel, "x", x,
                 {{channels, stride_c},
                  {p.size[0], p.stride[0]},
                  {p.size[1], p.stride[1]},
                  {p.size[2], p.stride[2]}});  // of one image
  p.x = x.const_data_ptr();
  p.workspace = data<float>(kernel, "workspace", workspace);
  p.items = data<const int32_t>(kernel, "items", items);
  launch(kernel, tensors, [&](cudaStream_t s) { return dbp::compiled::gram_direct(p, s); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dbp_cuda, m) {
  const std::string shift =
      "(Tensor x, Tensor(a!) workspace, Tensor items, Tensor shifts, Tensor masks, int pixels, "
      "int row_stride, int channels, int[] size, int halo, int item_count, int block, int dtype, "
      "int slots, int sets) -> ()";
  m.def(("gram_shift" + shift).c_str());
  m.def(("gram_shift_sm90" + shift).c_str());
  m.def(
      "gram_matrix_sm90(Tensor x, Tensor(a!) workspace, Tensor items, int rows, int row_stride, "
      "int channels, int item_count, int dtype, int slots) -> ()");
  m.def(
      "gram_box(Tensor x, Tensor(a!) workspace, Tensor items, Tensor boxes, int stride_n, "
      "int[] stride, int[] step, int channels, int item_count, int block, int dtype, int slots, "
      "int box_count) -> ()");
  m.def(
      "gram_direct(Tensor x, Tensor(a!) workspace, Tensor items, int stride_n, int stride_c, "
      "int[] stride, int[] size, int[] output, int[] kernel, int[] conv_stride, int[] padding, "
      "int[] dilation, int columns, int item_count, int block, int dtype, int slots) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dbp_cuda, CompositeExplicitAutograd, m) {
  m.impl("gram_shift", TORCH_BOX(&gram_shift<Shift>));
  m.impl("gram_shift_sm90", TORCH_BOX(&gram_shift<ShiftSm90>));
  m.impl("gram_matrix_sm90", TORCH_BOX(&gram_matrix_sm90));
  m.impl("gram_box", TORCH_BOX(&gram_box));
  m.impl("gram_direct", TORCH_BOX(&gram_direct));
}
