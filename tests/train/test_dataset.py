from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from ddetr_cli.data.coco import read_annotations
from ddetr_cli.errors import DatasetError, UsageError
from ddetr_cli.train import dataset as module
from ddetr_cli.train.dataset import TrainingSet, collate
from ddetr_cli.train.loader import open_batches
from ddetr_cli.train.sampler import BatchSampler


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for i in range(6):
        Image.new("RGB", (80, 60), (40 * i, 100, 100)).save(tmp_path / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 80, "height": 60})
        annotations.append({"id": i + 1, "image_id": i, "category_id": 7, "bbox": [10, 10, 20, 20], "iscrowd": 0})
    annotations.append({"id": 99, "image_id": 0, "category_id": 7, "bbox": [0, 0, 80, 60], "iscrowd": 1})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "cell"}]}
    (tmp_path / "train.json").write_text(json.dumps(content))
    return tmp_path


def _set(data: Path, seed: int = 1) -> TrainingSet:
    annotations = read_annotations(data / "train.json", purpose="train")
    classes = annotations.class_table()
    return TrainingSet(annotations, data / "images", classes, augmentation="jitter", image_size=64, seed=seed)


def test_a_sample_follows_from_seed_epoch_and_index_alone(data: Path) -> None:
    first, second = _set(data), _set(data)
    second[0], second[5]
    assert torch.equal(first[3][0], second[3][0])
    second.epoch = 1
    assert not torch.equal(first[3][0], second[3][0])
    assert not torch.equal(first[3][0], _set(data, seed=2)[3][0])


def test_a_picture_that_breaks_is_replaced_by_the_next_and_named(data: Path) -> None:
    dataset = _set(data)
    expected = {index: dataset[index] for index in range(6)}
    (data / "images" / "2.png").write_bytes(b"not a picture")
    (data / "images" / "5.png").unlink()
    dataset = _set(data)
    for index in (0, 1, 3, 4):
        assert torch.equal(dataset[index].pixels, expected[index].pixels) and dataset[index].unreadable == ()
    (found,) = dataset[2].unreadable
    assert found[0] == 2 and found[1].startswith(str(data / "images" / "2.png"))
    # The last is followed by the first. What varies a picture still follows from the index that was asked for.
    assert [index for index, _ in dataset[5].unreadable] == [5]
    assert torch.equal(dataset[2].pixels, _set(data)[2].pixels)
    batch = collate([dataset[1], dataset[2], dataset[2]])
    assert [index for index, _ in batch.unreadable] == [2] and len(batch.targets) == 3


def test_where_no_picture_can_be_read_one_is_named_whether_a_worker_reads_it_or_not(data: Path) -> None:
    for path in (data / "images").iterdir():
        path.unlink()
    for workers in (0, 1):
        dataset = _set(data)
        with (
            open_batches(
                dataset,
                BatchSampler(6, dataset.shapes, 6, 1),
                workers=workers,
                device=torch.device("cpu"),
                warn=pytest.fail,
            ) as batches,
            pytest.raises(DatasetError, match="None of 6 images in a row could be read") as caught,
        ):
            list(batches)
        assert str(caught.value).startswith(str(data / "images"))
        assert "\n" not in str(caught.value)


def test_boxes_are_clipped_to_the_picture_and_empty_ones_dropped(data: Path) -> None:
    dataset = _set(data)
    boxes = [(-10.0, 5.0, 30.0, 20.0), (70.0, 50.0, 50.0, 50.0), (80.0, 10.0, 5.0, 5.0), (3.0, 3.0, 0.0, 4.0)]
    found = dataset.annotations.annotations[1]
    objects = tuple(replace(found, id=i, bbox_xywh=box) for i, box in enumerate(boxes))
    dataset.annotations = replace(dataset.annotations, annotations=objects)
    assert dataset._read(1).boxes_xyxy_px.tolist() == [[0.0, 5.0, 20.0, 25.0], [70.0, 50.0, 80.0, 60.0]]


def test_crowds_are_not_objects_to_find(data: Path) -> None:
    dataset = _set(data)
    assert len(dataset.annotations.by_image[0]) == 2
    assert dataset._read(0).boxes_xyxy_px.tolist() == [[10.0, 10.0, 30.0, 30.0]]


def test_labels_are_ranks_and_boxes_are_fractions(data: Path) -> None:
    pixels, target, _ = _set(data)[1]
    assert pixels.shape == (3, 64, 85)  # 80:60 at short side 64
    assert target.labels.tolist() == [0]
    assert ((target.boxes_cxcywh >= 0) & (target.boxes_cxcywh <= 1)).all()


def test_a_batch_of_one_size_carries_no_padding(data: Path) -> None:
    dataset = _set(data)
    assert collate([dataset[0], dataset[1]]).is_padding is None
    smaller = dataset[1]._replace(pixels=dataset[1].pixels[:, :32])
    batch = collate([dataset[0], smaller])
    assert batch.own_pixels == 64 * 85 + 32 * 85
    assert batch.pixels.shape == (2, 3, 64, 96)  # in steps of 32
    assert batch.is_padding is not None and batch.is_padding.sum() == 64 * 11 + 64 * 96 - 32 * 85


def test_a_cache_holds_every_picture_and_is_told_in_bytes(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHE_BYTES", 0)
    expected = [_set(data)[index].pixels for index in range(6)]
    dataset = _set(data)
    assert dataset.cache_all(None) == 6 * 80 * 60 * 3
    for path in (data / "images").iterdir():
        path.unlink()
    assert all(torch.equal(dataset[index].pixels, pixels) for index, pixels in enumerate(expected))


def test_a_cache_that_does_not_fit_is_refused_before_anything_is_read(data: Path) -> None:
    dataset = _set(data)
    for path in (data / "images").iterdir():
        path.write_bytes(b"not a picture")
    size = 6 * 80 * 60 * 3
    with pytest.raises(UsageError, match=r"^--cache: 6 decoded pictures take 0\.0 GB, more than 70% of the 0\.0 GB"):
        dataset.cache_all(size)
    assert dataset.cache_all(2 * size) == 0  # it fits, and none can be read


def test_processes_that_read_share_the_cache(data: Path) -> None:
    dataset = _set(data)
    dataset.cache_all(None)
    for path in (data / "images").iterdir():
        path.unlink()
    sampler = BatchSampler(6, dataset.shapes, 2, 1)
    with open_batches(dataset, sampler, workers=1, device=torch.device("cpu"), warn=pytest.fail) as batches:
        assert [batch.unreadable for batch in batches] == [(), (), ()]
