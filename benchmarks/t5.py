"""T5.1.1 in the shape of its base size: SMEAR, its ensemble, its transcription and plain adapters on one frozen base.

Weights are random: speed does not depend on what a model knows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from benchmarks import transcription
from benchmarks.case import Case, Job, Jobs, Least, Pair
from benchmarks.roofline import Shape, Work, adapter, smear
from benchmarks.text_block import BOTTLENECK, EXACT, EXPERTS, PLAIN, SMEAR, TRANSCRIBED, WIDTH, PlainAdapter
from benchmarks.whole_models import loss_job, questions, shared_copy, with_adapters
from smear_peft import SmearConfig
from smear_peft.block import SmearBlock

T5_BASE = {"d_model": WIDTH, "d_ff": 2048, "d_kv": 64, "num_heads": 12, "num_layers": 12, "vocab_size": 32128}
ENSEMBLE = "ensemble"


class TranscribedTextAdapter(nn.Module):
    """A block's parameters, run as the paper's authors do: in a decoder anew in each block and step.

    Args:
        block: has the parameters.
        seen: where the encoder leaves its state.
    """

    def __init__(self, block: SmearBlock, seen: dict[str, Tensor]) -> None:
        super().__init__()
        self.block, self.seen, self.state = block, seen, block.state()

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        if self.block.site.stack == "decoder":
            return transcription.decoder_block(self.state, x, self.seen["state"])
        return transcription.block("smear", self.state, x, tags=torch.zeros(len(x), dtype=torch.long))


def new_t5(**sizes: Any) -> T5ForConditionalGeneration:
    """A T5.1.1 with random weights and without dropout."""
    torch.manual_seed(0)
    fixed: dict[str, Any] = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.0}
    config = T5Config(**fixed, **sizes)
    config.decoder_start_token_id = config.pad_token_id = 0
    return T5ForConditionalGeneration(config)


def t5_models() -> dict[str, nn.Module]:
    """60 adapters of each kind; all train the base's layer norms, as in the paper.

    Raises:
        AssertionError: SMEAR and its transcription give other numbers.
    """
    base = new_t5(**T5_BASE)
    copies = {name: shared_copy(base) for name in (PLAIN, TRANSCRIBED, ENSEMBLE)}
    sizes: dict[str, Any] = {"num_experts": EXPERTS, "bottleneck_dim": BOTTLENECK, "expert_dropout": 0.0}

    def routed(model: nn.Module, routing: str) -> nn.Module:
        return get_peft_model(model, SmearConfig(task_type="SEQ_2_SEQ_LM", routing=routing, **sizes))

    ours, ensemble = routed(base, "smear"), routed(copies[ENSEMBLE], ENSEMBLE)
    blocks = {module.site.name: module for module in ours.modules() if isinstance(module, SmearBlock)}
    seen: dict[str, Tensor] = {}
    copies[TRANSCRIBED].get_submodule("encoder").register_forward_hook(
        lambda encoder, given, output: seen.update(state=output[0])
    )
    transcribed = with_adapters(copies[TRANSCRIBED], lambda site: TranscribedTextAdapter(blocks[site.name], seen))
    plain = with_adapters(copies[PLAIN], lambda site: PlainAdapter(site.width, BOTTLENECK))
    for model in (transcribed, plain):
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad or "adapter" in name or name.endswith("layer_norm.weight"))
    given = questions(2, 5) | {"labels": questions(2, 3)["input_ids"]}
    close = EXACT[torch.float32]
    with torch.no_grad():
        found, expected = (model.eval()(**given).logits for model in (ours, transcribed))
    torch.testing.assert_close(found, expected, rtol=close, atol=close)
    return {SMEAR: ours, TRANSCRIBED: transcribed, ENSEMBLE: ensemble, PLAIN: plain}


def t5_generate(batch: int, length: int, tokens: int) -> Jobs:
    """Greedy answers of a fixed length."""
    given = questions(batch, length)

    def job(model: nn.Module) -> Job:
        model.eval()
        return lambda: model.generate(**given, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)  # type: ignore[operator]

    return {name: job(model) for name, model in t5_models().items()}


def t5_training(batch: int, length: int, target: int) -> Jobs:
    """Forward, backward and Adam."""
    given = questions(batch, length) | {"labels": questions(batch, target)["input_ids"]}
    return {name: loss_job(model, given, train=True) for name, model in t5_models().items()}


def saved_megabytes(model: nn.Module, given: dict[str, Tensor]) -> float:
    """What a training forward keeps for its backward, parameters apart, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # held until counted, so that no address is used twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model.train()(**given).loss
    del loss
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 2**20


def t5_saved(batch: int, length: int, target: int) -> dict[str, float]:
    """Mebibytes that a training step of each model keeps."""
    given = questions(batch, length) | {"labels": questions(batch, target)["input_ids"]}
    return {name: saved_megabytes(model, given) for name, model in t5_models().items()}


def least(batch: int, length: int, target: int, train: bool) -> Least:
    """What the blocks must do at least: 24 in the encoder, 36 in the decoder, there for one position after another."""
    encoder = Shape(batch, length, WIDTH, BOTTLENECK, EXPERTS)
    decoder = encoder._replace(length=target if train else 1)
    steps = 1 if train else target
    ours: list[Work] = 24 * smear(encoder, train) + 36 * smear(decoder, train, pools=False)
    ours += 36 * (steps - 1) * adapter(decoder._replace(merged=batch), train)
    plain = 24 * adapter(encoder, train) + 36 * steps * adapter(decoder, train)
    numbers = batch * length * WIDTH if train else 36 * batch * 2 * WIDTH * BOTTLENECK
    return Least({SMEAR: ours, PLAIN: plain}, torch.float32, numbers, rest={SMEAR: PLAIN, PLAIN: PLAIN})


def cases() -> list[Case]:
    """Generation and training."""

    def pairs(target: float) -> tuple[Pair, ...]:
        return Pair(SMEAR, PLAIN, target), Pair(SMEAR, TRANSCRIBED), Pair(ENSEMBLE, PLAIN)

    return [
        Case("T5-base shape, 16 tokens, B=8 S=64", partial(t5_generate, 8, 64, 16), pairs(1.02), 9,
             least=least(8, 64, 16, train=False)),
        Case("T5-base shape, training step, B=8 S=64", partial(t5_training, 8, 64, 8), pairs(1.03), 9,
             least=least(8, 64, 8, train=True)),
    ]  # fmt: skip
