"""Decoder-only models: no token outside of the prompt changes the logits of an earlier position."""

import pytest
import torch

from .decoders import (
    METHODS,
    decoder,
    each_decoder,
    other_token,
    stays_before,
    training,
)
from .families import PROMPT, ROWS
from .routed import close, extras


@each_decoder
@pytest.mark.feature("no token of an answer changes logits before it", "decoder-only")
def test_no_token_of_the_answer_changes_what_comes_before_it(family):
    assert stays_before(decoder(family), training(family), PROMPT)


@pytest.mark.parametrize("routing", METHODS)
def test_gradients_of_an_answer_s_loss_end_where_it_begins(routing):
    """By way of autograd, for every method: no logits depend on a later token of the answer."""
    model, batch = decoder(routing=routing, **({"top_k": 2} if routing == "top_k" else {})), training()
    embedded = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    torch.manual_seed(0)
    logits = model(inputs_embeds=embedded, **batch, **extras(routing, ROWS)).logits
    for position in range(PROMPT - 1, logits.shape[1] - 1):
        (grad,) = torch.autograd.grad(logits[:, position].square().sum(), embedded, retain_graph=True)
        assert not grad[:, max(position + 1, PROMPT) :].any()
        assert grad[:, : position + 1].any()


def test_tokens_of_the_prompt_do_reach_the_route():
    """What the tests above would show if the mask did nothing: within the mask, tokens change earlier logits."""
    model, batch = decoder(), training()
    with torch.no_grad():
        logits = model(**batch).logits
        found = model(**other_token(batch, PROMPT - 1)).logits
    assert (found[:, : PROMPT - 1] - logits[:, : PROMPT - 1]).abs().max() > 1e-3


@pytest.mark.parametrize("last", [0, 2, 6])
def test_a_routing_mask_moves_the_border(last):
    model, batch = decoder(), {name: value for name, value in training().items() if name != "labels"}
    mask = batch["attention_mask"].clone()
    mask[:, last + 1 :] = 0
    with torch.no_grad():
        logits = model(**batch, routing_mask=mask).logits
        for position in range(last + 1, logits.shape[1]):
            found = model(**other_token(batch, position), routing_mask=mask).logits
            close(found[:, :position], logits[:, :position], 1e-6)
