"""Data in folders of the user's: photos for a ViT out of an ONNX graph, and commonsense questions."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from experiments import questions, sources
from experiments.__main__ import main
from experiments.dinov2 import load_dinov2, renamed_layers
from experiments.errors import ExperimentError
from experiments.photos import SIDE, photo_split
from experiments.study import Run
from experiments.tasks import load_task, prepare, require
from experiments.train import train_runs

onnx = pytest.importorskip("onnx")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Dark and bright photos, as two classes."""
    random = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 20)):
        for name, level in (("bright", 170), ("dark", 0)):
            (tmp_path / "two" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = level + random.integers(0, 80, (32, 40, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "two" / part / name / f"{number}.png")
    return tmp_path


def tiny_graph(path: Path) -> Any:
    """A small Dinov2Model, and the ONNX graph of it as an exporter names its tensors (without what computes)."""
    from safetensors.torch import load_file
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    model = Dinov2Model(
        Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, mlp_ratio=2, image_size=56)
    ).eval()
    model.save_pretrained(path.parent / "saved")
    tensors, nodes = [], []

    def constant(name: str, value: torch.Tensor) -> str:
        tensors.append(onnx.numpy_helper.from_array(value.contiguous().numpy(), name))
        return name

    for name, value in load_file(path.parent / "saved" / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if name == "embeddings.position_embeddings":
            for kind, part in (("Concat", value[:, :1]), ("Reshape", value[:, 1:])):
                stored = constant(f"onnx::{kind}_1", part)
                nodes.append(onnx.helper.make_node(kind, ["x", stored], ["y"], name=f"/backbone/embeddings/{kind}_1"))
        elif name.endswith(".weight") and value.dim() == 2:
            stored = constant(f"onnx::MatMul_{len(tensors)}", value.T)
            place = f"/backbone/{layer.replace('.', '/').replace('layer/', 'layer.')}/MatMul"
            nodes.append(onnx.helper.make_node("MatMul", ["x", stored], ["y"], name=place))
        elif "mask_token" not in name:
            constant(f"backbone.{name}", value)
    constant("decoder.conv.weight", torch.zeros(1, 1, 1, 1))
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "vit", [], [], tensors)), str(path))
    return model


def test_the_backbone_of_a_graph_is_the_model(tmp_path: Path) -> None:
    model = tiny_graph(tmp_path / "vit.onnx")
    x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(pixel_values=x).last_hidden_state
        for _ in range(2):  # from the graph, and from the cache
            found = load_dinov2(tmp_path / "vit.onnx", tmp_path / "cache").eval()(pixel_values=x).last_hidden_state
            torch.testing.assert_close(found, expected)


def test_a_graph_without_a_backbone_is_refused(tmp_path: Path) -> None:
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), str(tmp_path / "x.onnx"))
    with pytest.raises(ExperimentError, match="no DINOv2 backbone"):
        load_dinov2(tmp_path / "x.onnx", tmp_path / "cache")


def test_photos(photos: Path) -> None:
    split = photo_split(photos / "two")
    assert [len(part.labels) for part in (split.train, split.validation, split.test)] == [24, 12, 28]
    assert split.train.inputs.shape[1:] == (3, SIDE, SIDE)
    for part in (split.train, split.validation, split.test):
        dark = part.inputs.float().mean((1, 2, 3)) < 100
        assert torch.equal(dark.long(), part.labels)  # classes are numbered by name


def test_photos_that_are_not_there_or_of_other_classes(photos: Path) -> None:
    with pytest.raises(ExperimentError, match="expected folders of photos"):
        photo_split(photos)
    (photos / "two" / "test" / "dark").rename(photos / "two" / "test" / "grey")
    with pytest.raises(ExperimentError, match="grey"):
        photo_split(photos / "two")


def test_layers_of_attention_are_found_by_the_names_of_other_versions() -> None:
    today = nn.ModuleDict({"attention": nn.ModuleDict({"q_proj": nn.Linear(2, 2), "v_proj": nn.Linear(2, 2)})})
    former = nn.ModuleDict({"attention": nn.ModuleDict({"query": nn.Linear(2, 2), "value": nn.Linear(2, 2)})})
    assert renamed_layers(today) == {}
    assert [renamed_layers(former)[name] for name in ("q_proj", "v_proj")] == ["query", "value"]


@pytest.mark.parametrize(("method", "rate"), [("doran", 1e-2), ("full", 1e-3)])
def test_a_run_on_photos_learns(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, rate: float
) -> None:
    (tmp_path / "models").mkdir()
    tiny_graph(tmp_path / "models" / "vit_s_focus.onnx")
    monkeypatch.setattr(sources, "_folder", lambda package, install: tmp_path)
    task = load_task("dinov2/two", tmp_path / "cache", photos)
    run = Run("dinov2/two", method, (), ("q_proj", "v_proj"), 2, "rank", rate, 1e-2, 30, 8, 1.0, 0)
    (row,) = train_runs(
        task, (task.split.train, task.split.validation, task.split.test), [run], torch.device("cpu")
    ).rows
    assert row["test_accuracy"] > 0.9


def question(number: int, choices: int, answer: int, word: str = "Answer") -> dict[str, str]:
    listed = " ".join(f"{word}{i}: thing {number}-{i}" for i in range(1, choices + 1))
    text = f"{word.lower()}{answer}"
    return {
        "instruction": f"Please choose:{' really' * number} which thing is right?\n\n{listed}",
        "output": "",
        "answer": text,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A few questions of each task."""
    for task in questions.TESTS:
        (tmp_path / "asked" / task).mkdir(parents=True)
        for part, count in (("train", 40), ("test", 5)):
            if task == "boolq":
                rows = [{"instruction": f"Is {i} even?", "answer": str(i % 2 == 0).lower()} for i in range(count)]
            else:
                word, choices = {"piqa": ("Solution", 2), "winogrande": ("Option", 2)}.get(task, ("Answer", 4))
                rows = [question(i, choices, 1 + i % choices, word) for i in range(count)]
            (tmp_path / "asked" / task / f"{part}.json").write_text(json.dumps(rows))
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    file = sources.smollm2_file()
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def test_questions_ask_for_the_last_piece(folder: Path, tokenizer: Any) -> None:
    split = questions.questions_split(folder / "asked", tokenizer)
    assert (len(split.train.labels), len(split.validation.labels), len(split.test.labels)) == (144, 16, 35)
    assert split.test.lengths is not None
    assert split.test.groups is not None
    assert split.test.choices is not None
    for index, ids in enumerate(split.test.inputs):
        task = questions.TESTS[int(split.test.groups[index])]
        row = json.loads((folder / "asked" / task / "test.json").read_text())[index % 5]
        text = tokenizer.decode(ids[: split.test.lengths[index]])
        assert row["instruction"] in text
        piece = questions.PIECES[int(split.test.labels[index])]
        assert f"{text}{piece}".endswith(f"### Response:\nthe correct answer is {row['answer']}")
        possible = [p for p, may in zip(questions.PIECES, split.test.choices[index], strict=True) if may]
        assert possible == [" true", " false"] if task == "boolq" else list("1234"[: row["instruction"].count(":") - 1])
        assert len(tokenizer(piece, add_special_tokens=False).input_ids) == 1


def test_a_text_may_begin_with_a_token_that_is_never_cut(folder: Path, tokenizer: Any) -> None:
    file = folder / "asked" / "piqa" / "test.json"
    file.write_text(json.dumps([question(400, 2, 1, "Solution"), question(1, 2, 1, "Solution")]))
    plain = questions.questions_split(folder / "asked", tokenizer).test
    begun = questions.questions_split(folder / "asked", tokenizer, [7]).test
    assert plain.lengths is not None
    assert begun.lengths is not None
    long = int((plain.lengths == questions.LONGEST).nonzero())
    assert begun.lengths[long] == questions.LONGEST
    assert begun.inputs[long].tolist() == [7, *plain.inputs[long, 1:].tolist()]
    assert (begun.inputs[:, 0] == 7).all()
    assert begun.lengths[long + 1] == plain.lengths[long + 1] + 1


def test_questions_of_another_form_are_refused(folder: Path, tokenizer: Any) -> None:
    file = folder / "asked" / "piqa" / "test.json"
    file.write_text(json.dumps([question(0, 2, 3, "Solution")]))
    with pytest.raises(ExperimentError, match=r"piqa/test.json: expected an answer that names one of its choices"):
        questions.questions_split(folder / "asked", tokenizer)


def test_a_tokenizer_that_splits_an_answer_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tokenizer(text: str, *, add_special_tokens: bool) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[0] * len(text.split(" ")))

    monkeypatch.setattr("experiments.tasks._gguf", lambda file: (None, tokenizer))
    with pytest.raises(ExperimentError, match=r"one token for each of .*, got .*\[0, 0\]\] \(transformers 5\.17"):
        load_task("smollm2/asked", folder / "cache", folder)


def test_what_is_missing_is_said(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ExperimentError, match=r"commonsense: no such directory; --data DIR names the folder"):
        require("smollm2/commonsense", photos)
    with pytest.raises(ExperimentError, match="unknown model 'minilm/two'"):
        require("minilm/two", photos)
    assert main(["run", "commonsense_smollm2", "--data", str(photos), "--check"]) == 1
    assert "smollm2/commonsense: " in capsys.readouterr().out


def test_every_model_that_workers_share_is_made_before_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr("experiments.digits.pretrained_vit", lambda cache: made.append("vit"))
    monkeypatch.setattr("experiments.dinov2.load_dinov2", lambda file, cache: made.append("dinov2"))
    monkeypatch.setattr(sources, "dinov2_file", lambda: tmp_path)
    prepare(["vit", "dinov2/two", "random_vit/two", "minilm"], tmp_path)
    assert made == ["vit", "dinov2"]
