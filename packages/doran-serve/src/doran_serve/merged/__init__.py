"""Merged mode: one engine that runs one adapter at a time at the base model's speed, and swaps weights in between.

`mode` says whether an engine is in it, `scheduler` decides when to swap, `weights` swaps. Nothing here imports vLLM.
"""
