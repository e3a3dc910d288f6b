"""The planner's answers for what is really computed: the backend's, in its operands' precision."""

import pytest
import torch
from helpers import case, rows

import dbp_kernels as dbp
from dbp_kernels import choose, precision
from dbp_kernels.planning import planner

CONV, LINEAR = case(32, 64, (14, 14), 3, padding=1).geometry, rows((26, 512)).geometry
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
every_geometry = pytest.mark.parametrize("geometry", [CONV, LINEAR], ids=["conv", "linear"])


@pytest.fixture(autouse=True)
def tf32():
    """Sets whether products of float32 on CUDA are in TF32, for one test."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    yield lambda: setattr(matmul, "fp32_precision", "tf32")
    matmul.fp32_precision = before


@every_geometry
@pytest.mark.parametrize(
    ("dtype", "operands"),
    [(torch.float32, "ieee"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")],
    ids=str,
)
def test_eager_on_cuda_is_planned_in_its_operands_precision(dtype, operands, geometry, tf32):
    asked = geometry, "cuda", dtype, "eager"
    where = geometry, "cuda", 4, "eager", operands, "ieee"
    assert choose.gram_choices(*asked) == planner.gram_choices(*where)
    assert choose.update_choices(*asked) == planner.update_choices(*where)
    with precision.update_precision(None, True):
        products = "ieee", "tf32"
        assert choose.update_choices(*asked) == planner.update_choices(*where, products)
    with precision.update_precision("high", True):
        operands = "tf32" if operands == "ieee" else operands
        where = geometry, "cuda", 4, "eager", operands, "tf32"
        assert choose.update_choices(*asked) == planner.update_choices(*where)
    tf32()
    assert choose.gram_choices(*asked) == planner.gram_choices(*where)


@every_geometry
@pytest.mark.parametrize(
    ("backend", "form"), [("triton", "tf32x3"), ("cuda", "ieee"), ("eager", "ieee")]
)
def test_a_default_update_is_planned_in_what_its_backend_multiplies_in(backend, form, geometry):
    with precision.update_precision(None, True):
        found = choose.update_choices(geometry, "cuda", torch.float32, backend)
    where = geometry, "cuda", 4, backend, "ieee", "ieee"
    assert found == planner.update_choices(*where, (form, "tf32"))


@every_geometry
def test_float64_knows_no_precision(geometry, tf32):
    tf32()
    found = choose.update_choices(geometry, "cuda", torch.float64, "eager")
    assert found == planner.update_choices(geometry, "cuda", 8)


def test_what_lower_precisions_save():
    def seconds(question, geometry, *where):
        return {str(c): c.seconds for c in question(geometry, "cuda", 4, "eager", *where)}

    ieee, half = (seconds(planner.gram_choices, CONV, p) for p in ("ieee", "bf16"))
    assert half["unfold"] < ieee["unfold"]
    assert half["self_wgrad"] == ieee["self_wgrad"]  # whose operands are made float32
    ieee, change, three, all_tf32 = (
        seconds(planner.update_choices, LINEAR, "ieee", *rest)
        for rest in (
            ["ieee"],
            ["ieee", ("ieee", "tf32")],
            ["ieee", ("tf32x3", "tf32")],
            ["tf32"],
        )
    )
    assert set(ieee) == {"gram (unfold)", "direct", "samples"}
    assert all(all_tf32[p] < three[p] < change[p] < ieee[p] for p in ieee)


@every_geometry
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cpu_knows_no_precision(geometry, dtype, tf32):
    tf32()
    with precision.update_precision(None, False):
        for question in ("gram_choices", "update_choices", "stats_choices"):
            found = getattr(choose, question)(geometry, "cpu", dtype)
            assert found == getattr(planner, question)(geometry, "cpu", max(4, dtype.itemsize))


@pytest.mark.parametrize(
    ("name", "questions"),
    [
        ("patch_gram", ["gram_choices"]),
        ("decor_stats", ["stats_choices"]),
        ("decor_update", ["update_choices"]),
    ],
)
def test_an_op_chooses_once(name, questions, monkeypatch):
    """And the backend, which is given the choice, not at all."""
    planner.reset()
    asked = []
    for question in ("gram_choices", "update_choices", "stats_choices"):
        real = getattr(planner, question)

        def spy(*arguments, question=question, real=real):
            asked.append(question)
            return real(*arguments)

        monkeypatch.setattr(planner, question, spy)
    c = case(2, 3, (5, 5), 3)
    x, R = c.input(torch.bfloat16), c.R(torch.float32)
    operands = (x,) if name == "patch_gram" else (x, R)
    options = (0.1, 0.5) if name == "decor_update" else ()
    getattr(torch.ops.dbp, name)(*operands, *c.arguments, *options)
    # plans and ways with S count in what it costs, by the planner itself
    assert [q for q in asked if q != "gram_choices" or questions == ["gram_choices"]] == questions


def test_eager_pointwise_needs_no_question(monkeypatch):
    monkeypatch.setattr(planner, "gram_choices", None)
    x = rows((6, 4)).input(torch.float32)
    S = dbp.patch_gram(x, ())
    torch.testing.assert_close(S[0], x.T @ x / 6)
