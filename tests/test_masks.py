"""Which mask a site pools by: none where nobody reads, rows for a choice's texts, towers their own."""

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMultipleChoice, BertModel, CLIPConfig, CLIPModel

from smear_peft import trace

from .models import t5_batch
from .routed import close, extras, routed

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
BERT = {"vocab_size": 64, "max_position_embeddings": 32, **SMALL}
BLIND = ["single", "tag", "hash", "adamix", "latent_skills"]


@torch.no_grad()
def outcome(model: nn.Module, **batch) -> tuple[Tensor, dict[str, Tensor]]:
    with trace(model) as routes:
        out = model(**batch)
    return getattr(out, "logits", out), routes.weights


def texts(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(seed))


def lengthened(ids: Tensor, mask: Tensor, more: int = 4) -> tuple[Tensor, Tensor]:
    return nn.functional.pad(ids, (0, more)), nn.functional.pad(mask, (0, more))


def additive(mask: Tensor) -> Tensor:
    """(B, 1, 1, L), as what is added to the attention's logits."""
    return (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min


# --- where nobody reads ---


@pytest.mark.parametrize("routing", BLIND)
def test_methods_that_do_not_look_take_any_mask(routing):
    model, batch = routed(routing=routing), {**t5_batch(), **extras(routing, 3)}
    logits, weights = outcome(model, **batch)
    own, own_weights = outcome(model, **{**batch, "attention_mask": additive(batch["attention_mask"])})
    close(own, logits)
    for site, value in weights.items():
        close(own_weights[site], value)


def test_the_base_takes_any_mask():
    model, batch = routed(), t5_batch()
    odd = {**batch, "attention_mask": additive(batch["attention_mask"])}
    with torch.no_grad(), model.disable_adapter():
        close(model(**odd).logits, model(**batch).logits)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 1, 1, 7\).*routing_mask"):
        model(**odd)


# --- multiple choice ---


def multiple_choice(**fields) -> nn.Module:
    torch.manual_seed(0)
    return routed(BertForMultipleChoice(BertConfig(**BERT)), target_modules=["output.dense"], **fields)


def choices() -> tuple[Tensor, Tensor]:
    ids, mask = texts(2, 3, 7), torch.ones(2, 3, 7, dtype=torch.long)
    mask[0, 1, 4:] = mask[1, 2, 2:] = 0
    return ids, mask


@pytest.mark.parametrize("routing", ["smear", "soft_moe", "top_k", *BLIND])
def test_every_text_of_a_choice_is_a_row(routing):
    model, (ids, mask) = multiple_choice(routing=routing), choices()
    logits, weights = outcome(model, input_ids=ids, attention_mask=mask, **extras(routing, 2))
    assert logits.shape == (2, 3)
    longer = dict(zip(("input_ids", "attention_mask"), lengthened(ids, mask), strict=True))
    padded, padded_weights = outcome(model, **longer, **extras(routing, 2))
    close(padded, logits)
    for site, value in weights.items():
        assert len(value) == 6
        close(padded_weights[site], value)
    for row in range(2):
        own = {name: value[row : row + 1] for name, value in extras(routing, 2).items()}
        alone, _ = outcome(model, input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1], **own)
        close(alone[0], logits[row])


def test_tags_are_of_examples_and_hold_for_each_of_their_texts():
    model, (ids, mask) = multiple_choice(routing="tag"), choices()
    _, weights = outcome(model, input_ids=ids, attention_mask=mask, routing_tags=[2, 1])
    for value in weights.values():
        assert value.argmax(-1).tolist() == [2, 2, 2, 1, 1, 1]
    with pytest.raises(ValueError, match=r"routing_tags must have shape \(2,\)"):
        model(input_ids=ids, attention_mask=mask, routing_tags=[2, 2, 2, 1, 1, 1])


def test_a_routing_mask_and_embeddings_of_a_choice():
    model, (ids, mask) = multiple_choice(), choices()
    expected, _ = outcome(model, input_ids=ids, attention_mask=mask)
    other, _ = outcome(model, input_ids=ids, attention_mask=mask, routing_mask=torch.ones_like(mask))
    assert (other - expected).abs().max() > 1e-4
    same, _ = outcome(model, input_ids=ids, attention_mask=mask, routing_mask=mask)
    close(same, expected)
    embeds = model.get_base_model().bert.embeddings.word_embeddings(ids)
    embedded, _ = outcome(model, inputs_embeds=embeds, attention_mask=mask)
    close(embedded, expected)


def test_a_mask_of_pairs_of_positions_is_still_refused():
    torch.manual_seed(0)
    model = routed(BertModel(BertConfig(**BERT)), target_modules=["output.dense"])
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 7, 7\).*routing_mask"):
        model(input_ids=texts(2, 7), attention_mask=torch.ones(2, 7, 7))


# --- several models in one ---


def clip(**fields) -> nn.Module:
    torch.manual_seed(0)
    text = {"vocab_size": 64, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 63, **SMALL}
    vision = {"image_size": 16, "patch_size": 8, **SMALL, "hidden_size": 24}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    return routed(model, target_modules=["fc2"], **fields)


@pytest.mark.parametrize("routing", ["smear", "soft_moe", "tag"])
def test_texts_beside_images(routing):
    """The text's mask is the text tower's; the images' patches all count."""
    model, pixels = clip(routing=routing), torch.randn(2, 3, 16, 16)
    ids, mask = texts(2, 9), torch.ones(2, 9, dtype=torch.long)
    ids[0, 4], ids[1, 8], mask[0, 5:] = 63, 63, 0
    batch = {"pixel_values": pixels, **extras(routing, 2)}

    def run(ids: Tensor, mask: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad(), trace(model) as routes:
            found = model(input_ids=ids, attention_mask=mask, **batch).logits_per_text
        return found, routes.weights

    logits, weights = run(ids, mask)
    assert {site.partition(".")[0] for site in weights} == {"text_model", "vision_model"}
    padded, padded_weights = run(*lengthened(ids, mask))
    close(padded, logits)
    unmasked = run(ids, None)[1]
    for site, value in weights.items():
        close(padded_weights[site], value)
        if site.startswith("vision"):
            close(unmasked[site], value)
        elif routing == "smear":
            assert (unmasked[site] - value).abs().max() > 1e-4


def test_a_routing_mask_beside_images_is_of_the_text():
    model, pixels, ids = clip(), torch.randn(2, 3, 16, 16), texts(2, 9)
    mask = torch.ones_like(ids)
    mask[:, 3:] = 0
    found = []
    for more in ({}, {"routing_mask": mask}):
        with torch.no_grad(), trace(model) as routes:
            model(input_ids=ids, pixel_values=pixels, **more)
        found.append(routes.inputs)
    for site, seen in found[0].items():
        assert torch.equal(seen, found[1][site]) == site.startswith("vision")


class Pair(nn.Module):
    """Two encoders, of questions and of answers; the root's own mask is of the questions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.questions, self.answers = (BertModel(BertConfig(**BERT)) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, answer_ids: Tensor, answer_mask: Tensor) -> Tensor:
        questions = self.questions(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        return questions @ self.answers(answer_ids, answer_mask).pooler_output.T


def test_each_of_two_encoders_has_its_own_mask():
    model = routed(Pair(), target_modules=["output.dense"])
    ids, mask = texts(2, 6), torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    others, other_mask = texts(2, 6, seed=1), mask.flip(0)
    scores, weights = outcome(model, input_ids=ids, attention_mask=mask, answer_ids=others, answer_mask=other_mask)
    longer, longer_mask = lengthened(others, other_mask)
    padded, padded_weights = outcome(
        model, input_ids=ids, attention_mask=mask, answer_ids=longer, answer_mask=longer_mask
    )
    close(padded, scores)
    for site, value in weights.items():
        close(padded_weights[site], value)
