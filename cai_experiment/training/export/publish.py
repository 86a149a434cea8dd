"""Export a trained adapter: merged into its base, or cleaned for vLLM; checked against the adapter model, published.

Everything is written under OUT.tmp. Only when every weight was read back and found right, and the answers are those of
the adapter model (`export_check`), one rename makes it OUT. A refused or interrupted export leaves nothing.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_experiment.errors import BadInputError, DiskError, EngineError
from cai_experiment.records.files import read_json, show, write_json
from cai_experiment.training import checkpoints
from cai_experiment.training.export import answers as export_answers
from cai_experiment.training.export import check as export_check
from cai_experiment.training.export import merge
from cai_experiment.training.export.adapters import CONFIG, WEIGHTS, Adapter, read_adapter, uniform, vllm_command
from cai_experiment.training.export.check import Comparison, Prompts
from cai_experiment.training.export.source import Base, Source

RECORD = "export.json"
CARD = "README.md"
MARK = ".export-in-progress"  # a folder that holds it may be deleted
TOKENIZER = ("tokenizer*", "*.jinja", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")
MARGIN = 2**30  # bytes of disk beside the weights


@dataclass(frozen=True, slots=True)
class Job:
    """One export: what of, from which base, held against which prompts. `card` makes README.md of export.json."""

    source: Source
    base: Base
    prompts: Prompts
    card: Callable[[dict[str, Any]], str]
    say: Callable[[str], None] = print


# ---------------------------------------------------------------- merged


def export_merged(job: Job, out: Path, dtype: str | None = None) -> dict[str, Any]:
    """Write the merged model as the folder `out`; gives its record. `dtype` None: that of the base's files.

    Raises BadInputError (an adapter or a base that cannot be merged), DiskError, EngineError (a check that fails).
    """
    base, adapter = job.base.folder, read_job(job)
    merge.check_layers(base, adapter)
    own = merge.base_dtype(base)
    precision = dtype or own
    check_space(out, merge.bytes_needed(base, precision))
    with aside_of(out) as aside:
        started = time.monotonic()
        with checkpoints.disk_errors(out):
            merge.merge(base, adapter, aside, precision)
        job.say(f"merged {len(adapter.layers)} layers into {precision} in {time.monotonic() - started:.0f} s")
        count = merge.verify(base, adapter, aside, precision)
        job.say(f"read back: all {count} tensors are base + LoRA, bit for bit")
        found, four_bit = check_merged(job, adapter, aside, precision)
        record = record_of(job, adapter, "merged", found) | {"dtype": precision, "tensors": count}
        if four_bit is not None:
            record["against_4bit"] = four_bit.to_json()
        finish(job, aside, out, record)
    return record


def check_merged(job: Job, adapter: Adapter, out: Path, stored: str) -> tuple[Comparison, Comparison | None]:
    """Hold the merged model against base + adapter, one after the other in memory; raises EngineError if they differ.

    The second comparison is with the base in 4 bit, as QLoRA trained it, where there is a GPU: a report and no gate,
    since there the base itself is another one.
    """
    how = export_answers.precision_for(out, stored)
    right = export_answers.answers_of(job.base.folder, how, job.prompts, adapter=adapter.folder)
    export = export_answers.answers_of(out, how, job.prompts, forced=right)
    found = export_check.compare(right, export, stored, how.dtype, layers_of(out), job.prompts)
    job.say(f"{found.line()} ({how.dtype} on {how.device})")
    export_check.refuse(found, "the merged model")
    if how.device == "cpu" or job.source.model[1] != "4bit":
        return found, None
    trained = export_answers.answers_in_4bit(job.base, adapter.folder, job.prompts, export)
    four_bit = export_check.compare(export, trained, stored, how.dtype, layers_of(out), job.prompts)
    job.say(f"no gate: {four_bit.line('4-bit model that was trained', limits=False)}")
    return found, four_bit


# ---------------------------------------------------------------- for vLLM


def export_adapter(job: Job, out: Path, quantization: str | None) -> dict[str, Any]:
    """Write the adapter as vLLM and PEFT read it as the folder `out`; gives its record, its command under "serve".

    The command names folders of this machine, so it is not in the file. `quantization` is the base's in the check;
    None: that of its training. Raises as `export_merged`.
    """
    adapter = read_job(job)
    serve = vllm_command(job.base.place, job.source.run, str(out.resolve()), adapter.rank)
    check_space(out, (adapter.folder / WEIGHTS).stat().st_size)
    with aside_of(out) as aside:
        with checkpoints.disk_errors(out):
            write_adapter(job, adapter, aside)
        verify_adapter(adapter, aside)
        right, export, computed = export_answers.answers_of_both(
            job.base, quantization or job.source.model[1] or None, adapter.folder, aside, job.prompts
        )
        found = export_check.compare(right, export, "fp32", computed, layers_of(job.base.folder), job.prompts)
        job.say(found.line())
        export_check.refuse(found, "the exported adapter")
        record = record_of(job, adapter, "adapter", found) | {"rank": adapter.rank}
        finish(job, aside, out, record)
    return record | {"serve": serve}


def write_adapter(job: Job, adapter: Adapter, folder: Path) -> None:
    """The files of the cleaned adapter: one rank, one scaling, the base's public name, the tokenizer beside it."""
    tensors, config = uniform(adapter)
    folder.mkdir(parents=True, exist_ok=True)
    merge.save(tensors, folder / WEIGHTS)
    config |= {"base_model_name_or_path": job.base.facts["base_place"] or job.base.name}
    write_json(folder / CONFIG, config | ({"revision": job.base.revision} if job.base.revision else {}))
    for pattern in TOKENIZER:
        for file in adapter.folder.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def verify_adapter(adapter: Adapter, folder: Path) -> None:
    """Read the written tensors back; EngineError unless they are the adapter's, bit for bit."""
    import torch
    from safetensors.torch import load_file

    right, written = uniform(adapter)[0], load_file(folder / WEIGHTS)
    for name in sorted(right.keys() | written.keys()):
        if name not in right or name not in written or not torch.equal(right[name], written[name]):
            raise EngineError(f"{name} in {show(folder / WEIGHTS)} is not the trained adapter's", "export again")


# ---------------------------------------------------------------- what all exports share


def read_job(job: Job) -> Adapter:
    """The job's adapter, verified, with PEFT's scalings for its base."""
    from transformers import AutoConfig

    return read_adapter(job.source.folder, AutoConfig.from_pretrained(job.base.folder))


def layers_of(folder: Path) -> int:
    """The number of a model's layers."""
    return int(read_json(folder / "config.json")["num_hidden_layers"])


@contextmanager
def aside_of(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write to, marked as an export's; whatever ends the block early, nothing stays there.

    What a killed call left there is deleted; BadInputError for a folder that no export made.
    """
    aside = out.with_name(out.name + checkpoints.ASIDE)
    if (aside.exists() or aside.is_symlink()) and not _is_ours(aside):
        message = f"{show(aside)} is in the way: exports are written there first, and no export made it"
        raise BadInputError(message, "move it away, or name another --out")
    with checkpoints.disk_errors(out):
        if aside.exists():
            shutil.rmtree(aside)
        aside.mkdir(parents=True)
        (aside / MARK).touch()
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _is_ours(aside: Path) -> bool:
    """True for what a killed export left: marked, or still empty, or (in the moment before its rename) recorded."""
    if aside.is_symlink() or not aside.is_dir():
        return False
    if (aside / MARK).is_file() or not any(aside.iterdir()):
        return True
    try:
        return "adapter_sha256" in read_json(aside / RECORD)
    except BadInputError:
        return False


def check_space(out: Path, needed: int) -> None:
    """Raise DiskError before anything is written if the disk of `out` has less than `needed` bytes and a margin."""
    place = next(path for path in out.absolute().parents if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed + MARGIN:
        message = f"{show(out)}: the export needs {(needed + MARGIN) / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        raise DiskError(message, "make room, or name a larger disk with --out")


def record_of(job: Job, adapter: Adapter, kind: str, found: Comparison | None) -> dict[str, Any]:
    """export.json: what was exported, from what, and the figures of the check of its answers (None: not made)."""
    return {
        "kind": kind,
        "run": job.source.run,
        "adapter": job.source.name,
        "adapter_sha256": adapter.sha256,
        **job.base.facts,
        "check": found.to_json() if found else None,
    }


def finish(job: Job, aside: Path, out: Path, record: dict[str, Any]) -> None:
    """Add record and model card, and make the folder appear as `out`."""
    with checkpoints.disk_errors(out):
        write_json(aside / RECORD, record)
        (aside / CARD).write_text(job.card(record), encoding="utf-8")
        (aside / MARK).unlink(missing_ok=True)
    checkpoints.publish(aside, out)


def already(out: Path, adapter: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a whole export at `out` of this very adapter, in which everything `wanted` stands so; else None.

    An export of an earlier version that names the user's folders is none: it could not be uploaded.
    """
    try:
        checkpoints.verify(out, (RECORD, CARD))
        record = read_json(out / RECORD)
        listed = read_json(adapter / checkpoints.MANIFEST)["files"][WEIGHTS]["sha256"]
    except (checkpoints.Damaged, BadInputError, KeyError):
        return None
    wanted = {**wanted, "adapter_sha256": listed, "serve": None}
    return record if all(record.get(name) == value for name, value in wanted.items()) else None


def move_aside(out: Path) -> Path:
    """Rename what stands at `out` to OUT.<time>; gives the new path."""
    target = out.with_name(f"{out.name}.{time.strftime('%Y%m%d-%H%M%S')}")
    os.rename(out, target)
    return target
