"""Networks and folders of timm's own code, where timm is installed."""

import jax.numpy as jnp
import numpy as np
import pytest

from repopt_jax import from_pretrained
from repopt_jax.torch_files import import_weights, recognize
from repopt_jax.torch_files.weights import unfilled_model

timm = pytest.importorskip("timm", reason="timm is not installed")
torch = pytest.importorskip("torch", reason="torch is not installed")
ARCHITECTURES = {
    "repvgg_a0": ("RepVGG-A0", "repvgg"),
    "repvgg_b1g4": ("RepVGG-B1g4", "repvgg"),
    "repvgg_d2se": ("RepVGG-D2se", "repvgg"),
    "mobileone_s0": ("MobileOne-S0", "mobileone"),
    "mobileone_s4": ("MobileOne-S4", "mobileone"),
    "repghostnet_050": ("RepOpt-GhostNet-0.5x", "rep"),
}


def network(architecture, **options):
    """A network of timm's with numbers of a trained one, in float64."""
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=5, **options).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.3, 0.3)
            torch.nn.init.uniform_(module.running_mean, -0.3, 0.3)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.double()


def logits(model, images):
    with torch.no_grad():
        return model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()


def arrays(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["repvgg_a0", "mobileone_s0", "repghostnet_050"])
@pytest.mark.parametrize("fused", [False, True])
def test_logits_are_timms(architecture, fused, x64):
    model = network(architecture)
    if fused:
        model = timm.utils.reparameterize_model(model)
    weights = arrays(model)
    facts = recognize(weights)
    assert (facts["name"], facts["kind"]) == (
        ARCHITECTURES[architecture] if not fused else (ARCHITECTURES[architecture][0], "target")
    )
    ours = import_weights(unfilled_model(**facts, param_dtype=jnp.float64), weights)
    ours.eval()
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3))
    wanted = logits(model, images)
    np.testing.assert_allclose(ours(images), wanted, rtol=1e-8, atol=1e-10 * abs(wanted).max())


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_recognized(architecture):
    with torch.device("meta"):
        model = timm.create_model(architecture)
    weights = {k: np.broadcast_to(np.float32(1), v.shape) for k, v in model.state_dict().items()}
    facts = recognize(weights)
    assert (facts["name"], facts["kind"]) == ARCHITECTURES[architecture]
    import_weights(unfilled_model(**facts), weights)


@pytest.mark.slow
def test_a_folder_of_timms_own_saving_is_read(tmp_path, capsys):
    model = network("repvgg_a0").float()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    ours = from_pretrained(tmp_path)
    assert "RepVGG-A0, kind repvgg, 5 classes" in capsys.readouterr().out
    ours.eval()
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    wanted = logits(model, images)
    np.testing.assert_allclose(ours(images), wanted, rtol=1e-3, atol=1e-4 * abs(wanted).max())
