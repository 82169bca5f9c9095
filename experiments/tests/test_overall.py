"""The page over all tasks, from tables made by hand."""

from __future__ import annotations

import pandas

from experiments.overall import GROUPS, NEEDED, overall_page


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


def test_a_group_counts_as_soon_as_a_study_of_it_has_a_table() -> None:
    own = {name: task(0.25) for name in NEEDED}
    page = overall_page(own)
    # Minus LoRA: DoRAN, DoRA, the shared trunk. Minus DoRA: LoRA, DoRAN, the shared trunk.
    for group in ("texts and digits", "all"):
        assert f"| {group} | +0.25 ± 0.00 (3) | +1.00 ± 0.00 (3) | +0.50 ± 0.00 (3) |" in page
        assert f"| {group} | -1.00 ± 0.00 (3) | -0.75 ± 0.00 (3) | -0.50 ± 0.00 (3) |" in page
    assert not any(name in page for group, names in GROUPS.items() for name in (group, *names) if names != NEEDED)
    page = overall_page({**own, "flowers": task(3.25, further=True)})
    assert "| texts and digits | +0.25 ± 0.00 (3) | " in page
    assert "| photos | +3.25 ± 0.00 (3) | +1.00 ± 0.00 (3) |  |" in page  # flowers has no shared trunk
    assert "| all | +1.00 ± 0.00 (3) | +1.00 ± 0.00 (3) |  |" in page
    assert "| flowers, 100% | +3.25 ± 0.00 | +1.00 ± 0.00 |  |" in page
    assert "commonsense" not in page


def test_a_mean_counts_the_seeds_that_all_of_its_tasks_have() -> None:
    photos = task(0.25, further=True)
    page = overall_page({**{name: task(0.25) for name in NEEDED}, "flowers": photos[photos.seed < 2]})
    assert "| texts and digits | +0.25 ± 0.00 (3) | " in page
    assert "| photos | +0.25 ± 0.00 (2) | " in page
    assert "| all | +0.25 ± 0.00 (2) | " in page
