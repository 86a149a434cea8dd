"""Families whose arithmetic a library's default gets wrong, through the loading that every script uses."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import build_tiny_tokenizer

from cai_experiment.constitution.prompts import Turn
from cai_experiment.engines.base import Prompt, Sampling
from cai_experiment.engines.load import LoadSettings, load_engine


@pytest.fixture(scope="module")
def gemma_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 2 whose scores are large enough for its cap of 5 to matter."""
    import torch
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    folder = tmp_path_factory.mktemp("gemma2")
    build_tiny_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, attn_logit_softcapping=5.0, sliding_window=4096,
        max_position_embeddings=2048, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 30
            layer.self_attn.k_proj.weight *= 30
    model.save_pretrained(folder)
    return folder


def test_gemma_2_is_loaded_with_its_cap_and_spoken_with_it(gemma_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    by_default = AutoModelForCausalLM.from_pretrained(gemma_dir, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(gemma_dir, dtype=torch.float32, attn_implementation="eager")
    engine = load_engine(LoadSettings(str(gemma_dir), layout="base", quantization="fp32"))
    ids = torch.arange(3, 40)[None]
    right = plain(ids).logits
    assert not torch.allclose(by_default(ids).logits, right, atol=1e-3)  # what is guarded against
    torch.testing.assert_close(engine.model(ids).logits, right)  # type: ignore[attr-defined]
    assert engine.describe()["engine"] == "hf"
    prompt = Prompt("a", (Turn("instruction", "Why is the sea salt?"),), "answer", Sampling(), options=("A", "B"))
    weighed = next(iter(engine.stream([prompt])))
    spoken = engine.renderer.prompt_ids(prompt.turns, "answer", max_tokens=1)  # type: ignore[attr-defined]
    logits = plain(torch.tensor([spoken])).logits[0, -1].log_softmax(-1)
    wanted = [logits[n].item() for n in engine.renderer.option_ids(prompt.options)]  # type: ignore[attr-defined]
    assert list(weighed.logprobs) == pytest.approx(wanted, abs=1e-4)
    engine.close()
