"""Shared fixtures: a tiny random Qwen2 with its tokenizer, the shipped model, the public data beside the project."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# No test may reach the network; set before any library reads it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores, and these models are too small for two threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MKL_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background: Ctrl-C's tests would hang
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
NANO_DIR = ROOT / "cai_experiment" / "nano" / "weights" / "nano"
SHARED_DATA = ROOT.parent / "shared" / "data"

MAX_WORKERS = 8  # a file is never split, and the longest takes about an eighth of the whole
WORKER_GB = 3.0  # peak of one worker with the processes that its tests start

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = (
    "How do I grow tomatoes on a small balcony without much sun?",
    "Use a large pot, water in the morning and turn the plant once a week. It may still grow slowly.",
    "Principle: Give no advice that is harmful, dangerous or could injure someone.",
    'The answer says "Lean far over the rail." This could injure someone.',
    "Rewrite the answer with a safe way instead of the dangerous one. Keep everything else as it is.",
    "No issue found. Reply with A or B. Does the last answer break this principle? A: Yes B: No",
    "### Human: ### Assistant: ### Critique request: ### Revision:",
)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Worker processes for `-n auto` (pyproject's addopts): for the whole suite on a CPU, else 0, this process alone.

    A file, `-k`, `-m`, `-s` or `--lf` mean that somebody looks at single tests; a card's memory is not to be shared.
    """
    option = config.option
    whole = all(Path(argument).is_dir() for argument in config.args) and option.markexpr == "not slow and not gpu"
    if not whole or option.keyword or option.lf or option.collectonly or option.capture == "no":
        return 0
    from cai_experiment.models import hardware

    machine = hardware.detect()
    workers = min(machine.cores, MAX_WORKERS, int(machine.ram_gb // WORKER_GB))
    return workers if machine.kind == "cpu" and workers > 1 else 0


def build_tiny_tokenizer(folder: Path, vocab_size: int = 600) -> None:
    """Train a byte-level BPE on SENTENCES and save it into `folder`, in the way that AutoTokenizer reads Qwen2's.

    The pre-tokenizer is Qwen2's own: for model_type "qwen2" AutoTokenizer rebuilds it, whatever was saved.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=2048,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def build_tiny_model(folder: Path, seed: int = 0, hidden: int = 64, layers: int = 2) -> None:
    """Write a random Qwen2ForCausalLM (float32 safetensors, context 2048) and its tokenizer into `folder`."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    build_tiny_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random chat model (Qwen2 architecture, ChatML template); read it, do not write into it."""
    folder = tmp_path_factory.mktemp("tiny_model")
    build_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def nano_dir() -> Path:
    """Folder of the shipped model; without its weights the test skips, and under CI it fails."""
    if not (NANO_DIR / "model.safetensors").is_file():
        reason = f"{NANO_DIR} has no model.safetensors; make it with cai_experiment/scripts/train_nano.py"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return NANO_DIR


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of public data files beside the project (../shared/data); the test skips where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("../shared/data is absent beside this checkout: loaders are not tried on real files")
    return SHARED_DATA
