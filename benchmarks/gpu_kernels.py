"""The kernels that a call launches on a GPU, and their time."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

__all__ = ["kernels_of"]


def kernels_of(call: Callable[[], object]) -> list[tuple[str, int, float]]:
    """Name, number of launches and milliseconds of each kernel, the dearest first.

    Args:
        call: what to profile; it ends by waiting for the GPU.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
    events = [event for event in found.key_averages() if event.self_device_time_total > 0]
    events.sort(key=lambda event: -event.self_device_time_total)
    return [(event.key, event.count, event.self_device_time_total / 1e3) for event in events]
