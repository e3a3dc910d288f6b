#include "toy_kernels.cuh"

#include "emulation/registry.h"
#include "toy_sm90.cuh"

namespace toy {

using emulation::Arguments;
using emulation::Register;

static Register reverse("toy_reverse", [](Arguments& a) {
  ReverseParams p{};
  int barrier = 0;
  a("x", p.x)("out", p.out)("n", p.n)("barrier", barrier);
  return launch_reverse(p, barrier);
});

static Register stencil("toy_stencil", [](Arguments& a) {
  StencilParams p{};
  int halo = 0;
  a("x", p.x)("out", p.out)("n", p.n)("halo", halo);
  return launch_stencil(p, halo);
});

static Register pipeline("toy_pipeline", [](Arguments& a) {
  PipelineParams p{};
  int broken = 0;
  a("x", p.x)("out", p.out)("tiles", p.tiles)("broken", broken);
  return launch_pipeline(p, broken);
});

static Register product("toy_product", [](Arguments& a) {
  ProductParams p{};
  DType dtype{};
  a("a", p.a)("b", p.b)("out", p.out)("transposed", p.transposed)("dtype", dtype);
  return launch_product(p, dtype);
});

static Register convert("toy_convert", [](Arguments& a) {
  MapParams p{};
  DType dtype{};
  a("x", p.x)("out", p.out)("n", p.n)("dtype", dtype);
  return launch_convert(p, dtype);
});

static Register shuffle("toy_shuffle", [](Arguments& a) {
  MapParams p{};
  a("x", p.x)("out", p.out);
  return launch_shuffle(p);
});

static Register mistake("toy_mistake", [](Arguments& a) {
  MapParams p{};
  a("x", p.x)("out", p.out)("n", p.n)("what", p.what);
  return launch_mistake(p);
});

static Register sm90("toy_sm90", [](Arguments& a) {
  Sm90Arguments args{};
  a("a", args.a)("b", args.b)("out", args.out)("rows", args.rows)("columns_a", args.columns_a);
  a("columns_b", args.columns_b)("dtype", args.dtype)("broken", args.broken)("width", args.width);
  return launch_sm90(args);
});

static Register by_hand("toy_by_hand", [](Arguments& a) {
  ByHandParams p{};
  a("a", p.a)("b", p.b)("out", p.out);
  return launch_by_hand(p);
});

}  // namespace toy
