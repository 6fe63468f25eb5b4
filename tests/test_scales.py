"""Scales: files, checks against a model, tables, variants."""

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from repopt_jax import Scales, create_model, load_scales, save_scales


@pytest.fixture(scope="module")
def model():
    return create_model(
        "RepOpt-VGG",
        num_blocks=(1, 2, 1, 1),
        widths=(4, 4, 6, 8, 8),
        num_classes=3,
        rngs=nnx.Rngs(0),
    )


def test_file_keeps_everything(tmp_path, model):
    rng = np.random.default_rng(0)
    scales = Scales(
        {
            path: {n: rng.normal(size=v.shape).astype(np.float32) for n, v in block.items()}
            for path, block in Scales.initial(model).items()
        },
        {"model": "RepOpt-VGG", "source": "search", "top1": "12.34"},
    )
    save_scales(tmp_path / "s.safetensors", scales)
    found = load_scales(tmp_path / "s.safetensors")
    assert list(found) == list(scales)
    for key, vector in scales.flat().items():
        np.testing.assert_array_equal(found.flat()[key], vector)
    assert found.metadata == {"format_version": "1", **scales.metadata}
    found.check(model)
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_blocks_of_a_file_are_in_the_order_of_the_network(tmp_path):
    """The tenth layer after the second, though the file's keys are sorted as text."""
    paths = ["stage1/2/conv", "stage1/10/conv", "stage2/0/conv"]
    scales = Scales({path: {"full": np.ones(2, np.float32)} for path in paths[::-1]})
    save_scales(tmp_path / "s.safetensors", scales)
    assert list(load_scales(tmp_path / "s.safetensors")) == paths


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "s.safetensors"
    save_scales(path, Scales({"a": {"full": np.ones(2)}}))
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("etils.epath.gpath.PosixGPath.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_scales(path, Scales({"b": {"full": np.ones(3)}}))
    assert path.read_bytes() == before


def test_a_file_without_a_folder_is_refused_by_its_own_name(tmp_path):
    path = tmp_path / "absent" / "s.safetensors"
    with pytest.raises(FileNotFoundError, match=rf"path must lie in .* folder, got {path}$"):
        save_scales(path, Scales({"a": {"full": np.ones(2)}}))


def test_check_lists_all_problems_in_one_message(model):
    vectors = {path: dict(block) for path, block in Scales.initial(model).items()}
    del vectors["stage2/1/conv"]["identity"]
    vectors["stage0/conv"]["conv3x3"] = np.ones(5)
    vectors["stage9/conv"] = {"conv3x3": np.ones(2)}
    vectors["stage1/0/conv"]["conv1x1"] = np.full(4, np.nan)
    with pytest.raises(ValueError) as error:
        Scales(vectors).check(model)
    assert str(error.value) == (
        "scales do not fit the model: missing stage2/1/conv/identity; "
        "stage0/conv/conv3x3 must have shape (4,), got (5,); "
        "stage1/0/conv/conv1x1 must be finite; surplus stage9/conv/conv3x3"
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("RepOpt-VGG-B1", "scales of RepOpt-VGG-B1 do"),
        ("unknown", "scales of no network of ours do"),
    ],
)
def test_check_says_whose_scales_they_are_in_a_bounded_message(model, name, said):
    """As train.py prints it where a file of scales is another network's."""
    vectors = {f"backbone/{i}/conv": {"conv3x3": np.ones(4)} for i in range(1000)}
    with pytest.raises(ValueError, match=f"^{said} not fit the model: missing.*more$") as error:
        Scales(vectors, {"model": name}).check(model)
    assert len(str(error.value)) < 1000


def test_variants_of_the_ablation(model):
    scales = Scales({"a": {"conv3x3": np.array([1.0, -3.0]), "identity": np.array([0.0, 1.0])}})
    assert scales.ones()["a"]["conv3x3"].tolist() == [1.0, 1.0]
    assert scales.averaged()["a"]["conv3x3"].tolist() == [-1.0, -1.0]
    assert scales.averaged()["a"]["identity"].tolist() == [0.5, 0.5]
    initial = Scales.initial(model)
    np.testing.assert_allclose(initial["stage2/1/conv"]["conv1x1"], np.sqrt(2), rtol=1e-6)
    initial.check(model)


def test_describe_tells_the_largest_multiplier_of_the_centre():
    scales = Scales(
        {
            "s1/0": {"conv3x3": np.array([2.0, -1.0]), "conv1x1": np.array([1.0, -3.0])},
            "s1/1": {"conv3x3": np.array([1.0, 1.0]), "identity": np.array([9.0, 9.0])},
        }
    )
    by_block = scales.describe().splitlines()
    assert by_block[1].split() == ["s1/0", "conv3x3", "2", "0.500", "-1.000", "2.000", "50.0%",
                                   "10.000"]  # fmt: skip
    assert by_block[3].split()[-1] == "2.000"  # identity counts as 1
    by_stage = scales.describe("stage").splitlines()
    assert len(by_stage) == 4
    assert by_stage[1].split()[-1] == "10.000"


@pytest.mark.parametrize("content", [b"", b"nonsense" * 4, b"\x08\0\0\0\0\0\0\0{}      "])
def test_other_files_are_refused_by_name(tmp_path, content):
    path = tmp_path / "s.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"s\.safetensors"):
        load_scales(path)


def test_vectors_without_a_layer_are_refused(tmp_path):
    save_file({"conv3x3": np.ones(2)}, tmp_path / "s.safetensors", {"format_version": "1"})
    with pytest.raises(ValueError, match=r"must hold vectors named <layer path>/<branch>"):
        load_scales(tmp_path / "s.safetensors")


def test_absent_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="scales must be an existing file"):
        load_scales(tmp_path / "nope.safetensors")


def test_equal_scales_are_equal_files(tmp_path):
    """Whatever the order of their metadata, in which safetensors itself takes liberties."""
    files = []
    for number in range(6):
        names = ["model", "source", "dataset", "epochs", "top1"][:: (-1) ** number]
        metadata = {name: f"some {name}" for name in names}
        scales = Scales({"conv": {"full": np.arange(3, dtype=np.float32)}}, metadata)
        save_scales(tmp_path / f"{number}", scales)
        files.append((tmp_path / f"{number}").read_bytes())
        assert load_scales(tmp_path / f"{number}")["conv"]["full"].tolist() == [0, 1, 2]
    assert len(set(files)) == 1


def test_scales_are_equal_where_their_vectors_and_metadata_are():
    def scales(value=1.0, name="full", **metadata):
        return Scales({"conv": {name: np.array([value, -2.0], np.float32)}}, metadata)

    assert scales(model="a") == scales(model="a")
    assert scales() != scales(3.0)
    assert scales() != scales(name="other")
    assert scales(model="a") != scales(model="b")
    assert scales() != {"conv": {"full": np.array([1.0, -2.0])}}


def test_a_table_by_something_else_is_refused():
    with pytest.raises(ValueError, match=r"^by must be 'block' or 'stage', got 'stages'$"):
        Scales({"conv": {"full": np.ones(2)}}).describe(by="stages")
