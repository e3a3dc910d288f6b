"""The training of the device check, on a small network: data, equal terms, records."""

import io
import itertools
import json
from dataclasses import replace

import pytest
import torch

from bench.core import report
from bench.device import train, training
from bench.device.stage import RESULT, SKIPPED, Setting
from bench.device.training import BORDER, SIZE, Recipe, Training

TINY = Recipe(model="convnet", widths=(8, 8), batch=16, lr=0.05)
IMAGES = training.synthetic(48, 20)


def test_draws_are_all_images_in_every_place():
    images = training.synthetic(2000, 1)
    drawn = training.draws(images, torch.Generator().manual_seed(3))
    assert sorted(drawn[:, 0].tolist()) == list(range(2000))
    assert {tuple(place) for place in drawn[:, 1:].tolist()} == set(
        itertools.product(range(9), range(9), range(2))
    )


@pytest.mark.parametrize("mirrored", [0, 1])
def test_crops_are_windows_of_the_bordered_images(mirrored):
    drawn = torch.tensor([(5, 0, 8, mirrored), (0, 3, 1, mirrored), (5, 8, 4, mirrored)])
    found = training.crops(IMAGES.train, drawn)
    for crop, (number, down, right, _) in zip(found, drawn.tolist()):
        window = IMAGES.train[number][down : down + SIZE, right : right + SIZE]
        assert torch.equal(crop, window.flip(1) if mirrored else window)
    original = torch.tensor([(7, BORDER, BORDER, 0)])
    assert training.crops(IMAGES.train, original)[0, 0, 0].any()
    assert not IMAGES.train[:, :BORDER].any()  # the border is black


def test_all_methods_start_from_one_network_and_see_the_same_images(monkeypatch):
    seen = {}
    honest = training.crops
    for method in training.METHODS:
        shown = seen[method] = []
        monkeypatch.setattr(
            training, "crops", lambda *a, shown=shown: shown.append(honest(*a)) or shown[-1]
        )
        run = Training(method, IMAGES, 6, TINY)
        first = run.logits(IMAGES.test[:4])
        seen[method].append(first.detach())
        for drawn in itertools.islice(run.batches(), 4):
            run.step(drawn)
    assert [len(shown) for shown in seen.values()] == [5, 5, 5]
    for plain, *decorrelated in zip(*seen.values()):
        for other in decorrelated:
            torch.testing.assert_close(plain, other)
    assert not torch.equal(seen["bp"][1], seen["bp"][2])


@pytest.mark.parametrize("method", training.METHODS)
def test_a_record_for_every_epoch(method):
    records = list(training.train(method, IMAGES, 3, TINY))
    assert [(r["method"], r["epoch"], r["epochs"]) for r in records] == [
        (method, n, 3) for n in (1, 2, 3)
    ]
    assert records[-1]["train_loss"] < records[0]["train_loss"]
    assert all(0 <= r["test_accuracy"] <= 1 and r["images_per_second"] > 0 for r in records)
    seconds = [r["seconds"] for r in records]
    assert seconds == sorted(seconds)
    losses = [r["decorrelation_loss"] for r in records]
    if method == "bp":
        assert losses == [None] * 3
    else:
        assert losses[-1] < losses[0]


def test_the_eager_method_keeps_to_it(monkeypatch):
    asked = []
    honest = training.backend
    monkeypatch.setattr(training, "backend", lambda name: asked.append(name) or honest(name))
    for method in training.METHODS:
        next(training.train(method, IMAGES, 1, TINY))
    assert set(asked) == {"auto", "eager"}
    assert asked.count("auto") == 2 * asked.count("eager") > 0  # of "bp" and "dbp"


def test_it_learns():
    images = training.synthetic(320, 100)
    *_, last = training.train("dbp", images, 5, TINY)
    assert last["test_accuracy"] > 0.5


def test_the_epochs_are_the_most_that_the_slowest_method_has_time_for(monkeypatch):
    monkeypatch.setattr(training, "TRAIN", 300)
    monkeypatch.setattr(training, "TEST", 90)  # an epoch costs as much as 330 images
    within = training.epochs_within
    assert within(20.0, [400.0, 110.0]) == 5  # of 6.67
    assert within(20.0, [400.0, 330.0]) == 16
    assert within(1e9, [1.0]) == max(training.EPOCHS)
    assert within(0.1, [1.0]) == 1


def test_speed_is_of_the_steps_alone(monkeypatch):
    ticks = itertools.count(step=2.0)
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(ticks))
    assert training.speed("bp", IMAGES, TINY, 1, 3) == 3 * 16 / 2.0


def parquet(folder, split: str, count: int) -> list[int]:
    """As the hub has CIFAR-10; pixel (0, 0) of image n is (n, 2n, 3n)."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = pytest.importorskip("PIL.Image")
    cells, labels = [], [n % 10 for n in range(count)]
    for n in range(count):
        picture, file = image.new("RGB", (SIZE, SIZE)), io.BytesIO()
        picture.putpixel((0, 0), (n, 2 * n, 3 * n))
        picture.save(file, "png")
        cells.append({"bytes": file.getvalue(), "path": None})
    pq.write_table(pa.table({"img": cells, "label": labels}), folder / f"{split}-0.parquet")
    return labels


def test_cifar10_comes_from_its_files(tmp_path):
    labels = parquet(tmp_path, "train", 12)
    parquet(tmp_path, "test", 3)
    images, reason = training.load(tmp_path)
    assert (images.name, reason) == ("cifar10", None)
    assert images.train.shape == (12, SIZE + 2 * BORDER, SIZE + 2 * BORDER, 3)
    assert images.test.shape == (3, SIZE, SIZE, 3)
    assert images.train_labels.tolist() == labels
    assert images.train[5, BORDER, BORDER].tolist() == [5, 10, 15]
    assert images.test[2, 0, 0].tolist() == [2, 4, 6]


def test_without_them_images_are_made_and_the_record_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "synthetic", lambda: IMAGES)
    images, reason = training.load(tmp_path / "nowhere")
    assert images.name == "synthetic"
    assert "no train-*.parquet" in reason


# --------------------------------------------------------------------------- the stages


@pytest.fixture
def setting(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_running", {})
    return Setting("cpu", rehearse=True, stem=str(tmp_path / "run"))


def run_all(setting) -> list[dict]:
    return [train.run_epoch(case.name, setting) for case in train.epoch_cases(setting)]


def test_each_epoch_is_a_case(setting):
    records = [record for line in run_all(setting) for record in line[RESULT]["training"]]
    told = [(record["method"], record["epoch"], record["epochs"]) for record in records]
    assert told == [("bp", 1, 2), ("bp", 2, 2), ("dbp", 1, 2), ("dbp", 2, 2)]


def test_the_record_says_what_was_trained(setting):
    recipe = run_all(setting)[0][RESULT]["recipe"]
    assert recipe["images"] == "synthetic"
    assert recipe["no_cifar10"] == "a rehearsal"
    assert recipe["decor_lr"] == Recipe().decor_lr


def test_both_methods_are_trained_for_what_the_slower_one_has_time_for(setting, tmp_path):
    epoch = training.TRAIN + training.TEST / 3

    def line(stage: str, case: str, speed: float | None, status: str = "passed") -> dict:
        told = {} if speed is None else {"images_per_second": speed}
        return {"stage": stage, "case": case, "status": status, **told}

    lines = [
        line("speed", "bp", 1e9),
        line("speed", "dbp", 8.5 * epoch / train.SECONDS),
        line("speed", "dbp eager", 1.0),
        line("layers", "dbp", 1.0),
    ]
    real = Setting("cpu", stem=setting.stem)
    assert len(train.epoch_cases(real)) == 2  # nothing is known: one epoch each

    def names() -> list[str]:
        (tmp_path / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return [case.name for case in train.epoch_cases(real)]

    assert names() == [f"{m}: epoch {n} of 8" for m in ("bp", "dbp") for n in range(1, 9)]
    real = replace(real, left=24.0 + train.SECONDS)  # for both methods together
    assert len(names()) == 2 * 3
    real = replace(real, left=train.TRAINING.seconds)
    assert len(names()) == 2 * 8
    lines[1] = line("speed", "dbp", None, "not run")
    assert names()[-1] == f"dbp: epoch {max(training.EPOCHS)} of {max(training.EPOCHS)}"
    lines[1] = line("speed", "dbp", None, "crashed")
    assert names() == ["bp: epoch 1 of 1", "dbp eager: epoch 1 of 1"]


def test_after_a_lost_epoch_the_rest_of_the_method_is_skipped(setting, monkeypatch):
    lost = train.run_epoch("bp: epoch 2 of 2", setting)  # in a worker that replaced another
    assert lost["status"] == SKIPPED

    def failing(*arguments):
        yield {"train_loss": 1.0, "test_accuracy": 0.1, "images_per_second": 1.0}
        raise RuntimeError("wrong")

    monkeypatch.setattr(training, "train", failing)
    train.run_epoch("dbp: epoch 1 of 3", setting)
    with pytest.raises(RuntimeError, match="wrong"):
        train.run_epoch("dbp: epoch 2 of 3", setting)
    assert train.run_epoch("dbp: epoch 3 of 3", setting)["status"] == SKIPPED


def test_the_speed_of_all_methods_is_measured(setting):
    names = [case.name for case in train.speed_cases(setting)]
    assert names == ["bp", "dbp", "dbp eager"]
    assert all(train.run_speed(name, setting)["images_per_second"] > 0 for name in names)


# --------------------------------------------------------------------------- table and plot


def test_table_and_plot_of_what_there_is(setting, tmp_path):
    """Of a run cut short: DBP's second epoch is missing."""
    records = [record for line in run_all(setting)[:3] for record in line[RESULT]["training"]]
    described = {"cpu": "some CPU", "threads": 1, "torch": "2.11", "commit": None, "dirty": None}
    result = {
        "command": "python -m bench device-check train",
        "machine": described,
        "settings": {"dtype": "bfloat16"},
        "training": records,
    }
    text = report.text_report(result)
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if "of 2" in line}
    assert list(rows) == ["bp", "dbp"]
    assert "2 of 2" in rows["bp"]
    assert "1 of 2" in rows["dbp"]
    accuracies = [f"{100 * record['test_accuracy']:.1f}" for record in records[:2]]
    assert " ".join(accuracies) in rows["bp"]
    assert report.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
