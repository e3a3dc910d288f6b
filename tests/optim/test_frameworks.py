"""``dbp.attach`` in training code of others, which knows nothing of it."""

import pytest
import torch
import torch.nn.functional as F
from small_training import OPTIONS, assert_equal, assert_learnt, everything, make_model
from torch.utils.data import DataLoader, TensorDataset

import dbp_kernels as dbp


def make_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def data():
    generator = torch.Generator().manual_seed(1)
    x = 1 + torch.randn(32, 3, 4, 4, generator=generator)
    return TensorDataset(x, torch.randint(5, (32,), generator=generator))


def loader():
    return DataLoader(data(), batch_size=4)


def own_loop(epochs, micro=2, autocast=True):
    """What the frameworks' trainers do, by hand."""
    model = make_model()
    optimizer = make_optimizer(model)
    torch.manual_seed(2)
    decor = dbp.attach(model, optimizer, **OPTIONS)
    for _ in range(epochs):
        for n, (x, y) in enumerate(loader(), 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(model(x), y)
            (loss / micro).backward()
            if n % micro == 0:
                optimizer.step()
                optimizer.zero_grad()
    return everything(model, decor)


def lightning_fit(folder, epochs, resume=None):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = make_model()

        def configure_optimizers(self):
            optimizer = make_optimizer(self.model)
            torch.manual_seed(2)
            self.decor = dbp.attach(self.model, optimizer, **OPTIONS)
            return optimizer

        def training_step(self, batch):
            return F.cross_entropy(self.model(batch[0]), batch[1])

    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        precision="bf16-mixed",
        accumulate_grad_batches=2,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    trainer.fit(module, loader(), ckpt_path=resume)
    return everything(module.model, module.decor), trainer.checkpoint_callback.best_model_path


def test_lightning(tmp_path):
    """It passes closures to ``step()``, in bfloat16, with accumulation: as a loop by hand."""
    whole, _ = lightning_fit(tmp_path / "whole", 2)
    assert_learnt(whole)
    assert_equal(whole, own_loop(2))
    _, saved = lightning_fit(tmp_path / "first", 1)
    resumed, _ = lightning_fit(tmp_path / "second", 2, resume=saved)
    assert_equal(resumed, whole)


def transformers_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2, use_cache=False
    )
    return transformers.GPT2LMHeadModel(config)


def transformers_fit(folder, resume=None, **arguments):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = transformers_model()
    optimizer = make_optimizer(model)
    decor = dbp.attach(model, optimizer, **OPTIONS)
    tokens = torch.randint(11, (32, 8), generator=torch.Generator().manual_seed(1))
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(folder),
            max_steps=6,
            save_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        optimizers=(optimizer, None),
    )
    trainer.train(resume_from_checkpoint=resume)
    return everything(model, decor), decor


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers_trainer(tmp_path, checkpointing):
    """Its clipping, schedule and checkpoints; dropout is on, and resumed too."""
    arguments = {"gradient_checkpointing": checkpointing}
    whole, decor = transformers_fit(tmp_path / "whole", **arguments)
    assert_learnt(whole)
    assert "transformer.h.1.mlp.c_fc" in decor.decorrelated()
    assert "transformer.wte" in decor.left_alone()["lm_head"]
    resumed, _ = transformers_fit(
        tmp_path / "second", resume=str(tmp_path / "whole" / "checkpoint-3"), **arguments
    )
    assert_equal(resumed, whole)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain, _ = transformers_fit(tmp_path / "plain", gradient_checkpointing=False)
    checkpointed, _ = transformers_fit(tmp_path / "less", gradient_checkpointing=True)
    assert_equal(checkpointed, plain)


@pytest.mark.parametrize("attached", ["before", "after"])
def test_accelerate(tmp_path, attached):
    """Attached before ``prepare()``, or after it to the optimiser that it has wrapped."""
    accelerate = pytest.importorskip("accelerate")

    def prepared():
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = make_model()
        optimizer = make_optimizer(model)
        torch.manual_seed(2)
        if attached == "before":
            decor = dbp.attach(model, optimizer, **OPTIONS)
        wrapped = accelerator.prepare(model, optimizer, loader())
        if attached == "after":
            decor = dbp.attach(wrapped[0], wrapped[1], **OPTIONS)
        return accelerator, decor, *wrapped

    def train(accelerator, decor, model, optimizer, batches):
        for x, y in batches:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()

    whole = prepared()
    train(*whole)
    whole[0].save_state(tmp_path)
    train(*whole)
    expected = everything(whole[2], whole[1])
    assert_equal(expected, own_loop(2, autocast=False))
    resumed = prepared()
    resumed[0].load_state(tmp_path)
    train(*resumed)
    assert_equal(everything(resumed[2], resumed[1]), expected)


@pytest.mark.parametrize("skipped", [False, True])
def test_accelerate_with_a_gradient_scaler(skipped):
    """Which puts a ``step()`` of its own on the optimiser for the time of each step."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True)
    states = []
    for broken in (False, skipped):
        model = make_model()
        optimizer = make_optimizer(model)
        torch.manual_seed(2)
        decor = dbp.attach(model, optimizer, **OPTIONS)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
        wrapped = accelerate.optimizer.AcceleratedOptimizer(optimizer, scaler=scaler)
        for n, (x, y) in enumerate(loader()):
            if n == 2 and broken:
                before = everything(model, decor)
                scaler.scale(F.cross_entropy(model(x), y) * torch.inf).backward()
                wrapped.step()
                wrapped.zero_grad()
                assert wrapped.step_was_skipped
                assert_equal(everything(model, decor), before)
                scaler.update(4.0)
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            wrapped.step()
            wrapped.zero_grad()
        states.append(everything(model, decor))
    assert_learnt(states[0])
    if not skipped:  # else the random samples of the step that was left out are drawn, too
        assert_equal(*states)


@pytest.mark.parametrize("attached", ["before", "after"])
def test_fabric(attached):
    fabric = pytest.importorskip("lightning.fabric").Fabric(
        accelerator="cpu", precision="bf16-mixed"
    )
    model = make_model()
    optimizer = make_optimizer(model)
    torch.manual_seed(2)
    if attached == "before":
        decor = dbp.attach(model, optimizer, **OPTIONS)
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    if attached == "after":
        decor = dbp.attach(model, wrapped_optimizer, **OPTIONS)
    for x, y in loader():
        fabric.backward(F.cross_entropy(wrapped(x), y))
        wrapped_optimizer.step()
        wrapped_optimizer.zero_grad()
    assert_equal(everything(model, decor), own_loop(1, micro=1))


def test_a_wrapper_whose_step_runs_no_hooks_is_refused():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self, closure=None):
            return self.optimizer.step(closure)

    model = make_model()
    with pytest.raises(TypeError, match=r"Wrapper, whose step.. does not run torch's step hooks"):
        dbp.attach(model, Wrapper(make_optimizer(model)))


def trained_vision_model():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2,
        num_classes=5,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    decor = dbp.attach(model, optimizer, lr=1e-2, sample=0.5)
    for _ in range(3):
        F.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(decor.decorrelated()) == 2 + 2 * 4
    assert_learnt(everything(model, decor))
    return model


@pytest.mark.parametrize("training", [True, False])
def test_export_of_a_trained_vision_model(training):
    model = trained_vision_model().train(training)
    x = torch.randn(2, 3, 32, 32)
    program = torch.export.export(model, (x,))
    assert not any("record" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_onnx_export_of_a_trained_vision_model():
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    model = trained_vision_model().eval()
    x = torch.randn(2, 3, 32, 32)
    exported = torch.onnx.export(model, (x,), dynamo=True).model_proto
    onnx.checker.check_model(exported)
    (y,) = ReferenceEvaluator(exported).run(None, {exported.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-3, atol=1e-4)


def test_peft_adapters_are_attached_and_merge():
    """Their matrices are linear layers with an input of their own; what they adapt is frozen."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        transformers_model(), peft.LoraConfig(r=2, target_modules=["c_fc", "c_attn"])
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    decor = dbp.attach(model, optimizer, lr=1e-2, sample=0.5)
    attached = decor.decorrelated()
    assert len(attached) == 2 * 2 * 2
    assert all("lora_A" in name or "lora_B" in name for name in attached)
    base = "base_model.model.transformer.h.0.mlp.c_fc.base_layer"
    assert "not in the optimiser" in decor.left_alone()[base]
    tokens = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_learnt({n: v for n, v in everything(model, decor).items() if "lora" in n})
    model.eval()
    expected = model(input_ids=tokens).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)
