"""Folders in the layout of the Hugging Face hub: read, refused, and written."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch_file_builder as build
from family_networks import renamed
from flax import nnx
from test_family_files import OTHERS, trained

from repopt_jax import create_model, from_pretrained, save_pretrained
from repopt_jax.files import save_arrays, variables
from repopt_jax.torch_files import export_weights

pytestmark = pytest.mark.slow

CODE = "timm's RepVGG"
HEADER = "---\nlicense: mit\nlibrary_name: timm\n---\n# Model card\n"
CONFIG = {"architecture": "repvgg", "num_classes": 3, "pretrained_cfg": {"input_size": [3, 32, 32]}}


def timm_weights(seed=0):
    return renamed(export_weights(trained("RepVGG", seed)), OTHERS[CODE])


def write(folder, weights, *, config=CONFIG, card=HEADER, name="model.safetensors"):
    """A folder as timm's own code leaves it, made without timm."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if card is not None:
        (folder / "README.md").write_text(card)
    if name.endswith(".safetensors"):
        save_arrays(folder / name, weights, {"format": "pt"})
    else:
        tensors = {k: build.tensor(v) for k, v in weights.items()}
        (folder / name).write_bytes(build.archive_of(tensors))
    return folder


def assert_same(model, other):
    found, wanted = variables(model), variables(other)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_is_read_and_its_licence_told(name, tmp_path, capsys):
    folder = write(tmp_path / "a", timm_weights(), name=name)
    assert_same(from_pretrained(folder), trained("RepVGG"))
    told = capsys.readouterr().out
    assert told == f"{folder / name}: RepVGG, kind repvgg, 3 classes; licence mit\n"


def test_safetensors_come_before_pickles(tmp_path):
    folder = write(tmp_path / "a", timm_weights(0), name="pytorch_model.bin")
    write(folder, timm_weights(1))
    assert_same(from_pretrained(folder), trained("RepVGG", 1))


def test_a_file_is_read_without_the_rest(tmp_path, capsys):
    folder = write(tmp_path / "a", timm_weights(), config=None, card=None)
    model = from_pretrained(folder / "model.safetensors", param_dtype=jnp.bfloat16)
    assert model.linear.kernel.dtype == jnp.bfloat16
    assert capsys.readouterr().out.endswith("licence not stated\n")


@pytest.mark.parametrize(
    ("card", "config", "licence"),
    [
        (
            "---\nlicense: other\nlicense_name: mobileone-license\n---\n",
            CONFIG,
            "mobileone-license",
        ),
        ("# no header\nlicense: mit\n", CONFIG, "not stated"),
        (None, CONFIG | {"pretrained_cfg": {"license": "bsd-3-clause"}}, "bsd-3-clause"),
        ("---\nlicense: \x1b[31mred\n---\n", CONFIG, r"\x1b[31mred"),
    ],
)
def test_the_licence_is_the_cards_or_the_configurations(card, config, licence, tmp_path, capsys):
    from_pretrained(write(tmp_path / "a", timm_weights(), card=card, config=config))
    assert capsys.readouterr().out.endswith(f"licence {licence}\n")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CONFIG | {"num_classes": 7}, r"config\.json must state num_classes=3, got 7"),
        (
            CONFIG | {"architecture": "repvgg_a0"},
            r"config\.json must state .*repvgg, got 'repvgg_a0'",
        ),
        ({"arguments": {"groups": 4}}, r"config\.json must state groups=2, got 4"),
        ({"arguments": [1]}, r"config\.json must hold a JSON object"),
        ([1, 2], r"config\.json must hold a JSON object"),
    ],
)
def test_weights_of_another_network_than_the_stated_one_are_refused(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        from_pretrained(write(tmp_path / "a", timm_weights(), config=config))


def test_what_is_no_network_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"must hold one of .*'model\.safetensors'"):
        from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"revision must be None for a local path, got 'main'"):
        from_pretrained(tmp_path, revision="main")
    with pytest.raises(ValueError, match=r"name_or_path must be .* got 'no such/folder/at all'"):
        from_pretrained("no such/folder/at all")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'repopt_jax\[hub\]'"):
        from_pretrained("timm/repvgg_a0.rvgg_in1k")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A cache of the hub with two commits of one repository; nothing is asked of a network."""
    reason = "the extra hub is not installed"
    constants = pytest.importorskip("huggingface_hub.constants", reason=reason)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--repvgg.tag"
    for seed, commit in enumerate("ab"):
        write(repository / "snapshots" / (40 * commit), timm_weights(seed))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(40 * "a")
    return repository


def test_the_hubs_cache_is_used_without_a_network(hub_cache, capsys):
    assert_same(from_pretrained("someone/repvgg.tag"), trained("RepVGG", 0))
    told = capsys.readouterr().out
    assert f"someone--repvgg.tag/snapshots/{40 * 'a'}/" in told and told.endswith("licence mit\n")
    assert_same(from_pretrained("someone/repvgg.tag", revision=40 * "b"), trained("RepVGG", 1))
    with pytest.raises(ValueError, match="got someone/another: "):
        from_pretrained("someone/another")
    with pytest.raises(ValueError, match=r"got someone/repvgg\.tag at v2: "):
        from_pretrained("someone/repvgg.tag", revision="v2")


ARGUMENTS = {"name": "RepOpt-VGG", "kind": "csla", "num_blocks": (1, 1, 1, 1)}
ARGUMENTS |= {"widths": (4, 4, 4, 8, 8), "num_classes": 3, "strides": (1, 1, 2, 2, 2)}


def test_a_written_folder_is_read_back(tmp_path, capsys):
    model = create_model(**ARGUMENTS, rngs=nnx.Rngs(0))
    folder = tmp_path / "new" / "folder"
    training = "CIFAR-10, 100 epochs with `repopt_sgd`: 93.8 %."
    save_pretrained(model, folder, ARGUMENTS, training=training, license="apache-2.0")
    assert {p.name for p in folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    loaded = from_pretrained(folder)
    assert_same(loaded, model)
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    logits = nnx.jit(lambda model: model(images))
    np.testing.assert_array_equal(logits(loaded), logits(model))
    assert capsys.readouterr().out.endswith("kind csla, 3 classes; licence apache-2.0\n")
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: repopt_jax\n")
    assert training in card and "strides=(1, 1, 2, 2, 2)" in card


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": " \n"}, "training must say how"),
        ({"arguments": ARGUMENTS | {"num_classes": 4}}, r"arguments must .*linear/bias"),
        ({"arguments": ARGUMENTS | {"strides": (2, 1, 2, 2, 2)}}, r"arguments must .*stage0/conv"),
        ({"arguments": ARGUMENTS | {"kind": "hs"}}, r"arguments must .*branch_scales"),
        ({"arguments": ARGUMENTS | {"bn_group": 2}}, r"arguments must .*got \['bn_group'\]"),
        ({"license": "mit\nother: x"}, r"license must be .*got 'mit\\nother: x'"),
    ],
)
def test_what_cannot_be_read_back_is_not_written(change, message, tmp_path):
    model = create_model(**ARGUMENTS, rngs=nnx.Rngs(0))
    given = {"arguments": ARGUMENTS, "training": "Not at all.", **change}
    with pytest.raises(ValueError, match=message):
        save_pretrained(model, tmp_path / "a", **given)
    assert not (tmp_path / "a").exists()


def test_numbers_that_no_network_has_are_not_written(tmp_path):
    model = create_model(**ARGUMENTS, rngs=nnx.Rngs(0))
    model.linear.bias[...] = jnp.nan
    with pytest.raises(ValueError, match="linear/bias must be finite"):
        save_pretrained(model, tmp_path / "a", ARGUMENTS, training="Not at all.")
    assert not (tmp_path / "a").exists()


def test_a_folder_with_a_network_is_left_as_it_is(tmp_path):
    model = create_model(**ARGUMENTS, rngs=nnx.Rngs(0))
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=r"folder must hold no network yet, got .*README\.md"):
        save_pretrained(model, tmp_path, ARGUMENTS, training="Not at all.")
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "mine"
