"""Merged mode: one engine that runs one adapter at a time at the base model's speed, and swaps weights in between.

`mode` recognises the mode, `scheduler` decides when to swap, `weights` and `experts` swap. Nothing here imports vLLM.
"""
