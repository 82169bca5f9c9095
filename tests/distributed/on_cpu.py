"""Run a script under `accelerate launch` on a machine without a GPU: ``on_cpu.py [--ddp] SCRIPT [arguments]``.

accelerate knows FSDP and ZeRO on accelerators alone. It is told that there are some, joined by gloo, and that its
device is the CPU (ACCELERATE_TORCH_DEVICE=cpu), and transformers that they compute in bfloat16; all else is their own.
The last line says what accelerate made of its configuration. With ``--ddp`` accelerate is told the truth, because it
knows DDP on a CPU.
"""

from __future__ import annotations

import os
import runpy
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from processes import skip_builds
from transformers import training_args

if __name__ == "__main__":
    ddp = sys.argv[1] == "--ddp"
    found = ("gloo", DistributedType.MULTI_CPU if ddp else DistributedType.MULTI_GPU)
    PartialState._prepare_backend = lambda *args, **kwargs: found  # type: ignore[method-assign]
    training_args.is_torch_bf16_gpu_available = lambda: True
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        skip_builds()
    sys.argv = sys.argv[2:] if ddp else sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    state = AcceleratorState()
    version = getattr(getattr(state, "fsdp_plugin", None), "fsdp_version", None)
    stage = state.deepspeed_plugin.zero_stage if state.distributed_type == DistributedType.DEEPSPEED else None
    print(
        " ".join(
            [
                "spread by",
                state.distributed_type.value,
                *filter(None, [str(version or stage or "")]),
                f"over {state.num_processes}",
            ]
        )
    )
