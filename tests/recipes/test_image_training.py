"""The training loop, the views and the scores of the image recipe."""

import timm
import torch
from PIL import Image

import smear_peft
from recipes.controls import uniform
from recipes.image_batches import Plan, in_random_order
from recipes.image_models import head_of, load_adapted, save_adapted
from recipes.image_scoring import accuracies, predict
from recipes.image_set import ImageSet
from recipes.image_training import train
from recipes.image_views import Crops, augment, cut, draw_crops
from recipes.trained import count_trained
from smear_peft.routing.hard import STGumbelRouter
from tests.recipes.pictures import adapted, colours, settings


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_training_learns_and_moves_nothing_that_is_frozen():
    images, model = colours(), adapted()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    statistics = {n for n in model.state_dict() if n.endswith(("bn1.running_mean", "bn2.running_var"))}
    before = state_of(model)
    train(model, images, settings(steps=25, batch_size=12, learning_rate=3e-3))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in frozen | statistics)
    assert statistics
    assert accuracies(predict(model, images, settings()).labels, images)["micro"] > 0.9


def test_a_linear_probe_trains_its_head_alone():
    model = adapted("linear_probe")
    before = state_of(model)
    train(model, colours(), settings(steps=2, batch_size=12))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"fc.weight", "fc.bias"}
    assert count_trained(model, head_of(model)) == {"adapter": 0, "head": 512 * 3 + 3}


def furthest(model, before):
    """The largest change of a number that trains."""
    return max((p - before[name]).abs().max().item() for name, p in model.named_parameters() if p.requires_grad)


def test_the_gradient_is_clipped_and_nothing_decays():
    """Adam's first step is the learning rate wherever the gradient is far above its epsilon, 1e-8, and less below."""
    for norm, moves in ((1.0, 0.01), (1e-10, 0.01 * 1e-10 / 1e-8)):
        model = adapted()
        before = state_of(model)
        train(model, colours(), settings(steps=1, batch_size=8, learning_rate=0.01, max_grad_norm=norm))
        assert moves / 20 < furthest(model, before) <= moves * 1.01
    model = adapted("linear_probe")
    model.fc.weight.data[:, 7] = 5.0
    model.layer4[1].register_forward_hook(lambda block, given, out: out.index_fill(1, torch.tensor([7]), 0.0))
    train(model, colours(), settings(steps=3, batch_size=8, learning_rate=0.01))
    assert torch.equal(model.fc.weight[:, 7], torch.full((3,), 5.0))  # whose input is nothing


def test_the_same_seed_trains_the_same_adapter():
    states = []
    for _ in range(2):
        model = adapted()
        train(model, colours(), settings(steps=2, batch_size=8, min_crop=0.5, flip=True))
        states.append(state_of(model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_saved_and_reloaded_it_predicts_the_same(tmp_path):
    images = colours()
    for routing in ("smear", "linear_probe"):
        model, base = adapted(routing), timm.create_model("resnet18")
        plain = {name: t for name, t in adapted("linear_probe").state_dict().items() if not name.startswith("fc.")}
        base.load_state_dict(plain, strict=False)
        train(model, images, settings(steps=2, batch_size=8))
        save_adapted(model, tmp_path / routing)
        again = load_adapted(base, tmp_path / routing, classes=3).eval()
        x = torch.rand(2, 3, 32, 32)
        assert torch.equal(again(x), model.eval()(x))


def test_every_image_once_before_any_comes_again():
    batches = list(in_random_order(10, 4, 5, torch.Generator().manual_seed(0)))
    assert all(len(batch) == 4 for batch in batches)
    order = torch.cat(batches)
    assert sorted(order[:10].tolist()) == sorted(order[10:].tolist()) == list(range(10))
    assert order[:10].tolist() != order[10:].tolist()


def test_processes_share_every_batch_and_a_resumed_plan_goes_on():
    whole = list(Plan(30, settings(steps=5, batch_size=8, min_crop=0.5, flip=True)))
    halves = [list(Plan(30, settings(steps=5, batch_size=8, min_crop=0.5, flip=True), 2, r, 2)) for r in range(2)]
    for request, first, second in zip(whole[2:], *halves, strict=True):
        assert torch.equal(request.places, torch.cat([first.places, second.places]))
        for drawn, one, two in zip(request.crops, first.crops, second.crops, strict=True):
            assert torch.equal(drawn, torch.cat([one, two]))


def crops(count: int, min_crop: float, flip: bool, seed: int = 0):
    return draw_crops(count, min_crop, flip, torch.Generator().manual_seed(seed))


def test_without_augmentation_images_stay_as_they_are():
    images = colours().images
    torch.testing.assert_close(augment(images, crops(24, 1.0, False), 32), images.float() / 255)


def test_a_flip_mirrors_an_image_or_leaves_it():
    images = colours().images
    views = augment(images, crops(24, 1.0, True, seed=1), 32)
    whole = images.float() / 255
    same = (views - whole).abs().amax((1, 2, 3)) < 1e-4
    mirrored = (views - whole.flip(3)).abs().amax((1, 2, 3)) < 1e-4
    assert torch.equal(same, ~mirrored)
    assert 0 < same.sum() < len(same)


def test_crops_stay_inside_the_image_and_keep_the_least_area():
    """On a ramp from left to right, a view's span is the crop's width."""
    ramp = torch.arange(64).expand(200, 3, 64, 64).to(torch.uint8)
    views = 255 * augment(ramp, crops(200, 0.25, False), 64)
    left, right = views[:, 0, 0, 0], views[:, 0, 0, -1]
    assert left.min() >= 0
    assert right.max() <= 63 + 1e-3
    assert ((right - left) > 0.4 * 63).all()
    assert (right - left).std() > 3


def test_a_file_is_cropped_where_an_image_in_memory_is():
    """A ramp both ways: what is seen first and last says where the crop lies."""
    ramp = (2 * torch.arange(64)[None, :] + torch.arange(64)[:, None]).to(torch.uint8).expand(3, 64, 64)
    drawn = crops(8, 0.3, True)
    together = 255 * augment(ramp.expand(8, 3, 64, 64), drawn, 64)
    image = Image.fromarray(ramp.permute(1, 2, 0).numpy())
    alone = torch.stack([cut(image, drawn, i, 64) for i in range(8)]).float()
    assert (together - alone).abs()[..., 2:-2, 2:-2].max() < 3
    assert drawn.mirrored.any()


def test_a_crop_of_a_wide_image_has_the_drawn_shape_in_pixels():
    """Half of the area of 128 by 32 pixels, square: 45 pixels do not fit into the height, which is taken whole."""
    ramp = torch.arange(128).expand(3, 32, 128).to(torch.uint8)
    side = torch.tensor([0.5]).sqrt()
    drawn = Crops(side, side, torch.tensor([-1.0]), torch.tensor([0.0]), torch.tensor([False]))
    row = cut(Image.fromarray(ramp.permute(1, 2, 0).numpy()), drawn, 0, 32)[0, 0].float()
    assert row[0] < 2
    assert abs(row[-1] - 45) < 2


def test_accuracies_by_hand():
    images = colours(6)
    predicted = images.labels.clone()
    predicted[0] = (predicted[0] + 1) % 3
    found = accuracies(predicted, images)
    assert found["domains"] == {"light": 2 / 3, "dark": 1.0}
    assert found["micro"] == 5 / 6
    assert found["macro"] == (2 / 3 + 1) / 2


def test_mean_routes_are_those_of_a_trace():
    images, model = colours(10), adapted()
    found = predict(model, images, settings(eval_batch_size=4)).routing
    x = (images.images.float() / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    with torch.no_grad(), smear_peft.trace(model) as routes:
        model(x)
    assert list(found) == list(routes.weights)
    for site, weights in routes.weights.items():
        torch.testing.assert_close(
            torch.tensor(found[site]["dark"]), weights[images.domains == 1].mean(0), atol=1e-5, rtol=0
        )


def test_uniform_routes_are_uniform():
    images, model = colours(4), adapted()
    with smear_peft.override_routes(model, uniform):
        found = predict(model, images, settings()).routing
    assert all(row == [0.5, 0.5] for site in found.values() for row in site.values())


def test_every_routing_argument_reaches_the_model():
    """Tag and hash routing would fail without tags and ids."""
    for routing in ("tag", "hash"):
        model = adapted(routing)
        train(model, colours(), settings(steps=1, batch_size=8))
        weights = next(iter(predict(model, colours(), settings()).routing.values()))
        assert abs(sum(weights["light"]) - 1) < 1e-5


def test_the_temperature_follows_the_step():
    model = adapted("st_gumbel", temperature=10.0, anneal_rate=0.5)
    train(model, colours(), settings(steps=5, batch_size=6, anneal_every=2))
    found = {module.temperature for module in model.modules() if isinstance(module, STGumbelRouter)}
    assert found == {smear_peft.temperature_at(4, 10.0, 0.5, 0.5, 2)}
    assert found != {10.0}


def test_skills_learn_faster_than_the_rest():
    model = adapted("latent_skills")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    train(model, colours(), settings(steps=1, batch_size=6, learning_rate=1e-4, skill_factor=10.0))
    moved = {n: (p - before[n]).abs().max().item() for n, p in model.named_parameters() if n in before}
    skills = [moved[n] for n in moved if "skill" in n]
    assert max(skills) > 8e-4  # Adam's first step is as long as the learning rate
    assert max(moved[n] for n in moved if "skill" not in n) < 1.1e-4


def test_drifting_statistics_drift_and_are_saved(tmp_path):
    images, model, base = colours(), adapted(base_batch_norm="drift"), timm.create_model("resnet18")
    before = model.base_model.model.bn1.running_mean.clone()
    train(model, images, settings(steps=2, batch_size=8))
    assert not torch.equal(model.base_model.model.bn1.running_mean, before)
    save_adapted(model, tmp_path / "adapter")
    frozen = {n: t for n, t in model.base_model.model.state_dict().items() if ".smear_" not in n and "fc" not in n}
    base.load_state_dict({n: t for n, t in frozen.items() if "running" not in n}, strict=False)
    again = load_adapted(base, tmp_path / "adapter", classes=3)
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(again.eval()(x), model.eval()(x), rtol=0, atol=0)


def test_blocks_may_train_on_their_running_statistics():
    for mode, moves in (("batch", True), ("running", False)):
        model = adapted()
        name = next(n for n, _ in model.named_buffers() if ".smear_" in n and n.endswith("running_mean"))
        before = model.get_buffer(name).clone()
        train(model, colours(), settings(steps=1, batch_size=8, block_batch_norm=mode))
        assert torch.equal(model.get_buffer(name), before) != moves


class SlowImages(ImageSet):
    """Takes its time over a batch."""

    def cropped(self, index, crops, size):
        for _ in range(3):
            super().cropped(torch.arange(len(self)).repeat(40), None, 64)
        return super().cropped(index, crops, size)


def test_it_says_when_the_loader_is_the_bottleneck(caplog):
    images = colours()
    slow = SlowImages(**vars(images))
    train(adapted(), slow, settings(steps=2, batch_size=2))
    assert "The loader, not the model, is the bottleneck" in caplog.text
    caplog.clear()
    train(adapted(), images, settings(steps=2, batch_size=12))
    assert not caplog.text
