"""The training of the device check, on a small network: data, equal terms, records."""

import io
import itertools

import pytest
import torch

from bench.device import training
from bench.device.training import BORDER, SIZE, Recipe, Training

TINY = Recipe(model="convnet", widths=(8, 8), batch=16, lr=0.05)
IMAGES = training.synthetic(48, 20)


def test_crops_are_windows_of_the_bordered_images():
    """A cropped or mirrored image is found in the image it came from, and nowhere else."""
    images = IMAGES.train[:12]
    generator = torch.Generator().manual_seed(3)
    order = torch.tensor([5, 0, 11, 5])
    found = training.crops(images, order, generator)
    assert found.shape == (4, SIZE, SIZE, 3)
    seen = set()
    for crop, number in zip(found, order):
        offsets = list(itertools.product(range(2 * BORDER + 1), repeat=2))
        windows = [(images[number][y : y + SIZE, x : x + SIZE], (y, x)) for y, x in offsets]
        places = [
            (place, mirrored)
            for window, place in windows
            for mirrored, shown in ((False, window), (True, window.flip(1)))
            if torch.equal(shown, crop)
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) > 1
    many = training.crops(images, torch.zeros(400, dtype=torch.int64), generator)
    plain = (many[:, None] == windows_of(images[0])[None]).flatten(2).all(2).any(1).float().mean()
    assert 0.4 < plain < 0.6  # the others are mirrored


def windows_of(image):
    places = itertools.product(range(2 * BORDER + 1), repeat=2)
    return torch.stack([image[y : y + SIZE, x : x + SIZE] for y, x in places])


def test_both_methods_start_from_one_network_and_see_the_same_images(monkeypatch):
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
        for order in itertools.islice(run.batches(), 4):
            run.step(order)
    assert len(seen["bp"]) == len(seen["dbp"]) == 5
    for plain, decorrelated in zip(seen["bp"], seen["dbp"]):
        torch.testing.assert_close(plain, decorrelated)
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
    if method == "dbp":
        assert losses[-1] < losses[0]
    else:
        assert losses == [None] * 3


def test_it_learns():
    images = training.synthetic(320, 100)
    *_, last = training.train("dbp", images, 5, TINY)
    assert last["test_accuracy"] > 0.5


def test_the_epochs_are_the_most_that_the_slowest_method_has_time_for():
    images = training.synthetic(300, 90)  # an epoch costs as much as 330 images
    within = training.epochs_within
    assert within(20.0, images, [400.0, 110.0]) == 5  # of 6.67
    assert within(20.0, images, [400.0, 330.0]) == 16
    assert within(1e9, images, [1.0]) == max(training.EPOCHS)
    assert within(0.1, images, [1.0]) == 1


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
