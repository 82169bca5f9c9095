"""The page over all tasks, from tables made by hand."""

from __future__ import annotations

import pandas

from experiments.overall import FURTHER, TASKS, overall_page


def task(own: float, *, further: bool = False) -> pandas.DataFrame:
    """LoRA at 80%, DoRA at 81% and DoRAN ``own`` points above LoRA, each a little better with a higher seed."""
    arms = {"lora": 0.0, "doran": own, "dora": 1.0} | ({} if further else {"doran_share_model": 0.5})
    return pandas.DataFrame([
        {
            "arm": arm, "seed": seed, "fraction": 1.0, "rate": 1e-3, "validation_accuracy": 0.8,
            "test_accuracy": 0.8 + 0.01 * (value + 0.1 * seed),
        }
        for arm, value in arms.items()
        for seed in range(3)
    ])  # fmt: skip


def test_further_tasks_count_as_soon_as_they_have_a_table() -> None:
    own = {name: task(0.25) for name in TASKS}
    page = overall_page(own)
    assert "| doran | +0.25 ± 0.00 (3) | -0.75 ± 0.00 (3) |" in page
    assert not any(name in page for name in FURTHER)
    page = overall_page({**own, "flowers": task(3.25, further=True)})
    assert "| doran | +1.00 ± 0.00 (3) | " in page
    assert "| flowers, 100% | +3.25 ± 0.00 | +1.00 ± 0.00 |  |" in page
    assert "| doran_share_model |  |  |" in page  # flowers has no such arm
