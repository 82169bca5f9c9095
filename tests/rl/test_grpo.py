"""TRL's GRPOTrainer with a real vLLM: every rollout is the policy's, by merged weights and by the adapter alone."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the session `serve` has vLLM")
pytest.importorskip("trl", reason="the session `serve` installs TRL")

import torch
from datasets import Dataset
from models import build_tiny
from peft import LoraConfig, get_peft_model
from servers import Server
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, SFTTrainer
from trl.generation import vllm_generation
from vllm import SamplingParams

from doran_core.adapter import read_adapter
from doran_core.errors import ConfigError, DoranError
from doran_hf import DoranConfig, save_folded
from doran_serve import AdapterSync, with_adapter_sync

UPDATES, TOKENS = 3, 6
PROMPTS = [[5, 17, 33, 80], [201, 90, 14, 7], [3, 400, 99, 250]]
APART = 1e-3
"""Logits nearer than this are a tie: a hundred times what two orders of float32 sums differ by here."""
EXACT = {"dtype": "float32", "enforce_eager": True, "block_size": 32}
"""Options of an engine whose tokens are compared, on a CPU."""


@pytest.fixture(scope="module", autouse=True)
def cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DORAN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    """TRL's colocated engine leaves torchrun's variables behind, by which the next trainer would wait for others."""
    yield
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama in float32, and a tokenizer with a word for each number."""
    folder = build_tiny("llama", tmp_path_factory.mktemp("base"))
    words = Tokenizer(WordLevel({f"t{number}": number for number in range(512)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "t0", "bos_token": "t1", "eos_token": "t2"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    return folder


@pytest.fixture
def exact_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL has no way to hand options to its engine."""

    class ExactEngine(vllm_generation.LLM):  # type: ignore[name-defined, misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | EXACT))

    monkeypatch.setattr(vllm_generation, "LLM", ExactEngine)


@pytest.fixture
def writable_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU vLLM packs its weights and drops them, so that TRL cannot load others; on a GPU they stay."""

    def plain(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    monkeypatch.setattr("vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm", plain)


def assert_greedy(model: Any, answers: list[list[int]]) -> None:
    """Each token of the answers to PROMPTS has the best logit of the policy's own forward pass, or one tied with it."""
    was_training = model.training
    model.eval()
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert len(answer) == TOKENS
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert (logits.amax(1) - chosen).max() <= APART, (prompt, answer)
    model.train(was_training)


def greedy(llm: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(inputs, sampling_params=sampling, use_tqdm=False, **options)
    return [list(output.outputs[0].token_ids) for output in outputs]


def train(
    trainer_class: type, base: Path, folder: Path, ask: Callable[[Any], list[list[int]]], **options: Any
) -> tuple[Any, list[list[list[int]]]]:
    """Three updates; in each, between rollout and update, the engine's greedy tokens are held against the policy's."""
    seen: list[list[list[int]]] = []

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        seen.append(ask(trainer))
        assert_greedy(trainer.model, seen[-1])
        return [sum(token % 2 for token in ids) / TOKENS for ids in completion_ids]

    arguments = GRPOConfig(
        str(folder),
        use_vllm=True,
        vllm_max_model_length=64,
        vllm_gpu_memory_utilization=0.05,
        use_cpu=True,
        bf16=False,
        max_steps=UPDATES,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=TOKENS,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    torch.manual_seed(0)
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": " ".join(f"t{n}" for n in prompt)} for prompt in PROMPTS]),
        peft_config=DoranConfig(rank=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    assert len(seen) == UPDATES
    assert seen[0] != seen[-1], "the updates change the greedy tokens, so that an old policy would be noticed"
    logs = [log for log in trainer.state.log_history if "sampling/sampling_logp_difference/max" in log]
    assert len(logs) == UPDATES
    assert max(log["sampling/sampling_logp_difference/max"] for log in logs) < 1e-4  # the sampled tokens' own
    return trainer, seen


def end(llm: Any) -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def ask_engine(trainer: Any) -> list[list[int]]:
    return greedy(trainer.vllm_generation.llm, PROMPTS)


def base_weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "doran_adapter" not in name}


@pytest.mark.usefixtures("exact_engine", "writable_weights")
def test_merged_sync_by_trl_s_own_code(base: Path, tmp_path: Path) -> None:
    trainer, _ = train(GRPOTrainer, base, tmp_path, ask_engine, vllm_mode="colocate")
    try:
        stored = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
        for name, weight in base_weights(trainer.model).items():
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(weight, stored[plain]), f"{name}: merged and unmerged {UPDATES} times"
    finally:
        end(trainer.vllm_generation.llm)


def test_adapter_sync_leaves_both_bases_alone(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftModel

    monkeypatch.setattr(PeftModel, "merge_adapter", None, raising=False)  # whoever merges fails
    by_adapter = with_adapter_sync(GRPOTrainer, save_folded, engine_options=EXACT)
    trainer, seen = train(by_adapter, base, tmp_path, ask_engine, vllm_mode="colocate")
    llm = trainer.vllm_generation.llm
    try:
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        assert greedy(llm, PROMPTS, lora_request=None) == seen[0]
        assert_greedy(plain, seen[0])
        assert len(llm.llm_engine.list_loras()) == 1, "former versions are gone"

        other = get_peft_model(plain, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        sync = AdapterSync(llm, lambda model, directory: model.save_pretrained(directory), "lora")
        for event in (sync.on_train_begin, sync.on_step_end):
            event(None, None, None, model=other)
            assert_greedy(other, greedy(llm, PROMPTS, lora_request=sync.request))
            with torch.no_grad():
                for parameter in (p for p in other.parameters() if p.requires_grad):
                    parameter.mul_(0.5)
    finally:
        end(llm)


@pytest.mark.usefixtures("exact_engine")
def test_the_example(base: Path, tmp_path: Path) -> None:
    prompts = [{"prompt": " ".join(f"t{number}" for number in prompt)} for prompt in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "grpo.py"))
    paths = [str(base), str(tmp_path / "prompts.jsonl"), str(tmp_path / "out")]
    trainer = example["main"]([*paths, "--steps", "2", "--tokens", "4"])
    try:
        assert read_adapter(tmp_path / "out").modules
        assert trainer.vllm_generation.llm.doran_request is not None
    finally:
        end(trainer.vllm_generation.llm)


@pytest.fixture
def server(base: Path, tmp_path: Path) -> Iterator[Server]:
    """`doran serve` with the policy's first version in `tmp_path/served`."""
    torch.manual_seed(0)
    start = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    start = get_peft_model(start, DoranConfig(rank=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    save_folded(start, tmp_path / "served" / "policy")
    processed = ["--logprobs-mode", "processed_logprobs"]
    variables = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    running = Server(base, tmp_path / "served", tmp_path / "log", *processed, **variables)
    yield running
    running.close()


def test_adapter_sync_with_a_server(base: Path, server: Server, tmp_path: Path) -> None:
    train(
        with_adapter_sync(GRPOTrainer, save_folded, served=tmp_path / "served"),
        base,
        tmp_path / "run",
        lambda trainer: [server.complete("policy", prompt, TOKENS) for prompt in PROMPTS],
        vllm_mode="server",
        vllm_server_base_url=server.url,
    )
    assert "POST /init_weight_transfer_engine" not in server.everything()


@pytest.mark.long
def test_two_processes_train_one_policy_with_a_server(base: Path, server: Server, tmp_path: Path) -> None:
    script = Path(__file__).with_name("two_processes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [*command, str(base), str(tmp_path), server.url], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(2)]
    assert seen[0] == seen[1], "both processes hold the policy that the server has"
    assert len(seen[0]["tokens"]) == UPDATES
    assert "POST /init_weight_transfer_engine" not in server.everything()


def test_what_cannot_sync_by_adapter_says_so(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DoranError, match="SFTTrainer: does not roll out with TRL's VLLMGeneration"):
        with_adapter_sync(SFTTrainer, save_folded)
    wrapped = with_adapter_sync(GRPOTrainer, save_folded)
    for options, config, message in (
        ({"use_vllm": False}, DoranConfig(rank=4), "set use_vllm=True"),
        ({"use_vllm": True}, None, "LlamaForCausalLM has no adapter"),
        ({"use_vllm": True, "vllm_mode": "server"}, DoranConfig(rank=4), "served: expected the directory"),
    ):
        arguments = GRPOConfig(
            str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to=[],
            per_device_train_batch_size=4,
            num_generations=4,
            **options,
        )
        with pytest.raises(ConfigError, match=message):
            wrapped(
                AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
                reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
                args=arguments,
                train_dataset=Dataset.from_list([{"prompt": "t5"}]),
                peft_config=config,
            )


def test_a_sleeping_engine_keeps_its_base() -> None:
    """The CPU's worker does not sleep: what TRL asks for, level 2, and what the engine is asked for."""
    from doran_serve.trl import _PolicyEngine

    levels = []

    class Engine:
        def __init__(self, **kwargs: Any) -> None: ...

        def sleep(self, level: int = 1, **kwargs: Any) -> None:
            levels.append((level, kwargs))

    type("PolicyEngine", (_PolicyEngine, Engine), {"doran_options": {}})().sleep(level=2, mode="abort")
    assert levels == [(1, {"mode": "abort"})]
