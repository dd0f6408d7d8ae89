"""The training loop and the scores of the image recipes."""

import timm
import torch

import smear_peft
from recipes.image_models import adapt, count_trained, load_adapted, save_adapted
from recipes.image_scoring import accuracies, predict, uniform
from recipes.image_set import ImageSet
from recipes.image_training import TrainingSettings, augment, in_random_order, train


def colours(count: int = 24, size: int = 32) -> ImageSet:
    """Three classes that colour tells apart, noisy, in two domains of which the second is darker."""
    generator = torch.Generator().manual_seed(0)
    labels, domains = torch.arange(count) % 3, torch.arange(count) // 3 % 2
    images = torch.randint(0, 60, (count, 3, size, size), generator=generator)
    images[torch.arange(count), labels] += 150 - 70 * domains[:, None, None]
    names = [f"{d}/{y}/{i}" for i, (d, y) in enumerate(zip(domains.tolist(), labels.tolist(), strict=True))]
    return ImageSet(images.to(torch.uint8), labels, domains, names, ["light", "dark"])


def adapted(routing: str = "smear"):
    torch.manual_seed(0)
    return adapt(timm.create_model("resnet18"), routing, 2, 4, ["light", "dark"], classes=3)


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_training_learns_and_moves_nothing_that_is_frozen():
    images, model = colours(), adapted()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    statistics = {n for n in model.state_dict() if n.endswith(("bn1.running_mean", "bn2.running_var"))}
    before = state_of(model)
    train(model, images, TrainingSettings(steps=25, batch_size=12, learning_rate=3e-3))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in frozen | statistics)
    assert statistics
    assert accuracies(predict(model, images, 32).labels, images)["micro"] > 0.9


def test_a_linear_probe_trains_its_head_alone():
    model = adapted("linear_probe")
    before = state_of(model)
    train(model, colours(), TrainingSettings(steps=2, batch_size=12))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"fc.weight", "fc.bias"}
    assert count_trained(model) == {"adapter": 0, "head": 512 * 3 + 3}


def test_the_same_seed_trains_the_same_adapter():
    states = []
    for _ in range(2):
        model = adapted()
        train(model, colours(), TrainingSettings(steps=2, batch_size=8, min_crop=0.5, flip=True))
        states.append(state_of(model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_saved_and_reloaded_it_predicts_the_same(tmp_path):
    images = colours()
    for routing in ("smear", "linear_probe"):
        model, base = adapted(routing), timm.create_model("resnet18")
        plain = {name: t for name, t in adapted("linear_probe").state_dict().items() if not name.startswith("fc.")}
        base.load_state_dict(plain, strict=False)
        train(model, images, TrainingSettings(steps=2, batch_size=8))
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


def test_without_augmentation_images_stay_as_they_are():
    images = colours().images
    views = augment(images, TrainingSettings(image_size=32), torch.Generator())
    torch.testing.assert_close(views, images.float() / 255)


def test_a_flip_mirrors_an_image_or_leaves_it():
    images = colours().images
    views = augment(images, TrainingSettings(image_size=32, flip=True), torch.Generator().manual_seed(1))
    whole = images.float() / 255
    same = (views - whole).abs().amax((1, 2, 3)) < 1e-4
    mirrored = (views - whole.flip(3)).abs().amax((1, 2, 3)) < 1e-4
    assert torch.equal(same, ~mirrored)
    assert 0 < same.sum() < len(same)


def test_crops_stay_inside_the_image_and_keep_the_least_area():
    """On a ramp from left to right, a view's span is the crop's width."""
    ramp = torch.arange(64).expand(200, 3, 64, 64).to(torch.uint8)
    settings = TrainingSettings(image_size=64, min_crop=0.25)
    views = 255 * augment(ramp, settings, torch.Generator().manual_seed(0))
    left, right = views[:, 0, 0, 0], views[:, 0, 0, -1]
    assert left.min() >= 0
    assert right.max() <= 63 + 1e-3
    assert ((right - left) > 0.4 * 63).all()
    assert (right - left).std() > 3


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
    found = predict(model, images, 32, batch_size=4).routing
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
        found = predict(model, images, 32).routing
    assert all(row == [0.5, 0.5] for site in found.values() for row in site.values())


def test_every_routing_argument_reaches_the_model():
    """Tag and hash routing would fail without tags and ids."""
    for routing in ("tag", "hash"):
        model = adapted(routing)
        train(model, colours(), TrainingSettings(steps=1, batch_size=8))
        weights = next(iter(predict(model, colours(), 32).routing.values()))
        assert abs(sum(weights["light"]) - 1) < 1e-5
