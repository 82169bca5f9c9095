"""One of the processes that train a policy together: ``two_processes.py BASE FOLDER SERVER_URL``, under torchrun.

In each update every process holds the server's greedy tokens against its own policy (`test_grpo.train`). The server
serves FOLDER/served; rank r writes what it saw, and sums of what it trained, to FOLDER/seen-r.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import conftest  # noqa: F401 - adds the paths of what is imported next
import torch
from servers import Client
from test_grpo import PROMPTS, TOKENS, train
from trl import GRPOTrainer

from doran_hf import save_folded
from doran_serve import with_adapter_sync

if __name__ == "__main__":
    base, folder, url = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    server = Client(url, str(base))
    trainer, seen = train(
        with_adapter_sync(GRPOTrainer, save_folded, served=folder / "served"),
        base,
        folder / "run",
        lambda trainer: [server.complete("policy", prompt, TOKENS) for prompt in PROMPTS],
        vllm_mode="server",
        vllm_server_base_url=url,
    )
    rank = os.environ["RANK"]
    trained = {name: p.double().sum().item() for name, p in trainer.model.named_parameters() if p.requires_grad}
    (folder / f"seen-{rank}.json").write_text(json.dumps({"tokens": seen, "sums": trained}))
