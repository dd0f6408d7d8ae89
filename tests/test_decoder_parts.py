"""A decoder-only text model as a part of another: beside an image's (LLaVA), or in a module of one's own."""

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    CLIPVisionConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    ViTConfig,
)

from smear_peft import SmearConfig, list_sites, trace
from smear_peft.objective import shifts_labels

from .decoders import DECODERS, stays_before, training
from .families import PROMPT, ROWS, seeded, small_config
from .models import tiny_t5
from .routed import close, routed

IMAGE = 2  # the token, in no text here, in whose place the patches of an image stand, of which there are four
ALL_LINEAR = {"target_modules": "all-linear"}


def llava(kind: type = LlavaForConditionalGeneration, vision: type = CLIPVisionConfig) -> nn.Module:
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=vision(**small, image_size=8, patch_size=4),
        text_config=small_config(LlamaConfig),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
    )
    model = seeded(lambda: kind(config)).eval()
    if kind is LlavaForConditionalGeneration:
        model.generation_config.eos_token_id = None
    return model


def with_images(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch in whose prompts an image stands first."""
    image = torch.full((ROWS, 4), IMAGE)
    more = {"labels": torch.full_like(image, -100), "attention_mask": torch.ones_like(image), "input_ids": image}
    wide = {name: torch.cat([more[name], value], 1) for name, value in batch.items()}
    return {**wide, "pixel_values": torch.randn(ROWS, 3, 8, 8, generator=torch.Generator().manual_seed(2))}


class Around(nn.Module):
    """A module of one's own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **batch):
        return self.inner(**batch)


CASES = {
    "llava": (llava, with_images, PROMPT + 4),
    "a module around a llama": (lambda: Around(DECODERS["llama"].make()), dict, PROMPT),
    "a module around a llava": (lambda: Around(llava()), with_images, PROMPT + 4),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fields", [{}, ALL_LINEAR], ids=["own sites", "all-linear"])
def test_no_token_of_the_answer_changes_what_comes_before_it(case, fields):
    make, to_batch, prompt = CASES[case]
    model, batch = routed(make(), expert_dropout=0.0, **fields), to_batch(training())
    sites = list_sites(model, model.peft_config["default"])
    assert {site.router_input for site in sites} == {"prompt"}
    assert stays_before(model, batch, prompt) == {site.name for site in sites}
    del batch["labels"]
    with pytest.raises(ValueError, match=r"no prompt to route on.*routing_mask"):
        model(**batch)


def test_llava_generates_with_the_routes_and_the_logits_of_training():
    model, batch = routed(llava(), expert_dropout=0.0), with_images(training())
    prompt = PROMPT + 4
    asked = {name: batch[name][:, :prompt] for name in ("input_ids", "attention_mask")}
    asked["pixel_values"] = batch["pixel_values"]
    with trace(model) as routes:
        steps = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        steps["suppress_tokens"] = [IMAGE]
        out = model.generate(**asked, **steps, return_dict_in_generate=True, output_logits=True)
    taken = dict(routes.weights)
    mask = torch.cat([asked["attention_mask"], torch.ones(ROWS, 3, dtype=torch.long)], 1)
    labels = out.sequences.clone()
    labels[:, :prompt] = -100
    full = {"input_ids": out.sequences, "attention_mask": mask, "labels": labels, "pixel_values": batch["pixel_values"]}
    full["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), trace(model) as routes:
        forced = model(**full).logits[:, prompt - 1 : -1]
    close(torch.stack(out.logits, 1), forced)
    assert taken.keys() == routes.weights.keys()
    for site, weights in routes.weights.items():
        assert weights.shape == (ROWS, 3)
        close(taken[site], weights)
        assert (weights[0] - weights[1]).abs().max() > 1e-3


def test_rows_are_those_of_the_texts_where_images_are_fewer():
    model, batch = routed(llava(), expert_dropout=0.0), with_images(training())
    ids, mask = (batch[name][:, : PROMPT + 4].clone() for name in ("input_ids", "attention_mask"))
    ids[1:, :4] = mask[1:, :4] = 0
    how = {"attention_mask": mask, "pixel_values": batch["pixel_values"][:1], "max_new_tokens": 2}
    found = []
    for args, named in (((), {"input_ids": ids}), ((ids,), {})):
        with trace(model) as routes:
            model.generate(*args, **named, **how, suppress_tokens=[IMAGE])
        found.append(routes.weights)
    for site, weights in found[0].items():
        assert weights.shape == (ROWS, 3)
        assert torch.equal(found[1][site], weights)


@pytest.mark.parametrize("vision", [CLIPVisionConfig, ViTConfig])
def test_sites_of_an_image_s_part_are_left_out_and_refused(vision):
    model = llava(vision=vision)
    own = [site.name for site in list_sites(model)]
    assert own == [
        site.name
        for site in list_sites(
            model, SmearConfig(target_modules=["o_proj", "down_proj"], exclude_modules=r".*vision_tower.*")
        )
    ]
    assert len(own) == 4
    tower = next(name for name, module in model.named_modules() if "vision" in name and isinstance(module, nn.Linear))
    for name in (tower, "model.multi_modal_projector.linear_2"):
        with pytest.raises(ValueError, match=rf"{name} lies outside .*language_model and lm_head.*exclude_modules"):
            list_sites(model, SmearConfig(target_modules=[name]))
    assert list_sites(model, SmearConfig(target_modules=["lm_head"]))[0].router_input == "prompt"


def test_what_is_taken_for_a_decoder():
    bert, bart = small_config(BertConfig), small_config(BartConfig)
    decoders = (llava(LlavaModel), BertLMHeadModel(bert), Around(DECODERS["llama"].make().model))
    assert [{site.router_input for site in list_sites(model)} for model in decoders] == [{"prompt"}] * 3
    for model in (BertModel(bert), Around(BertModel(bert))):
        assert {site.router_input for site in list_sites(model)} == {"own output"}
    for model in (BartModel(bart), Around(BartModel(bart)), Around(tiny_t5())):
        kinds = {(site.stack, site.router_input) for site in list_sites(model)}
        assert kinds == {("encoder", "own output"), ("decoder", "encoder state")}


def test_a_head_that_reads_the_whole_text_in_a_module_of_one_s_own():
    from transformers import LlamaForSequenceClassification

    model = Around(LlamaForSequenceClassification(small_config(LlamaConfig)))
    assert {site.router_input for site in list_sites(model)} == {"own output"}


def test_an_encoder_decoder_in_a_module_of_one_s_own_routes_as_by_itself():
    batch = {name: value for name, value in DECODERS["llama"].batch.items() if name != "labels"}
    batch["decoder_input_ids"] = batch["input_ids"][:, :4]
    with torch.no_grad():
        expected = routed(tiny_t5())(**batch).logits
        close(routed(Around(tiny_t5()))(**batch).logits, expected, 1e-6)


def test_labels_shift_where_the_text_model_is_a_part():
    assert [shifts_labels(CASES[case][0]()) for case in CASES] == [True] * 3
    assert not shifts_labels(Around(tiny_t5()))
    pair = EncoderDecoderConfig.from_encoder_decoder_configs(small_config(BertConfig), small_config(BertConfig))
    assert not shifts_labels(EncoderDecoderModel(pair)), "it shifts its decoder's inputs, not its labels"
    assert not shifts_labels(Around(BertModel(small_config(BertConfig))))
