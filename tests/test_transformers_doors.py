"""transformers' own adapter methods: equal answers, not merely no error."""

import pytest
import torch
from peft import PeftModel
from torch import nn

from smear_peft import SmearConfig, SmearLayer, load, trace

from .adapters import SMALL, answer, same
from .models import t5_batch, tiny_t5
from .routed import enliven, routed, transformers_door

pytestmark = transformers_door


@pytest.fixture
def saved(tmp_path):
    model = routed()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", answer(model)


@pytest.mark.parametrize("fields", [{}, {"routing": "single"}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.feature("transformers' `add_adapter`, `load_adapter`", "T5")
def test_add_adapter_save_and_every_way_to_load(tmp_path, fields):
    model = tiny_t5()
    model.add_adapter(SmearConfig(**SMALL, **fields))
    enliven(model)
    wanted = answer(model.eval())
    assert (wanted - answer(tiny_t5())).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    again = tiny_t5()
    again.load_adapter(str(tmp_path))
    same(answer(again.eval()), wanted)
    same(answer(PeftModel.from_pretrained(tiny_t5(), tmp_path)), wanted)
    same(answer(load(tiny_t5(), tmp_path)), wanted)


@pytest.mark.parametrize("name", [None, "other", "default"])
def test_load_adapter_takes_what_peft_saved(saved, name):
    folder, wanted = saved
    model = tiny_t5()
    model.load_adapter(str(folder), **({} if name is None else {"adapter_name": name}))
    same(answer(model.eval()), wanted)
    assert model.active_adapters() == [name or "default"]


def test_a_model_with_an_adapter_beside_its_weights(tmp_path, saved):
    folder, wanted = saved
    from transformers import T5ForConditionalGeneration

    tiny_t5().save_pretrained(tmp_path / "base")
    model = T5ForConditionalGeneration.from_pretrained(tmp_path / "base")
    model.load_adapter(str(folder))
    same(answer(model.eval()), wanted)


def test_disabling_and_enabling(saved):
    folder, wanted = saved
    model = tiny_t5()
    model.load_adapter(str(folder))
    model.eval()
    model.disable_adapters()
    same(answer(model), answer(tiny_t5()))
    model.enable_adapters()
    same(answer(model), wanted)


def test_two_adapters_and_deleting_them(saved):
    folder, wanted = saved
    model = tiny_t5()
    model.add_adapter(SmearConfig(num_experts=2, bottleneck_dim=3), adapter_name="fresh")
    fresh = answer(model.eval())
    model.load_adapter(str(folder), adapter_name="trained")
    model.set_adapter("trained")
    same(answer(model), wanted)
    model.set_adapter("fresh")
    same(answer(model), fresh)
    model.delete_adapter("fresh")
    model.set_adapter("trained")
    same(answer(model), wanted)
    assert not any(".fresh." in name for name in model.state_dict())
    model.delete_adapter("trained")
    same(answer(model), answer(tiny_t5()))
    assert not any(".smear_block." in name for name in model.state_dict())


def test_two_adapters_that_train_layer_norms_cannot_be_active_together(saved):
    model = tiny_t5()
    model.load_adapter(str(saved[0]), adapter_name="one")
    model.load_adapter(str(saved[0]), adapter_name="two")
    with pytest.raises(ValueError, match="train_layer_norms"):
        model.set_adapter(["one", "two"])


def test_routing_arguments_arrive(saved):
    model = tiny_t5()
    model.add_adapter(SmearConfig(**SMALL, routing="tag"))
    enliven(model).eval()
    for layer in (m for m in model.modules() if isinstance(m, SmearLayer)):
        nn.init.normal_(layer.block_state("default")["expert.up.weight"])
    with trace(model) as routes:
        first = answer(model, routing_tags=torch.tensor([0, 1, 2]))
    assert all(torch.equal(w, torch.eye(3)) for w in routes.weights.values())
    assert (answer(model, routing_tags=torch.tensor([2, 1, 0])) - first).abs().max() > 0.1
    with pytest.raises(ValueError, match="routing_tags"):
        answer(model)
    batch = {name: value for name, value in t5_batch().items() if name != "labels"}
    assert model.generate(**batch, routing_tags=torch.tensor([0, 1, 2]), max_new_tokens=3).shape[0] == 3


def test_the_adapter_trains(tmp_path):
    model = tiny_t5()
    model.add_adapter(SmearConfig(**SMALL))
    trainable = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert all(".smear_" in name for name in trainable)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**t5_batch()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, trainable[name]) for name, p in model.named_parameters() if name in trainable)
    model.save_pretrained(tmp_path)
    again = tiny_t5()
    again.load_adapter(str(tmp_path))
    same(answer(again.eval()), answer(model.eval()))
