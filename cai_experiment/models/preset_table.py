"""The models that this lab knows, as rows with reasons. Data; no torch.

Architecture numbers were held against litgpt's config.py, transformers' model classes (tests/test_presets.py builds
each there and compares every count) and the parameter counts of the hub's safetensors indexes. A revision is a commit
that several public repositories pin for that model; it was the newest in November 2026 as far as they show.
"""

from __future__ import annotations

from cai_experiment.models.memory import Architecture
from cai_experiment.models.preset import WEIGHTS_DIR, ModelPreset, TrainingOverrides

YARN = "131,072 with YaRN (factor 4), to be set in config.json"
YARN_3 = "131,072 with YaRN (factor 4), 32,768 without (40,960 leaves room for an answer)"
NATIVE = "native"
APACHE = "apache-2.0"


def _qwen2(layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, vocab: int) -> Architecture:
    return Architecture(
        layers, hidden, heads, kv_heads, hidden // heads, intermediate, vocab, tied=vocab == 151_936
    )  # the smaller vocabulary comes with a tied head


def _qwen3(layers: int, hidden: int, heads: int, intermediate: int, tied: bool) -> Architecture:
    return Architecture(layers, hidden, heads, 8, 128, intermediate, 151_936, tied, attention_bias=False,
                        qk_norm="head", model_type="qwen3")  # fmt: skip


def _llama(
    layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, vocab: int, tied: bool = False,
    model_type: str = "llama", fused: bool = False,
) -> Architecture:  # fmt: skip
    return Architecture(layers, hidden, heads, kv_heads, hidden // heads, intermediate, vocab, tied,
                        attention_bias=False, fused=fused, model_type=model_type)  # fmt: skip


def _gemma(
    layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, vocab: int, model_type: str,
    norms: int = 2, qk_norm: str = "",
) -> Architecture:  # fmt: skip
    return Architecture(layers, hidden, heads, kv_heads, 256, intermediate, vocab, tied=True, attention_bias=False,
                        norms=norms, qk_norm=qk_norm, capped=model_type == "gemma2",
                        model_type=model_type)  # fmt: skip


def _gpt2(layers: int, hidden: int, heads: int) -> Architecture:
    return Architecture(layers, hidden, heads, heads, 64, 4 * hidden, 50_257, tied=True, output_bias=True,
                        mlp_bias=True, gated=False, fused=True, norm_bias=True, positions=1024,
                        model_type="gpt2")  # fmt: skip


_QWEN_05 = _qwen2(24, 896, 14, 2, 4864, 151_936)
_QWEN_15 = _qwen2(28, 1536, 12, 2, 8960, 151_936)
_QWEN_3 = _qwen2(36, 2048, 16, 2, 11_008, 151_936)
_QWEN_7 = _qwen2(28, 3584, 28, 4, 18_944, 152_064)
_QWEN_14 = _qwen2(48, 5120, 40, 8, 13_824, 152_064)
_QWEN_32 = _qwen2(64, 5120, 40, 8, 27_648, 152_064)
_QWEN3_8 = _qwen3(36, 4096, 32, 12_288, tied=False)
_QWEN3_14 = _qwen3(40, 5120, 40, 17_408, tied=False)
_PHI_2 = Architecture(32, 2560, 32, 32, 80, 10_240, 51_200, tied=False, output_bias=True, mlp_bias=True,
                      head_bias=True, gated=False, norms=1, norm_bias=True, model_type="phi")  # fmt: skip

_LLAMA3 = {
    "rope_theta": 500_000.0, "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def _nano(key: str, good_at: str) -> ModelPreset:
    """A shipped model; the kind, the size and the training values are the same in all."""
    return ModelPreset(
        key, str(WEIGHTS_DIR / key), "chat", None, 2048, APACHE, good_at,
        TrainingOverrides(
            1.6e-4, "a few million parameters hardly move at 5e-6; at 2e-4 answers repeat",
            # three disjoint sets of 100 pairs: at most 2% of answers flawed, 0.95 of the distinct pairs of words
            sft_learning_rate=7e-4, sft_epochs=3.0, after_sft=1.2e-4,
            sft_reason="six epochs at 1e-3, or DPO at 1.6e-4 after it, lose a seventh of the distinct word pairs",
        ),
        tags=frozenset({"rehearsal"}), long_context=NATIVE,
    )  # fmt: skip


def _qwen25(
    key: str, name: str, numbers: Architecture, published: int, context: int, revision: str, good_at: str, *tags: str,
    licence: str = APACHE,
) -> ModelPreset:  # fmt: skip
    """One of Qwen 2 and 2.5; Unsloth's authors have quantised them all under the same kind of name."""
    return ModelPreset(
        key, f"Qwen/{name}", "chat" if name.endswith("Instruct") else "base", numbers, context, licence, good_at,
        tags=frozenset(tags), revision=revision, published=published,
        long_context=YARN if numbers.layers in (28, 48, 64) and name.endswith("Instruct") and numbers.hidden > 2048
        else NATIVE, four_bit=f"unsloth/{name}-bnb-4bit",
        config={"rope_theta": 10_000.0} if "Math" in name else {},
    )  # fmt: skip


RESEARCH = "qwen-research"  # no commercial use
SHIPPED = (
    _nano("nano", "rehearsing every script on a CPU; its small world has a known truth"),
    _nano("nano-b", "a second model of the shipped kind, other weights: rehearses two roles and comparisons"),
)
QWEN25 = (
    # short keys up to 14b mean the Instruct models; qwen2.5-32b the base model, the target of this project
    _qwen25("qwen2.5-0.5b", "Qwen2.5-0.5B-Instruct", _QWEN_05, 494_032_768, 32_768,
            "7ae557604adf67be50417f59c2c2f167def9a775", "trying the pipeline on the smallest real model",
            "instructions"),
    _qwen25("qwen2.5-1.5b", "Qwen2.5-1.5B-Instruct", _QWEN_15, 1_543_714_304, 32_768,
            "989aa7980e4cf806f80c7fef2b1adb7bc71aa306", "8 GB cards and patient CPUs", "instructions"),
    _qwen25("qwen2.5-3b", "Qwen2.5-3B-Instruct", _QWEN_3, 3_085_938_688, 32_768,
            "aa8e72537993ba99e69dfaafa59ed015b17504d1", "a fast baseline; its licence forbids commercial use",
            "instructions", "critique", licence=RESEARCH),
    _qwen25("qwen2.5-7b", "Qwen2.5-7B-Instruct", _QWEN_7, 7_615_616_512, 32_768,
            "a09a35458c702b33eeacc393d103063234e8bc28", "useful critiques on a 15 GB card; reasoning and coding",
            "instructions", "critique", "reasoning", "coding", "math"),
    _qwen25("qwen2.5-14b", "Qwen2.5-14B-Instruct", _QWEN_14, 14_770_033_664, 32_768,
            "cf98f3b3bbb457ad9e2bb7baf9a0125b6b88caa8", "the best critic of this line for a 24 GB card",
            "instructions", "critique", "reasoning", "coding", "math"),
    _qwen25("qwen2.5-32b", "Qwen2.5-32B", _QWEN_32, 32_763_876_352, 131_072,
            "1818d35814b8319459f4bd55ed1ac8709630f003",
            "the target of this project: a base model, few-shot prompts, one A100 80 GB",
            "fine-tuning", "reasoning", "coding", "math"),
    _qwen25("qwen2.5-0.5b-base", "Qwen2.5-0.5B", _QWEN_05, 494_032_768, 32_768,
            "060db6499f32faf8b98477b0a26969ef7d8b9987", "rehearsing base models' few-shot prompts with real text",
            "fine-tuning"),
    _qwen25("qwen2.5-1.5b-base", "Qwen2.5-1.5B", _QWEN_15, 1_543_714_304, 131_072,
            "8faed761d45a263340a0528343f099c05c9a4323", "fine-tuning on 8 GB cards; token-level ensembles",
            "fine-tuning"),
    _qwen25("qwen2.5-3b-base", "Qwen2.5-3B", _QWEN_3, 3_085_938_688, 32_768,
            "3aab1f1954e9cc14eb9509a215f9e5ca08227a9b", "fine-tuning; its licence forbids commercial use",
            "fine-tuning", licence=RESEARCH),
    _qwen25("qwen2.5-7b-base", "Qwen2.5-7B", _QWEN_7, 7_615_616_512, 131_072,
            "d149729398750b98c0af14eb82c78cfe92750796", "the target's recipe on a 15 GB card", "fine-tuning"),
    _qwen25("qwen2.5-14b-base", "Qwen2.5-14B", _QWEN_14, 14_770_033_664, 131_072,
            "97e1e76335b7017d8f67c08a19d103c0504298c9", "the target's recipe on a 24 GB card", "fine-tuning"),
    _qwen25("qwen2.5-32b-instruct", "Qwen2.5-32B-Instruct", _QWEN_32, 32_763_876_352, 32_768,
            "5ede1c97bbab6ce5cda5812749b4c0bdf79b18dd", "a strong critic and judge for one A100 80 GB",
            "instructions", "critique", "reasoning", "coding", "math"),
    _qwen25("qwen2-1.5b-instruct", "Qwen2-1.5B-Instruct", _QWEN_15, 1_543_714_304, 32_768,
            "ba1cf1846d7df0a0591d6c00649f57e798519da8",
            "evaluation and critique in 3 GB; the first plans' model for both roles", "instructions", "critique"),
    _qwen25("qwen2.5-math-1.5b", "Qwen2.5-Math-1.5B", _QWEN_15, 1_543_714_304, 4096,
            "4a83ca6e4526a4f2da3aa259ec36c259f66b2ab2", "mathematics, as an expert of a token-level ensemble",
            "math", "reasoning", "fine-tuning"),
)  # fmt: skip
OTHERS = (
    ModelPreset(
        "phi-2", "microsoft/phi-2", "base", _PHI_2, 2048, "mit", "learning from fine-tuning; plain reasoning",
        tags=frozenset({"fine-tuning", "reasoning"}), revision="810d367871c1d460086d9f82db8696f2e0a0fcd0",
        published=2_779_683_840, long_context=NATIVE, unsloth=False, config={"partial_rotary_factor": 0.4},
    ),
    ModelPreset(
        "phi-3.5-mini", "microsoft/Phi-3.5-mini-instruct", "chat",
        _llama(32, 3072, 32, 32, 8192, 32_064, model_type="phi3", fused=True), 131_072, "mit",
        "reasoning for its size; every head keeps its own keys, so long contexts cost much memory",
        tags=frozenset({"instructions", "reasoning", "math", "long-context"}),
        revision="2fe192450127e6a83f7441aef6e3ca586c338b77", published=3_821_079_552,
        long_context="native by LongRoPE (other factors beyond 4,096)",
        four_bit="unsloth/Phi-3.5-mini-instruct-bnb-4bit", config={"sliding_window": 262_144},
    ),
    ModelPreset(
        "phi-4-mini", "microsoft/Phi-4-mini-instruct", "chat",
        _llama(32, 3072, 24, 8, 8192, 200_064, tied=True, model_type="phi3", fused=True), 131_072, "mit",
        "reasoning and mathematics in 4 GB", tags=frozenset({"instructions", "reasoning", "math", "long-context"}),
        revision="cfbefacb99257ffa30c83adab238a50856ac3083", published=3_836_021_760,
        long_context="native by LongRoPE (other factors beyond 4,096)",
        four_bit="unsloth/Phi-4-mini-instruct-bnb-4bit",
        config={"sliding_window": 262_144, "partial_rotary_factor": 0.75},
    ),
    ModelPreset(
        "phi-4", "microsoft/phi-4", "chat",
        _llama(40, 5120, 40, 10, 17_920, 100_352, model_type="phi3", fused=True), 16_384, "mit",
        "reasoning and mathematics on a 24 GB card", tags=frozenset({"instructions", "reasoning", "math", "critique"}),
        revision="187ef0342fff0eb3333be9f00389385e95ef0b61", published=14_659_507_200, long_context=NATIVE,
        four_bit="unsloth/phi-4-bnb-4bit", config={"rope_theta": 250_000.0},
    ),
    ModelPreset(
        "llama-3.2-1b", "meta-llama/Llama-3.2-1B-Instruct", "chat", _llama(16, 2048, 32, 8, 8192, 128_256, tied=True),
        131_072, "llama3.2", "small and quick, for phones and CPUs", tags=frozenset({"instructions", "long-context"}),
        revision="9213176726f574b556790deb65791e0c5aa438b6", gated=True, published=1_235_814_400, long_context=NATIVE,
        four_bit="unsloth/Llama-3.2-1B-Instruct-bnb-4bit", config=_LLAMA3,
    ),
    ModelPreset(
        "llama-3.2-3b", "meta-llama/Llama-3.2-3B-Instruct", "chat", _llama(28, 3072, 24, 8, 8192, 128_256, tied=True),
        131_072, "llama3.2", "plain instructions with a long context in 4 GB",
        tags=frozenset({"instructions", "long-context"}), revision="0cb88a4f764b7a12671c53f0838cd831a0843b95",
        gated=True, published=3_212_749_824, long_context=NATIVE, four_bit="unsloth/Llama-3.2-3B-Instruct-bnb-4bit",
        config=_LLAMA3,
    ),
    ModelPreset(
        "llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct", "chat", _llama(32, 4096, 32, 8, 14_336, 128_256), 131_072,
        "llama3.1", "the model of published CAI trials of this size", gated=True, published=8_030_261_248,
        tags=frozenset({"instructions", "critique", "reasoning", "long-context"}),
        revision="0e9e39f249a16976918f6564b8830bc894c89659", long_context=NATIVE,
        four_bit="unsloth/Llama-3.1-8B-Instruct-bnb-4bit", config={**_LLAMA3, "factor": 8.0},
    ),
    ModelPreset(
        "mistral-7b", "mistralai/Mistral-7B-Instruct-v0.3", "chat",
        _llama(32, 4096, 32, 8, 14_336, 32_768, model_type="mistral"), 32_768, APACHE,
        "fluent text; a judge of another family than Qwen", gated=True, tags=frozenset({"instructions", "critique"}),
        revision="c170c708c41dac9275d15a8fff4eca08d52bab71", published=7_248_023_552, long_context=NATIVE,
        four_bit="unsloth/mistral-7b-instruct-v0.3-bnb-4bit",
        config={"rope_theta": 1_000_000.0, "sliding_window": None},
    ),
    ModelPreset(
        "deepseek-coder-6.7b", "deepseek-ai/deepseek-coder-6.7b-instruct", "chat",
        _llama(32, 4096, 32, 32, 11_008, 32_256), 16_384, "deepseek", "code; every head keeps its own keys",
        tags=frozenset({"coding", "instructions"}), revision="e5d64addd26a6a1db0f9b863abf6ee3141936807",
        published=6_740_512_768, long_context="native by linear scaling (factor 4)",
        config={"rope_theta": 100_000.0, "rope_type": "linear", "factor": 4.0},
    ),
    ModelPreset(
        "gemma-2-2b", "google/gemma-2-2b-it", "chat", _gemma(26, 2304, 8, 4, 9216, 256_000, "gemma2", norms=4), 8192,
        "gemma", "fluent text for its size; its 256,000 words take a quarter of it", gated=True,
        tags=frozenset({"instructions"}), revision="299a8560bedf22ed1c72a8a11e7dce4a7f9f51f8",
        published=2_614_341_888, long_context="native; every second layer sees 4,096 tokens",
        four_bit="unsloth/gemma-2-2b-it-bnb-4bit", config={"sliding_window": 4096, "query_pre_attn_scalar": 256},
    ),
    ModelPreset(
        "gemma-2b", "google/gemma-2b-it", "chat", _gemma(18, 2048, 8, 1, 16_384, 256_000, "gemma"), 8192, "gemma",
        "general text; behind the others of its size", gated=True, tags=frozenset({"instructions"}),
        revision="96988410cbdaeb8d5093d1ebdc5a8fb563e02bad", published=2_506_172_416, long_context=NATIVE,
        four_bit="unsloth/gemma-2b-it-bnb-4bit",
    ),
    ModelPreset(
        "gemma-3-1b", "google/gemma-3-1b-it", "chat",
        _gemma(26, 1152, 4, 1, 6912, 262_144, "gemma3_text", norms=4, qk_norm="head"), 32_768, "gemma",
        "many languages in 2 GB", gated=True, tags=frozenset({"instructions"}),
        revision="dcc83ea841ab6100d6b47a070329e1ba4cf78752", published=999_885_952,
        long_context="native; five of six layers see 512 tokens", four_bit="unsloth/gemma-3-1b-it-bnb-4bit",
        config={"sliding_window": 512, "query_pre_attn_scalar": 256},
    ),
    ModelPreset(
        "gpt2", "openai-community/gpt2", "base", _gpt2(12, 768, 12), 1024, "mit",
        "a baseline of 2019, small and fast", revision="607a30d783dfa663caf39e06633721c8d4cfcd7e",
        tags=frozenset({"fine-tuning"}), published=124_439_808, long_context="none: 1,024 learned positions",
        unsloth=False,
    ),
    ModelPreset(
        "gpt2-xl", "openai-community/gpt2-xl", "base", _gpt2(48, 1600, 25), 1024, "mit",
        "a weak generator of another kind, for the conservative configuration",
        tags=frozenset({"fine-tuning"}), revision="15ea56dee5df4983c59b2538573817e1667135e2",
        published=1_557_611_200, long_context="none: 1,024 learned positions", unsloth=False,
    ),
    ModelPreset(
        "smollm3-3b", "HuggingFaceTB/SmolLM3-3B", "chat",
        _llama(36, 2048, 16, 4, 11_008, 128_256, tied=True, model_type="smollm3"), 65_536, APACHE,
        "an open recipe, data included; thinks or not",
        tags=frozenset({"instructions", "reasoning", "math", "long-context"}),
        revision="a07cc9a04f16550a088caea529712d1d335b0ac1", published=3_075_098_624,
        long_context="131,072 with YaRN (factor 2)", config={"rope_theta": 5_000_000.0},
    ),
)  # fmt: skip


def _qwen3_preset(
    key: str, name: str, numbers: Architecture, published: int, revision: str, good_at: str, *tags: str,
    context: int = 40_960, long_context: str = YARN_3,
) -> ModelPreset:  # fmt: skip
    return ModelPreset(
        key, f"Qwen/{name}", "base" if name.endswith("Base") else "chat", numbers, context, APACHE, good_at,
        tags=frozenset(tags), revision=revision, published=published, long_context=long_context,
        four_bit=f"unsloth/{name}-bnb-4bit", config={"rope_theta": 5_000_000.0} if "2507" in name else {},
    )  # fmt: skip


QWEN3 = (
    _qwen3_preset("qwen3-1.7b", "Qwen3-1.7B", _qwen3(28, 2048, 16, 6144, tied=True), 1_720_574_976,
                  "70d244cc86ccca08cf5af4e1e306ecf908b1ad5e", "Qwen2.5-1.5B's successor; thinks or not",
                  "instructions", "reasoning", "math"),
    _qwen3_preset("qwen3-4b", "Qwen3-4B-Instruct-2507", _qwen3(36, 2560, 32, 9728, tied=True), 4_022_468_096,
                  "cdbee75f17c01a7cc42f958dc650907174af0554", "the best of its size without thinking aloud",
                  "instructions", "critique", "reasoning", "coding", "math", "long-context",
                  context=262_144, long_context=NATIVE),
    _qwen3_preset("qwen3-8b", "Qwen3-8B", _QWEN3_8, 8_190_735_360, "b968826d9c46dd6066d109eabc6255188de91218",
                  "Qwen2.5-7B's successor; thinks or not", "instructions", "critique", "reasoning", "coding", "math"),
    _qwen3_preset("qwen3-14b", "Qwen3-14B", _QWEN3_14, 14_768_307_200, "40c069824f4251a91eefaf281ebe4c544efd3e18",
                  "Qwen2.5-14B's successor; thinks or not", "instructions", "critique", "reasoning", "coding", "math"),
    _qwen3_preset("qwen3-32b", "Qwen3-32B", _qwen3(64, 5120, 64, 25_600, tied=False), 32_762_123_264,
                  "9216db5781bf21249d130ec9da846c4624c16137", "a critic and judge for one A100 80 GB; thinks or not",
                  "instructions", "critique", "reasoning", "coding", "math"),
    _qwen3_preset("qwen3-8b-base", "Qwen3-8B-Base", _QWEN3_8, 8_190_735_360,
                  "49e3418fbbbca6ecbdf9608b4d22e5a407081db4", "the target's recipe on a newer base of 8B",
                  "fine-tuning", context=32_768, long_context=NATIVE),
    _qwen3_preset("qwen3-14b-base", "Qwen3-14B-Base", _QWEN3_14, 14_768_307_200, "main",
                  "the target's recipe on a newer base of 14B; there is no public base of Qwen3-32B",
                  "fine-tuning", context=32_768, long_context=NATIVE),
)  # fmt: skip
TABLE = (*SHIPPED, *QWEN25, *QWEN3, *OTHERS)
