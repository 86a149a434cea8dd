"""README.md of an export: a model card with base and licence, data hash, settings, gates, and figures with intervals.

All numbers come from the training's own settings and from the run's report.json; what was not measured is said so.
Cards are uploaded: no folder of this machine stands in one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cai_experiment.errors import BadInputError
from cai_experiment.models.presets import PRESETS
from cai_experiment.records.files import read_json
from cai_experiment.training import sft
from cai_experiment.training.data import HELD_OUT_SHARE, Pair, pairs_sha256, read_pairs, split_by_instruction
from cai_experiment.training.export.adapters import vllm_command
from cai_experiment.training.export.hub import NAME
from cai_experiment.training.export.source import UNKNOWN_LICENCE, Source

TITLES = {"merged": "merged weights", "adapter": "LoRA adapter", "gguf": "GGUF"}
RELATION = {"merged": "finetune", "adapter": "adapter", "gguf": "quantized"}
LIBRARY = {"merged": "transformers", "adapter": "peft", "gguf": "gguf"}
HUB_LICENCES = ("apache-2.0", "mit")  # ids that the hub knows; any other is "other" with a name
FROM = "from critique and revision (Constitutional AI, arXiv 2212.08073)"
BY_DPO = f"LoRA trained by DPO (arXiv 2305.18290) on preference pairs {FROM}."
BY_SFT = f"LoRA fine-tuned (SFT) on revised answers {FROM}; no DPO."
AFTER_SFT = BY_DPO.replace("LoRA trained", "LoRA fine-tuned (SFT) on revised answers, then trained")
OF_DPO = ("beta", "nll_weight")  # settings that say nothing of SFT


def card_maker(source: Source, licence: str, data: Path) -> Callable[[dict[str, Any]], str]:
    """What makes README.md of an export's record; `data` is the run's folder with report.json and pairs.jsonl."""
    report, pairs = data / "report.json", data / "pairs.jsonl"
    found = read_json(report) if report.is_file() else None
    digest = None
    if pairs.is_file() and was_trained_on(pairs, source):
        with pairs.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    return lambda record: model_card(source, licence, record, found, digest)


def was_trained_on(file: Path, source: Source) -> bool:
    """True if training's pairs, which its settings name by their hash, are those of `file` or the share it takes.

    Of a warm start only the default share is tried; False where the file cannot be read.
    """
    seed = int(source.settings.get("seed", 0))
    try:
        everything = read_pairs(file)
        kept = split_by_instruction(everything, seed, HELD_OUT_SHARE)[0]
        tried: list[Sequence[Pair]] = [everything, kept]
        if source.is_sft:
            several = len({pair.instruction for pair in kept}) > 1
            tried += [sft.split_for_sft(kept, seed)[0]] if several else []
            tried = [sft.sft_rows(pairs) for pairs in tried]
        elif source.warm_start:
            tried = [sft.split_for_sft(pairs, seed)[1] for pairs in tried]
    except BadInputError:
        return False
    named = [f"{len(pairs)} with sha256 {pairs_sha256(pairs)[:16]}" for pairs in tried]
    return source.settings.get("pairs") in named


def model_card(
    source: Source, licence: str, record: Mapping[str, Any], report: Mapping[str, Any] | None, file_sha256: str | None
) -> str:
    """The card as Markdown with the hub's YAML header.

    `report` is the run's report.json or None; `file_sha256` the hash of the run's pairs.jsonl, if it was trained on.
    """
    kind = record["kind"]
    parts = [
        _header(kind, record, licence, "sft" if source.is_sft else "dpo"),
        f"# {source.run}: {TITLES[kind]}\n",
        _what(source, licence, record),
        "## Data and training\n",
        _training(source, report, file_sha256),
        "## Evaluation\n",
        _evaluation(source, report),
        "## Check of this export\n",
        _check(record),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _header(kind: str, record: Mapping[str, Any], licence: str, method: str) -> str:
    from huggingface_hub import ModelCardData

    known = licence in HUB_LICENCES
    place = hub_id(record)
    data = ModelCardData(
        base_model=place, license=licence if known else "other",
        license_name=None if known or licence == UNKNOWN_LICENCE else licence, library_name=LIBRARY[kind],
        pipeline_tag="text-generation", tags=[method, "lora", "constitutional-ai", "preference-pairs"],
        base_model_relation=RELATION[kind] if place else None,
    )  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n"


def hub_id(record: Mapping[str, Any]) -> str | None:
    """The base's id on the hub; None for a folder, the shipped model or random weights."""
    name, place = record["base"], str(record["base_place"] or "")
    local = not NAME.fullmatch(place) or (name in PRESETS and PRESETS[name].is_local)
    return None if local else place


def _what(source: Source, licence: str, record: Mapping[str, Any]) -> str:
    base = hub_id(record) or record["base"]
    revision = f" (revision {record['base_revision']})" if record.get("base_revision") else ""
    terms = "see its card for the licence" if licence == UNKNOWN_LICENCE else f"licence {licence}"
    lines = [
        f"- base model: {base}{revision}; {terms}, which also holds for this model",
        f"- made from: {source.name} of the run {source.run}, adapter sha256 {record['adapter_sha256']}",
    ]
    if record.get("dtype"):
        lines.append(f"- precision: {record['dtype']}")
    if record.get("rank"):
        command = vllm_command(hub_id(record) or "BASE", "NAME", "FOLDER", record["rank"])
        where = "" if hub_id(record) else f"BASE is the folder of {base}, "
        lines.append(f"- with vLLM: `{command.replace('FOLDER', '<this folder>')}` ({where}NAME any name)")
    return "\n".join(lines) + "\n"


def _training(source: Source, report: Mapping[str, Any] | None, file_sha256: str | None) -> str:
    first = source.warm_start
    model, quantization, layout = source.model
    left_out = ("model_name", "pairs", *(OF_DPO if source.is_sft else ()))
    shown = {name: value for name, value in source.settings.items() if name not in left_out and value not in (None, "")}
    data = source.settings.get("pairs")
    rows = [f"- {'rows' if source.is_sft else 'pairs'}: {data} (of what was trained on)"] if data else []
    rows += [f"- {name.replace('_', ' ')}: {value}" for name, value in shown.items()]
    if quantization:
        rows.append(f"- trained on {model} in {quantization}, layout {layout}")
    if first:
        rows.append(f"- SFT first: rows {first['pairs']}, {first['epochs']:g} epochs at {first['learning_rate']:g}")
    if (first or source.is_sft) and (helpful := _helpful(source, report)):
        rows.append(f"- {helpful}")
    if file_sha256 is not None:
        rows.append(f"- sha256 of the pairs file: {file_sha256}")
    return f"{BY_SFT if source.is_sft else AFTER_SFT if first else BY_DPO}\n\n" + "\n".join(rows) + "\n"


def _helpful(source: Source, report: Mapping[str, Any] | None) -> str:
    """How many of SFT's rows were helpful answers, which the report of an evaluated run says; else ""."""
    parts = (report or {}).get("settings", {}) if source.evaluated else {}
    found = [part for part in parts.values() if isinstance(part, Mapping) and "sft_helpful" in part]
    rows = str(found[0].get("sft_pairs", "")).partition(" ")[0] if found else ""
    return f"helpful answers among SFT's rows: {found[0]['sft_helpful']} of {rows}" if rows else ""


def _evaluation(source: Source, report: Mapping[str, Any] | None) -> str:
    """Gates and figures of the run's report; of a training that was not evaluated only those of its data."""
    not_evaluated = "This model was not evaluated" + ("." if source.final else ": it is a step before the end.")
    if report is None:
        return f"{not_evaluated} The run has no report.\n"
    try:
        parts = {str(gate.get("part")) for gate in report["gates"]}
        whole = source.evaluated and "training" in parts
        shown = [gate for gate in report["gates"] if whole or gate.get("part") == "generation"]
        gates = [[gate["name"], _number(gate["value"]), f"{gate['rule']} {_number(gate['threshold'])}",
                  _interval(gate["interval"]), str(gate["n"]), "passed" if gate["passed"] else "NOT passed"]
                 for gate in shown]  # fmt: skip
        figures = [[name.replace("_", " "), _number(found["value"]), _interval(found["interval"]), str(found["n"])]
                   for name, found in report["metrics"].items() if whole or "training" not in parts]  # fmt: skip
        verdict = f"Verdict of all gates: {report['verdict']}." if whole else f"{not_evaluated} Of its pairs:"
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInputError(f"report.json cannot be read ({error})", "run train_dpo.py again: it writes it") from None
    tables = [_table(["gate", "value", "wanted", "interval", "n", ""], gates)]
    tables += [_table(["figure", "value", "interval", "n"], figures)] if figures else []
    notes = "".join(f"- {note}\n" for note in report.get("notes", [])) if whole else ""
    return "\n".join([f"{verdict} Intervals are 95%.\n", *tables, notes])


def _check(record: Mapping[str, Any]) -> str:
    found = record.get("check")
    if found is None:
        return "Weights were compared with the merged model's; answers were not compared.\n"
    same = f"same greedy text on {found['same_text']}"
    if found["ties"]:
        same += f", on {found['ties']} another token where the adapter model itself is undecided"
    return (
        f"Against base + adapter on {found['prompts']} prompts ({found['positions']} positions): logits differ by "
        f"{found['rms_difference']:.2g} (root mean square) and {found['max_difference']:.2g} at most, mean KL "
        f"divergence {found['mean_kl']:.2g} nats; {same}.\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def _number(value: Any) -> str:
    return "not measured" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _interval(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.3g} to {interval[1]:.3g}"
