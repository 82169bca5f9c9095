"""Examples from files: every format, held-out examples, splits of image folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from runs import ROWS, write_rows

from doran_core.errors import ConfigError
from doran_hf.train.config import DataConfig
from doran_hf.train.data import load_examples

pytestmark = pytest.mark.usefixtures("in_folder")


def test_every_format_gives_the_same_rows() -> None:
    import pandas

    frame = pandas.DataFrame(ROWS)
    write_rows("a.jsonl")
    frame.to_csv("a.csv", index=False)
    frame.to_csv("a.tsv", index=False, sep="\t")
    frame.to_parquet("a.parquet")
    frame.to_json("a.json", orient="records")
    for file in ("a.jsonl", "a.csv", "a.tsv", "a.parquet", "a.json"):
        assert list(load_examples(DataConfig(train=file), seed=0).train) == ROWS, file
    Path("a.txt").write_text("\n".join(row["text"] for row in ROWS))
    assert [row["text"] for row in load_examples(DataConfig(train="a.txt"), seed=0).train] == [r["text"] for r in ROWS]


def test_held_out_examples_are_the_seeds_and_apart() -> None:
    write_rows("a.jsonl")
    first, again, other = (load_examples(DataConfig(train="a.jsonl", eval_size=10), seed=s) for s in (1, 1, 2))
    assert list(first.eval) == list(again.eval) != list(other.eval)
    assert sorted(r["text"] for part in (first.train, first.eval) for r in part) == sorted(r["text"] for r in ROWS)
    assert len(load_examples(DataConfig(train="a.jsonl", max_train=3), seed=0).train) == 3


def test_splits_of_image_folders_are_not_guessed() -> None:
    for name in ("train/dark", "train/light", "plain/dark", "plain/light"):
        Path("images", name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(Path("images", name, "0.png"))
    Path("images/plain").rename("plain")
    both = DataConfig(train="images", eval="plain")
    assert len(load_examples(both, seed=0).eval) == 2  # another folder with one split
    assert len(load_examples(DataConfig(train="plain"), seed=0).train) == 2
    with pytest.raises(ConfigError, match=r"data.eval_split: 'images' has no split 'test'; its splits are \['train'\]"):
        load_examples(DataConfig(train="images", eval="images"), seed=0)


def test_a_suffix_in_capitals() -> None:
    Path("A.TSV").write_text("text\tlabel\na b\tc\n")
    assert list(load_examples(DataConfig(train="A.TSV"), seed=0).train) == [{"text": "a b", "label": "c"}]
