"""Memory of LoRA DPO, part by part: one formula for the plan and for the budget that fast DPO decides by. No torch.

What autograd keeps of a Qwen2-shaped layer for each token, as torch.autograd.graph.saved_tensors_hooks shows it (H
hidden, Q = heads x size, K = key heads x size, I feed-forward): both norms their input (2 H; transformers in float32)
and its scale; the projections theirs (two norms' outputs 2 H, attention's Q, the product I); attention queries, output
(2 Q), keys and values (2 K) and a float32 sum a head; gate, other half and, in transformers' layers and in float32, the
activated gate (2 or 3 I); LoRA what lies between A and B (7 ranks), unless it is merged. Other families: a norm more
its input once more, norms of queries and keys theirs, a feed-forward without a gate 5 I in all, a tanh over the logits
(Gemma 2) what it gives.
tests/test_training_memory.py holds the sum to the measured peak of tensor memory.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from cai_experiment.models.memory import GB, LINEAR_BYTES, LORA_RANK, Architecture, adapter_parameters

CHUNK_BYTES, CUDA_CHUNK_BYTES = 2**26, 2**28  # training.fast.head's: float32 logits at a time
EXPLICIT_LENGTH = 256  # training.fast.attention.EXPLICIT_LENGTH
MERGED_BYTES = 2 * 2**30  # training.fast.lora.MOST_BYTES: copies of weights with their adapter, on a CPU
TARGET_SHARE = 0.7  # of a pass's tokens, where it is not known: two answers of 250 behind a prompt of 100


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Bytes of a number, by its kind: what a backend makes of weights in one precision on one kind of device.

    `rest`: weights outside the blocks' Linear layers; `residual`: the stream between layers; `number`: other
    activations; `compute`: what 4- and 8-bit weights are unpacked to. `merged`: fast DPO's merged copies are there
    (float32, on a CPU).
    """

    quantization: str
    rest: int
    residual: int
    number: int
    compute: int
    norm: int = 4  # bytes of a number that a norm keeps
    gates: int = 3  # feed-forward widths kept before the product
    merged: bool = False
    masked: bool = False  # attention keeps a mask of its own in every layer (torch's SDPA on a CPU)
    copied: bool = False  # PEFT under autocast keeps every adapted layer's input once more, in 16 bit

    @classmethod
    def of(
        cls, backend: str, quantization: str, device: str, numbers: Architecture, item: int | None = None
    ) -> Arithmetic:
        """`item`: the embedding's bytes a number, where a model is at hand.

        For TRL, PEFT's prepare_model_for_kbit_training turns what is not quantised into float32, and bitsandbytes
        gives back what it is given: activations are float32 then. Unsloth and fast stay in 16 bit.
        """
        fast, masked, copied = backend == "fast", device != "cuda", backend == "trl" and device == "cuda"
        rest = 4 if quantization == "fp32" or (quantization != "bf16" and backend == "trl") else 2
        rest = rest if item is None else item
        compute = 2 if quantization in ("4bit", "8bit") else 0
        merged = fast and masked and quantization == "fp32" and 4 * numbers.linear_parameters <= MERGED_BYTES
        gates = 2 if fast and rest == 2 else 3
        return cls(quantization, rest, rest, rest, compute, rest if fast else 4, gates, merged, masked, copied)


@dataclass(frozen=True, slots=True)
class Pass:
    """What one forward and backward pass computes. `tokens` count padding; `longest`: tokens of its longest row (fast:
    of its longest tree); `sources`: tokens from which something is predicted."""

    tokens: int
    rows: int
    longest: int
    sources: int
    padded: bool = True  # rows of different lengths

    @property
    def spread(self) -> int:
        """Tokens as attention sees them on a CPU: every row as long as the longest."""
        return max(self.tokens, self.rows * self.longest)

    @classmethod
    def packed(cls, tokens: int, longest: int, pairs: int | None = None, sources: int | None = None) -> Pass:
        """Of fast DPO: `tokens` of whole trees, the longest of them `longest`."""
        rows = pairs or max(1, round(tokens / max(1, longest)))
        return cls(tokens, rows, longest, round(TARGET_SHARE * tokens) if sources is None else sources)

    @classmethod
    def of_rows(cls, pairs: int, length: int, padded: bool = True) -> Pass:
        """Of TRL: two rows a pair, all padded to `length`."""
        return cls(2 * pairs * length, 2 * pairs, length, 2 * pairs * length, padded)


@dataclass(frozen=True, slots=True)
class Parts:
    """Bytes at the fullest moment of a step, in the order in which a plan prints them."""

    weights: float
    constants: float  # of quantisation
    merged: float
    lora: float
    gradients: float
    optimizer: float
    kept: float  # activations that wait for the backward pass
    recomputed: float  # the layer that is computed again
    head: float
    workspace: float

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def loaded(self) -> float:
        """Bytes that lie there before the first pass: weights and adapter."""
        return self.weights + self.constants + self.lora


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """The formula for one model, backend and precision; `rank` of the adapter."""

    numbers: Architecture
    backend: str
    arithmetic: Arithmetic
    rank: int = LORA_RANK

    def parts(self, one: Pass, recomputed: int) -> Parts:
        """At the fullest moment of steps of passes like `one`, the first `recomputed` layers computed again."""
        moments = [self._at_head(one, recomputed), *self._in_backward(one, recomputed)]
        kept, again, head, workspace = max(moments, key=sum)
        return replace(self.fixed(), kept=kept, recomputed=again, head=head, workspace=workspace)

    def fixed(self) -> Parts:
        """What does not depend on a pass."""
        numbers, form = self.numbers, self.arithmetic
        linear = numbers.linear_parameters
        plain = {"4bit": 0.5}.get(form.quantization, LINEAR_BYTES[form.quantization])
        weights = linear * plain + (numbers.parameters - linear) * form.rest
        adapter = adapter_parameters(numbers, self.rank)
        return Parts(
            weights, linear * (LINEAR_BYTES[form.quantization] - plain), 4.0 * linear * form.merged, 4.0 * adapter,
            4.0 * adapter, 8.0 * adapter, 0.0, 0.0, 0.0, 0.0,
        )  # fmt: skip

    def layer(self, one: Pass) -> float:
        """Bytes that one layer keeps for its backward pass."""
        n, form = self.numbers, self.arithmetic
        q, kv = n.heads * n.head_size, self._kv_heads(one) * n.head_size
        each = n.norms * (form.norm * n.hidden + 4) + (form.norm * (q + n.kv_heads * n.head_size) if n.qk_norm else 0)
        each += form.number * (min(n.norms, 2) * n.hidden + q + self._wide * n.intermediate)
        each += 0 if form.merged else len(n.linear_shapes) * self.rank * form.number
        each += 2 * sum(inputs for inputs, _ in n.linear_shapes) if form.copied else 0
        seen = one.spread if self._spreads else one.tokens
        return one.tokens * each + seen * (form.number * (2 * q + 2 * kv) + 4 * n.heads) + self._mask(one)

    def last_layer(self, one: Pass) -> float:
        """The same of the last one, which fast DPO computes for the sources alone."""
        if self.backend != "fast":
            return self.layer(one)
        n, form = self.numbers, self.arithmetic
        q = n.heads * n.head_size
        ranks = 0 if form.merged else 5 * self.rank
        spared = form.number * (n.hidden + q + self._wide * n.intermediate + ranks)
        return self.layer(one) - (one.tokens - one.sources) * spared + one.sources * form.number * n.hidden

    def inputs(self, one: Pass) -> float:
        """Bytes of a layer's input: all that is kept of a recomputed layer."""
        return one.tokens * self.numbers.hidden * self.arithmetic.residual

    # ------------------------------------------------------------ moments

    def _at_head(self, one: Pass, recomputed: int) -> tuple[float, float, float, float]:
        n, form = self.numbers, self.arithmetic
        out = one.tokens * n.hidden * form.number  # of the last norm
        if self.backend == "fast":
            most = CHUNK_BYTES if self.arithmetic.masked else CUDA_CHUNK_BYTES  # masked: not on CUDA
            rows = min(one.sources, max(1, most // (4 * n.vocab)))
            chunk = rows * n.vocab * (4 if form.number == 4 else 6)
            head = 1.0 * chunk + one.sources * n.hidden * form.number * 2 + rows * n.hidden * form.number
        else:
            head = one.tokens * n.vocab * 4 * self._logit_copies(one)
            head += 2 * n.vocab * n.hidden if form.copied and form.rest == 4 else 0  # the head's weights in 16 bit
        return self._kept(one, recomputed), 0.0, head, out

    def _in_backward(self, one: Pass, recomputed: int) -> list[tuple[float, float, float, float]]:
        n, form = self.numbers, self.arithmetic
        work = one.tokens * (2 * n.intermediate * form.number + 2 * n.hidden * form.residual) + self._unpacked
        found = []
        layers = n.layers - recomputed
        if layers:
            last = self.last_layer(one)
            found.append((self._kept(one, recomputed), 0.0, 0.0, work * one.sources / one.tokens))
            if layers > 1:
                found.append((self._kept(one, recomputed) - last, 0.0, 0.0, work))
        if recomputed:
            kept = recomputed * self.inputs(one) + self._tail(one)
            found.append((kept, self.layer(one), 0.0, work))
        return found

    def _kept(self, one: Pass, recomputed: int) -> float:
        layers = self.numbers.layers - recomputed
        whole = (layers - 1) * self.layer(one) + self.last_layer(one) if layers else 0.0
        return recomputed * self.inputs(one) + whole + self._tail(one)

    def _tail(self, one: Pass) -> float:
        """The last norm's input and the rotary embedding's sines and cosines."""
        n = self.numbers
        return one.tokens * (self.arithmetic.norm * n.hidden + 2 * n.head_size * self.arithmetic.number)

    @property
    def _spreads(self) -> bool:
        return self.backend == "fast" and self.arithmetic.masked

    @property
    def _wide(self) -> int:
        """Numbers of the feed-forward's width that are kept; GPT-2's and Phi-2's GELU is computed in five steps."""
        return self.arithmetic.gates + 1 if self.numbers.gated else 5

    def _kv_heads(self, one: Pass) -> int:
        """transformers repeats keys and values for each query head where rows are padded."""
        repeats = self.backend != "fast" and self.arithmetic.masked and one.padded
        return self.numbers.heads if repeats else self.numbers.kv_heads

    def _mask(self, one: Pass) -> float:
        """A mask for every layer; fast DPO's own attention of short rows keeps its weights, head by head, instead.

        Capped scores (Gemma 2) are computed one by one, as SDPA knows no cap: kept are the tanh's, the softmax in
        float32 and, in 16 bit, its copy.
        """
        if self.numbers.capped:
            kept = 8 if self.arithmetic.number == 4 else 2 + 4 + 2
            return one.rows * one.longest**2 * self.numbers.heads * kept
        if not self.arithmetic.masked or (self.backend != "fast" and not one.padded):
            return 0.0
        explicit = self._spreads and self.arithmetic.number == 4 and one.longest <= EXPLICIT_LENGTH
        return one.rows * one.longest**2 * self.arithmetic.number * (self.numbers.heads if explicit else 1)

    def _logit_copies(self, one: Pass) -> float:
        """TRL's float32 logits: policy's, reference's, a gradient's share, and more of the row at work.

        Fitted to measured peaks: 2.4 of 16 rows, 2.7 of 4, 3.0 of 2; 3.2 (14.9 GiB) of 2 x 4,096 tokens and 152,064
        words. Under autocast 0.2 more: they leave the head in 16 bit and are turned into float32.
        """
        sixteen = 0.2 if self.arithmetic.number == 2 or self.arithmetic.copied else 0.0
        return 2.3 + 1.8 / one.rows + sixteen + (1.0 if self.numbers.capped else 0.0)

    @property
    def _unpacked(self) -> float:
        """The largest layer's weights, unpacked for a product, and once more in the gradient's precision."""
        form = self.arithmetic
        largest = max(inputs * outputs for inputs, outputs in self.numbers.linear_shapes)
        return largest * (form.compute + (form.number if form.number != form.compute else 0)) * (form.compute > 0)


def training_vram_gb(numbers: Architecture, quantization: str, length: int = 1024, pairs: int = 1) -> float:
    """GB that LoRA DPO needs on a GPU by Unsloth (in 4 bit) or TRL, `pairs` pairs a pass, each row `length` tokens."""
    backend = "unsloth" if quantization == "4bit" else "trl"
    memory = TrainingMemory(numbers, backend, Arithmetic.of(backend, quantization, "cuda", numbers))
    return memory.parts(Pass.of_rows(pairs, length), numbers.layers).total / GB


# ---------------------------------------------------------------- fast DPO's own budget

CPU_SHARE, GPU_SHARE = 0.25, 0.9  # of a CPU's memory; of a card's free memory
CPU_TOKENS = 4096  # more in one pass does not make a CPU faster
GPU_TOKENS, STEP = 8192, 256  # nor a GPU, with weights that are read once a pass; between the passes that are tried
# Unpacking 4-bit weights for a product moves 4.5 bytes a weight, a token costs 2 FLOPs: on an A100 (2,039 GB/s; 312
# TFLOP/s, 0.4 of them reached) as long as 140 tokens, 250 at 0.56 of the bandwidth; on an H100 270 to 480.
UNPACKING_TOKENS = 200


@dataclass(frozen=True, slots=True)
class Budget:
    """Tokens of a pass (a longer pair goes alone), and layers, the first ones, that are computed again in backward."""

    tokens: int
    recomputed_layers: int


def decide(memory: TrainingMemory, free: float, longest: int, device: str, asked: int | None = None) -> Budget:
    """The quickest budget that fits `free` bytes beside weights and adapter; `asked` fixes the tokens.

    A token costs a forward and a backward pass of the same size and, for the share of the layers that is recomputed,
    one more; a pass unpacks 4-bit weights as often. Recomputing all layers costs a half, passes of 2,048 tokens only a
    tenth, so small passes without recomputation come first; of two alike the one with more tokens. What fits nowhere
    gets the least that there is: the longest pair alone, all layers recomputed.
    """
    layers = memory.numbers.layers
    most = CPU_TOKENS if device == "cpu" else GPU_TOKENS
    tries = [max(asked, longest)] if asked else [max(longest, t) for t in range(STEP, max(most, longest) + 1, STEP)]
    unpacking = UNPACKING_TOKENS if memory.arithmetic.compute else 0
    found: list[tuple[float, int, int]] = []
    for tokens in sorted(set(tries)):
        again = _least_recomputed(memory, Pass.packed(tokens, longest), free)
        if again is not None:
            cost = (2 + again / layers) * (1 + unpacking / tokens)
            found.append((round(cost, 3), -tokens, again))
    if not found:
        return Budget(asked or longest, layers)
    _, tokens, again = min(found)
    return Budget(asked or -tokens, again)


def _least_recomputed(memory: TrainingMemory, one: Pass, free: float) -> int | None:
    """The fewest recomputed layers with which a pass fits, by halving (more never need more); None: it never fits."""
    low, high = 0, memory.numbers.layers

    def fits(layers: int) -> bool:
        parts = memory.parts(one, layers)
        return parts.total - parts.loaded <= free

    if not fits(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low
