"""Speed of a base model, of stock LoRA and of DoRAN on this machine, in one run: `doran bench-serve`.

Two engines do not share a machine, so each case runs in a process of its own (`child`), one after the other (`run`).
"""
