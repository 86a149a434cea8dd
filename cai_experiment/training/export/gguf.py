"""A merged model as one GGUF file: llama.cpp's own converter makes it, and its weights are held against the model's.

The converter is llama.cpp's convert_hf_to_gguf.py, run as a program of its own; the `gguf` package reads the result.
Both are optional: a missing one is named, with how to get it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.models.hardware import detect
from cai_experiment.records.files import read_json, show
from cai_experiment.training.export import answers as export_answers
from cai_experiment.training.export import check as export_check
from cai_experiment.training.export import merge
from cai_experiment.training.export.publish import (
    Job,
    already,
    aside_of,
    check_space,
    export_merged,
    finish,
    layers_of,
    read_job,
    record_of,
)

if TYPE_CHECKING:
    import numpy

CONVERTER = "convert_hf_to_gguf.py"
VARIABLE = "LLAMA_CPP"
TYPES = ("bf16", "fp16", "fp32", "q8_0")  # "bf16", "f16" and "f32" are the converter's names
READ_WHOLE = 16 * 10**9  # bytes of a file up to which every tensor is compared; above, every SAMPLED-th
SAMPLED = 8
EXACT = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # rounded to nearest, so the bits are known
REORDERED = ("llama", "mistral3")  # the converter reorders their q and k rows for llama.cpp's rotary embedding


def converter_in(folder: Path | None) -> Path:
    """The converter's path: in `folder` (--llama-cpp), else in $LLAMA_CPP. BadInputError says what to install."""
    named = folder or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    clone = "git clone --depth 1 https://github.com/ggml-org/llama.cpp, then add --llama-cpp llama.cpp"
    if named is None:
        raise BadInputError("a GGUF file is made by llama.cpp's converter", clone)
    path = named.expanduser() / CONVERTER
    if not path.is_file():
        raise BadInputError(f"{show(named)} holds no {CONVERTER}", clone)
    if find_spec("gguf") is None:
        raise BadInputError("the package gguf, which reads GGUF files, is not installed", "pip install gguf")
    return path


def export_gguf(job: Job, merged: Path, out: Path, converter: Path, kind: str | None = None) -> dict[str, Any]:
    """Write the merged model `merged` as one GGUF file into the folder `out`; gives its record.

    `kind` is one of TYPES; None: the merged model's own precision. Raises DiskError, and EngineError (exit code 1) for
    a converter that fails, a tensor that is not the model's, or answers that are not the adapter model's.
    """
    adapter, stored = read_job(job), merge.base_dtype(merged)
    kind = kind or stored
    check_space(out, merge.bytes_needed(merged, "bf16" if kind == "q8_0" else kind))
    with aside_of(out) as aside:
        name = f"{job.source.run}-{kind}.gguf"
        convert(converter, merged, aside / name, kind)
        compared, count = check_tensors(merged, aside / name)
        job.say(f"{name}: {count} tensors of the right shapes, {compared} compared with the merged weights")
        found = check_answers(job, adapter.folder, aside / name, max(kind, stored, key=_roundoff))
        if found is not None:
            job.say(found.line())
            export_check.refuse(found, "the GGUF file, read back,")
        record: dict[str, Any] = record_of(job, adapter, "gguf", found) | {"dtype": kind, "file": name}
        finish(job, aside, out, record | {"tensors": count, "tensors_compared": compared})
    return record


def merged_at(job: Job, folder: Path) -> Path:
    """The merged model to convert: the one at `folder`, which is made if there is none. BadInputError for another's."""
    if not folder.exists():
        export_merged(job, folder)
        job.say(f"merged model in {show(folder)}; its GGUF file is made from it")
    elif already(folder, job.source.folder, {"kind": "merged", **job.base.facts}) is None:
        message = f"{show(folder)} is not a whole merged export of {show(job.source.folder)} on {job.base.name}"
        raise BadInputError(message, "make it again: the same command with --to merged --fresh")
    return folder


def _roundoff(name: str) -> float:
    return export_check.UNIT_ROUNDOFF[name]


def convert(converter: Path, merged: Path, file: Path, kind: str) -> None:
    """Run llama.cpp's converter; EngineError with its last line if it fails or writes nothing."""
    outtype = {"fp16": "f16", "fp32": "f32"}.get(kind, kind)
    command = [sys.executable, str(converter), str(merged), "--outfile", str(file), "--outtype", outtype]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode or not file.is_file():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        why = lines[-1][:300] if lines else f"exit code {done.returncode}"
        package = why.partition("No module named ")[2].strip("'\"")
        step = f"pip install {package}" if package else f"update {show(converter.parent)}; it may not know this model"
        raise EngineError(f"{converter.name} failed: {why}", step)


# ---------------------------------------------------------------- the check of the weights


def check_tensors(merged: Path, file: Path) -> tuple[int, int]:
    """(tensors compared by value, tensors in the file). EngineError names the first that is not the merged model's.

    Names, number and shapes of all are checked; values of all up to READ_WHOLE bytes, else of a share.
    """
    import gguf

    reader = gguf.GGUFReader(file)
    names = gguf_names(reader, merged)
    written = {tensor.name: tensor for tensor in reader.tensors}
    tied = read_json(merged / "config.json").get("tie_word_embeddings")
    extra = sorted(written.keys() - names.keys() - {"rope_freqs.weight", *(["output.weight"] if tied else [])})
    missing = sorted(names.keys() - written.keys())
    if extra or missing:
        raise EngineError(f"{show(file)} lacks {missing[:3]} and has {extra[:3]} in excess", "export again")
    every = 1 if file.stat().st_size <= READ_WHOLE else SAMPLED
    compared, architecture = 0, _architecture(reader)
    for number, (name, weight) in enumerate(_weights(merged, names)):
        tensor = written[name]
        shape = [int(length) for length in reversed(tensor.shape)]  # GGUF keeps the fastest dimension first
        if shape != list(weight.get_shape()):
            raise EngineError(f"{name} in {show(file)} has shape {shape}, not {weight.get_shape()}", "export again")
        if number % every == 0:
            may_move = architecture in REORDERED and name.endswith(("attn_q.weight", "attn_k.weight"))
            _check_values(name, tensor, weight[:].float().numpy(), file, may_move)
            compared += 1
    return compared, len(written)


def gguf_names(reader: Any, merged: Path) -> dict[str, str]:
    """The merged model's tensors by their GGUF names, through the gguf package's own table."""
    import gguf

    architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(architectures[_architecture(reader)], layers_of(merged))
    found: dict[str, str] = {}
    for _, header in merge.headers(merged):
        for name in header:
            known = table.get_name(name, try_suffixes=(".weight", ".bias"))
            if known is None:
                raise EngineError(f"the gguf package knows no name for {name}", "pip install --upgrade gguf")
            found[known] = name
    return found


def _architecture(reader: Any) -> str:
    return str(reader.get_field("general.architecture").contents())


def _weights(merged: Path, names: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """(GGUF name, slice of the merged model's tensor), file by file."""
    from safetensors import safe_open

    by_model = {model: name for name, model in names.items()}
    for file, header in merge.headers(merged):
        with safe_open(file, "pt") as source:
            for name in header:
                yield by_model[name], source.get_slice(name)


def _check_values(name: str, tensor: Any, right: numpy.ndarray, file: Path, may_move: bool) -> None:
    """EngineError unless a tensor's values are the model's, within what its type rounds."""
    import gguf
    import numpy as np
    import torch

    kind = tensor.tensor_type.name
    values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(right.shape)
    if may_move:
        values, right = np.sort(values, axis=None), np.sort(right, axis=None)
    if kind == "Q8_0":  # blocks of 32 values with one float16 scale, the largest value / 127
        scale = np.abs(right.reshape(-1, 32)).max(axis=1, keepdims=True) / 127
        allowed = np.broadcast_to(scale * (0.5 + 127 * 2.0**-11) + 127 * 2.0**-25, (right.size // 32, 32))
        wrong = np.abs(values - right).reshape(-1, 32) > allowed
    elif kind in EXACT:
        wrong = values != torch.from_numpy(right).to(getattr(torch, EXACT[kind])).float().numpy()
    else:
        raise EngineError(f"{name} in {show(file)} is of type {kind}, which is not checked here", "export again")
    if wrong.any():
        worst = float(np.nanmax(np.abs(values - right)))
        raise EngineError(f"{name} in {show(file)} ({kind}) differs from the merged model by up to {worst:.3g}",
                          "nothing was published; update llama.cpp and export again")  # fmt: skip


# ---------------------------------------------------------------- the check of the answers


def check_answers(job: Job, adapter: Path, file: Path, stored: str) -> export_check.Comparison | None:
    """The file, read back by transformers, against base + adapter; None where that needs more memory than is there.

    transformers turns every tensor into float32 on the CPU, and then fills a model with them: 260 GB for 32B.
    """
    need, have = 2 * merge.bytes_needed(job.base.folder, "fp32") / 1e9, 0.8 * detect().ram_gb
    if need > have:
        job.say(f"its answers are not compared: reading it back needs {need:.0f} GB of RAM (its weights were compared)")
        return None
    how = export_answers.Precision("cpu", "fp32")
    right = export_answers.answers_of(job.base.folder, how, job.prompts, adapter=adapter)
    export = export_answers.answers_of(file.parent, how, job.prompts, forced=right, gguf=file.name)
    return export_check.compare(right, export, stored, how.dtype, layers_of(job.base.folder), job.prompts)
