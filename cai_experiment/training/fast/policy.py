"""A causal LM with a LoRA adapter that scores packed pairs: attention, adapter layers, head as fast DPO runs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from cai_experiment.training.fast import attention as tree_attention
from cai_experiment.training.fast.blocks import known_blocks, own_blocks
from cai_experiment.training.fast.head import target_logps
from cai_experiment.training.fast.last_layer import only_sources
from cai_experiment.training.fast.lora import own_layers, plain_layers
from cai_experiment.training.fast.packing import CHOSEN, REJECTED, TRUNK, Packed


class Policy:
    """`model` is a PEFT model over a transformers causal LM whose attention can be chosen by name.

    Raises nothing itself; whether the arithmetic is that of the plain model is checked before training
    (`fast_dpo.FastTrainer.check_start`).
    """

    def __init__(self, model: Any, attention: str | None = None) -> None:
        self.model = model
        self.causal_lm = model.get_base_model()
        self.device = next(model.parameters()).device
        self.attention = attention or (tree_attention.FLEX if self.device.type == "cuda" else tree_attention.NAME)
        self.layers, self.blocks = plain_layers(model), known_blocks(self.causal_lm)
        tree_attention.register()

    @property
    def fill(self) -> int:
        """A pass's tokens are filled up to a multiple of this."""
        return tree_attention.FLEX_BLOCK if self.attention == tree_attention.FLEX else 1

    @property
    def arithmetic(self) -> str:
        """What log-probabilities depend on beside the weights: dtype, quantisation, attention."""
        quantised = getattr(self.causal_lm, "quantization_method", None)
        return f"{self.causal_lm.dtype} {quantised or 'not quantised'} {self.attention}"

    def autocast(self) -> torch.autocast:
        """bfloat16 for what may be computed in it, where the model is in bfloat16; nothing otherwise."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.causal_lm.dtype == torch.bfloat16)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Within it the model computes as fast DPO does; outside as transformers and PEFT do, to generate or save."""
        with ExitStack() as stack:
            stack.enter_context(tree_attention.by_name(self.causal_lm, self.attention))
            stack.enter_context(own_layers(self.layers))
            stack.enter_context(own_blocks(self.blocks))
            yield

    def answer_logps(self, packed: Packed, trunk_cancels: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """(chosen, rejected), each (n,) float64: sums over an answer's tokens, nats. Call it within `ready()`.

        In float32 the sum over a long answer, thousands of nats, would be rounded at 1e-3.

        `trunk_cancels`: of what both answers begin with only the values are wanted; in the difference of the two sums
        its gradient is 0.
        """
        shared = packed.target_branch == TRUNK
        trunk_cancels = trunk_cancels and torch.is_grad_enabled()
        hidden = self._hidden(packed, packed.sources[shared] if trunk_cancels else None)
        if trunk_cancels:
            logps = torch.empty(len(packed.targets), device=self.device)
            with torch.no_grad():
                logps[shared] = self._target_logps(hidden, packed.sources[shared], packed.targets[shared])
            own = self._target_logps(hidden, packed.sources[~shared], packed.targets[~shared])
            logps = logps.index_put((~shared,), own)
        else:
            logps = self._target_logps(hidden, packed.sources, packed.targets)
        # a product, since index_add adds in any order on a GPU: two equal passes would differ in the last digit
        of_pair = packed.target_pair == torch.arange(packed.pairs, device=logps.device)[:, None]
        sums = [(of_pair & (packed.target_branch != other)).double() @ logps.double() for other in (REJECTED, CHOSEN)]
        return sums[0], sums[1]

    def _hidden(self, packed: Packed, silent: torch.Tensor | None) -> torch.Tensor:
        """(T, H): the last hidden states of a pass; only those from which something is predicted are right.

        Those at `silent` carry no gradient.
        """
        backbone = self.causal_lm.base_model
        mask = None
        if self.attention == tree_attention.FLEX:
            mask = tree_attention.block_masks(packed, self.causal_lm.config)
        with only_sources(backbone, packed.sources, silent):
            out = backbone(
                input_ids=packed.input_ids[None], position_ids=packed.positions[None], attention_mask=mask,
                use_cache=False, packed=packed,
            )  # fmt: skip
        return out.last_hidden_state[0]

    def _target_logps(self, hidden: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        head, config = self.causal_lm.get_output_embeddings(), self.causal_lm.config.get_text_config()
        return target_logps(
            hidden.index_select(0, sources), head.weight, head.bias, targets,
            scale=getattr(config, "logit_scale", None) or 1.0, softcap=getattr(config, "final_logit_softcapping", None),
        )  # fmt: skip
