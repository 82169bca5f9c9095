"""VTAB-1K and FGVC on small data of the same form: handwritten digits as image files, a ViT that has seen letters."""

from __future__ import annotations

import json
from pathlib import Path

import pandas
import pytest
import torch
from PIL import Image
from transformers import ViTForImageClassification, ViTImageProcessor

from experiments.__main__ import main
from experiments.data import Examples
from experiments.digits import digits_split, pretrained_vit, vit_config
from experiments.errors import ExperimentError
from experiments.paper.fgvc import FGVC
from experiments.paper.vtab import VTAB

FAST = ["--set", "trainer.max_steps=80", "--set", "trainer.learning_rate=1e-2", "--set", "trainer.use_cpu=true"]
FAST += ["--set", "trainer.per_device_train_batch_size=16", "--set", "adapter.rank=2", "--partial", "--seeds", "0"]


def write_images(examples: Examples, folder: Path, count: int) -> list[tuple[str, int]]:
    """The first images as files; their paths below the folder's parent, and their digits."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        pixels = (examples.inputs[index, 0] * 255).to(torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{index:06}.png")
        rows.append((f"{folder.name}/{index:06}.png", int(examples.labels[index])))
    return rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, letters: Path) -> Path:
    """The ViT as a directory with a classifier and an image processor."""
    folder = tmp_path_factory.mktemp("base")
    model = ViTForImageClassification(vit_config())
    model.vit.load_state_dict(pretrained_vit(letters).state_dict())
    model.save_pretrained(folder)
    # Pixels as in experiments.digits: from 0 to 1.
    ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.0], image_std=[1.0]).save_pretrained(folder)
    return folder


@pytest.fixture
def vtab(tmp_path: Path) -> Path:
    """svhn, VTAB's own digits, with ours."""
    split, task = digits_split(), tmp_path / "vtab" / "svhn"
    train = write_images(split.train, task / "train", 300)
    parts = {"train800val200": train, "train800": train[:240], "val200": train[240:]}
    parts["test"] = write_images(split.test, task / "test", 200)
    for name, rows in parts.items():
        (task / f"{name}.txt").write_text("".join(f"images/{path} {label}\n" for path, label in rows))
    (task / "images").mkdir()
    for name in ("train", "test"):
        (task / name).rename(task / "images" / name)
    return tmp_path / "vtab"


@pytest.fixture
def fgvc(tmp_path: Path) -> Path:
    """CUB's folder with digits as its birds, under class ids that do not start at 0."""
    split, task = digits_split(), tmp_path / "fgvc" / "CUB_200_2011"
    rows = write_images(split.train, task / "images" / "seen", 300)
    parts = {"train": rows[:240], "val": rows[240:], "test": write_images(split.test, task / "images" / "new", 200)}
    for name, part in parts.items():
        (task / f"{name}.json").write_text(json.dumps({path: 10 * label + 5 for path, label in part}))
    return tmp_path / "fgvc"


def test_vtab_lists_are_read_as_they_stand(vtab: Path) -> None:
    rows, labels = VTAB().rows(vtab, "svhn"), digits_split()
    assert (len(rows.train), len(rows.score), rows.classes) == (300, 200, 10)
    assert [label for _, label in rows.score] == labels.test.labels[:200].tolist()
    assert Image.open(rows.train[7][0]).getpixel((3, 4)) == int(labels.train.inputs[7, 0, 4, 3] * 255)
    chosen = VTAB().rows(vtab, "svhn", validation=True)
    assert chosen.train + chosen.score == rows.train


def test_fgvc_numbers_classes_and_trains_on_both_parts(fgvc: Path) -> None:
    rows, labels = FGVC().rows(fgvc, "CUB_200_2011"), digits_split()
    assert (len(rows.train), len(rows.score), rows.classes) == (300, 200, 10)
    assert [label for _, label in rows.train] == labels.train.labels[:300].tolist()
    chosen = FGVC().rows(fgvc, "CUB_200_2011", validation=True)
    assert (len(chosen.train), len(chosen.score)) == (240, 60)


def test_a_vtab_task_is_trained_scored_and_not_run_twice(
    vtab: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["paper", "vtab1k", "--data", str(vtab), "--base", str(base), "--tasks", "svhn", *FAST]
    assert main([*arguments, "--out", str(tmp_path / "runs")]) == 0
    said = capsys.readouterr().out
    table = pandas.read_csv(tmp_path / "runs" / "results.csv", keep_default_na=False)
    (row,) = table.to_dict("records")
    assert (row["method"], row["task"], row["part"], row["seed"], row["steps"]) == ("doran", "svhn", "test", 0, 80)
    assert row["accuracy"] > 0.5  # 0.1 by guessing
    assert f"natural: {100 * row['accuracy']:.1f} (1 of 7 tasks)" in said
    assert main([*arguments, "--out", str(tmp_path / "runs")]) == 0
    assert "is done" in capsys.readouterr().out
    assert main([*arguments, "--out", str(tmp_path / "runs"), "--validation", "--method", "dora"]) == 0
    table = pandas.read_csv(tmp_path / "runs" / "results.csv", keep_default_na=False)
    assert table.part.tolist() == ["test", "validation"]
    assert table.trainable_parameters[1] < table.trainable_parameters[0]  # DoRA has no generators


def test_an_fgvc_task_is_trained_and_scored(fgvc: Path, base: Path, tmp_path: Path) -> None:
    arguments = ["paper", "fgvc", "--data", str(fgvc), "--base", str(base), "--tasks", "CUB_200_2011", *FAST]
    assert main([*arguments, "--out", str(tmp_path / "runs"), "--method", "tau_only"]) == 0
    table = pandas.read_csv(tmp_path / "runs" / "results.csv")
    assert table.accuracy[0] > 0.5


def test_check_says_all_that_is_missing(
    vtab: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (vtab / "svhn" / "images" / "test" / "000003.png").unlink()
    arguments = ["paper", "vtab1k", "--data", str(vtab), "--base", str(base), "--partial"]
    assert main([*arguments, "--check", "--tasks", "svhn", "eurosat"]) == 1
    said = capsys.readouterr().out
    assert "missing: 2" in said
    assert "svhn, test: 1 of 200 images are not there" in said
    assert "000003.png" in said
    assert f"{vtab / 'eurosat' / 'train800val200.txt'} is not there" in said
    assert "svhn: 300 images to train on, expected 1000" in said
    assert "adapter.rank = 8: common for LoRA" in said
    assert main([*arguments, "--tasks", "svhn", "--out", str(tmp_path / "runs")]) == 2
    assert "1 of 200 images are not there" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_check_looks_for_the_base_and_the_folder(
    vtab: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["paper", "vtab1k", "--data", str(tmp_path / "no"), "--base", str(tmp_path / "none"), "--check"]) == 1
    said = capsys.readouterr().out
    assert f"there is no directory '{tmp_path / 'none'}'" in said
    assert f"no folder {tmp_path / 'no'} of examples" in said
    hollow = tmp_path / "hollow"
    hollow.mkdir()
    (hollow / "config.json").write_text((base / "config.json").read_text())
    arguments = ["paper", "vtab1k", "--data", str(vtab), "--tasks", "svhn", "--partial", "--check"]
    assert main([*arguments, "--base", str(hollow)]) == 1
    assert "has a configuration but none of model.safetensors" in capsys.readouterr().out
    assert main([*arguments, "--base", str(base)]) == 0
    assert main([*arguments[:-2], "--base", str(base), "--out", str(tmp_path / "runs")]) == 2
    assert "--partial runs on it all the same" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("images/test/000001.png", "line 2: expected a path and a class below 10, got 'images/test/000001.png'"),
        ("images/test/000001.png 10", "line 2: expected a path and a class below 10"),
        ("images/test/000001.png -1", "line 2: expected a path and a class below 10"),
    ],
)
def test_a_line_that_is_no_image_and_class_is_named(vtab: Path, line: str, message: str) -> None:
    file = vtab / "svhn" / "test.txt"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], line, *lines[2:]]))
    with pytest.raises(ExperimentError, match=message):
        VTAB().rows(vtab, "svhn")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "expected an object from an image's path to the number of its class, got list of 1 entries"),
        ("{", "not JSON"),
        ('{"images/a.png": "bird"}', "invalid literal"),
        ('{"new/000001.png": 999}', "the class 999 is scored on but has no image to train on"),
    ],
)
def test_a_file_that_is_no_map_of_images_is_named(fgvc: Path, content: str, message: str) -> None:
    (fgvc / "CUB_200_2011" / "test.json").write_text(content)
    with pytest.raises(ExperimentError, match=message):
        FGVC().rows(fgvc, "CUB_200_2011")
