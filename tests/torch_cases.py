"""Builds a file for every row of the table in docs/torch_files.md.

A case is the row's first cell, the file, and what is expected of `repopt-convert`: flags, status
and text. Cases of status 0 hold the weights of `network()`, and others are refused.
"""

import dataclasses
import functools
import json
import zipfile

import ml_dtypes
import numpy as np
import torch_file_builder as build
from family_networks import RBR, TINY, drawn, plus_stages, renamed
from safetensors.numpy import save

import repopt_jax
from repopt_jax.torch_files import export_weights, official_names
from repopt_jax.torch_files.names import DIALECTS
from repopt_jax.torch_files.weights import unfilled_model, variables

SIZE = {"num_blocks": (1, 2, 1, 1), "widths": (4, 4, 6, 8, 8), "num_classes": 3}


@dataclasses.dataclass
class Case:
    """A file and what becomes of it.

    Attributes:
      row: first cell of its row.
      data: the file.
      says: what the command prints, a regular expression.
      status: of the command.
      flags: of the command.
      wanted: the weights that it holds.
      load: whether the file is one of ours, which `load_weights` opens.
    """

    row: str
    data: bytes
    says: str
    status: int = 0
    flags: tuple[str, ...] = ("--weights",)
    wanted: dict | None = None
    load: bool = False


@functools.cache
def network(kind="target", seed=0, **options):
    """A network of numbers from 0.5 to 1.5, which takes no compiling."""
    model = unfilled_model(name="RepOpt-VGG", kind=kind, **SIZE | options)
    return drawn(model, lambda rng, shape: rng.uniform(0.5, 1.5, shape), seed)


def tensors(weights):
    return {name: build.tensor(value) for name, value in weights.items()}


def archive(weights):
    return build.archive_of(tensors(weights))


def half(weights, kind):
    return {k: v.astype(kind) if v.dtype.kind == "f" else v for k, v in weights.items()}


def numpy_array(value, by_columns=False, order="<", name=None, size=None):
    """An array as numpy pickles it."""
    kind = name or f"{value.dtype.kind}{value.itemsize}"
    state = (3, order, None, None, None, -1, -1, 0)
    dtype = build.Call(build.Name("numpy", "dtype"), (kind, False, True), state=state)
    data = value.astype(value.dtype.newbyteorder(order)).tobytes("F" if by_columns else "C")
    data = data if size is None else data[:size]
    core, make = "numpy.core.multiarray", "_reconstruct"
    empty = (build.Name("numpy", "ndarray"), (0,), b"b")
    return build.Call(
        build.Name(core, make), empty, state=(1, value.shape, dtype, by_columns, data)
    )


def tower(blocks):
    """Scales of one channel in a stage of very many blocks."""
    names = ["stage0.scale_conv.weight", "stage0.scale_1x1.weight"]
    for stage, count in enumerate((1, 1, blocks, 1), 1):
        branches = ("conv", "1x1", "identity")
        names += [f"stage{stage}.{i}.scale_{b}.weight" for i in range(count) for b in branches]
    return dict.fromkeys(names, np.ones(1, np.float32))


def ours(bias_type=np.float32, **changes):
    """A weights file of ours with other metadata, as text or as JSON; "null" drops a fact."""
    size = {"num_blocks": "[1, 2, 1, 1]", "widths": "[4, 4, 6, 8, 8]", "num_classes": "3"}
    facts = {"format_version": "1", "name": "RepOpt-VGG", "kind": "target", **size}
    facts |= {k: v if isinstance(v, str) else json.dumps(v) for k, v in changes.items()}
    facts = {k: v for k, v in facts.items() if v != "null"}
    arrays = {k: np.asarray(v) for k, v in variables(network()).items()}
    arrays["stage0/bn/bias"] = arrays["stage0/bn/bias"].astype(bias_type)
    return save(arrays, facts)


def read_cases():
    """Files that are read."""
    weights = export_weights(network())
    plain = tensors(weights)
    yield Case("zip archive, since torch 1.6", build.archive_of(plain), "kind target")
    yield Case("zip archive, since torch 1.6", build.archive_of(plain, order="big"), "kind target")
    yield Case("pickles in a row, before torch 1.6", build.legacy_of(plain), "kind target")
    safetensors = save(weights, {"format": "pt"})
    yield Case("safetensors with torch's names", safetensors, "kind target")
    for kind in (np.float16, ml_dtypes.bfloat16, np.float64):
        wanted = half(weights, kind)
        yield Case("half, bfloat16, float64 weights", archive(wanted), "target", wanted=wanted)
    module = build.module("torch.nn.Module", plain)
    yield Case("whole pickled modules", build.archive_of(module), "kind target")
    yield Case("whole pickled modules", build.archive_of({"model": module, "ema": None}), "target")
    arrays = {k: numpy_array(v) if v.ndim else build.tensor(v) for k, v in weights.items()}
    yield Case("arrays and numbers of numpy", build.archive_of(arrays), "kind target")
    arrays = {k: numpy_array(v, True, ">") if v.ndim else v.item() for k, v in weights.items()}
    yield Case("arrays and numbers of numpy", build.archive_of(arrays), "kind target")
    config = build.Call(build.Name("yacs.config", "CfgNode"), items={"EPOCHS": 240})
    beside = {"config": config, "optimizer": {}, "names": {"cat"}}
    yield Case(
        "configurations and other objects",
        build.archive_of({"model": plain, **beside}),
        "left out 'config', 'optimizer', 'names'",
    )
    for key in CONTAINERS:
        yield Case("weights under a key", build.archive_of({key: plain, "epoch": 3}), "'epoch'")
    nested = {"ema": {"model": {"module": plain}}}
    yield Case("weights under a key", build.archive_of(nested), "kind target")
    other = tensors(export_weights(network(seed=1)))
    several = {"state_dict_ema": other, "ema": other, "state_dict": plain}
    several = build.archive_of(several)
    row = "weights under several keys"
    yield Case(row, several, "took state_dict; --key takes ema or state_dict_ema")
    two = build.archive_of({"ema": plain, "state_dict": other})
    yield Case(row, two, "kind target", flags=("--weights", "--key=ema"))
    for prefix in PREFIXES:
        wrapped = {prefix + name: value for name, value in weights.items()}
        yield Case("a prefix of all names", archive(wrapped), "kind target")
    branched = export_weights(network("repvgg"))
    for dialect in (d for d in DIALECTS if d.family in ("RepVGG", "timm's RepVGG")):
        own = {dialect.own(name): value for name, value in branched.items()}
        yield Case("names of the authors and of timm", archive(own), "repvgg", wanted=branched)
    yield from head_cases()
    counts = {"total_ops": np.ones(1), "stage0.conv.total_ops": np.ones(1)}
    extra = build.archive_of({**tensors(weights | counts), "epoch": 3})
    says = r"left out 'total_ops' \(2 times\), 'epoch', 'num_batches_tracked' \(6 times\)"
    yield Case("entries that are no weights", extra, says)
    strides = (1, 2, 1, 2, 2)
    for flags in ((), ("--strides", *map(str, strides))):
        says = "kind target" if flags else "took strides of 2 2 2 2 2"
        yield Case("strides", archive(weights), says, flags=("--weights", *flags))
    stated = save(weights, {"strides": json.dumps(strides)})
    yield Case("strides", stated, r"^left out[^\n]*\nRepOpt-VGG, kind target")
    search = export_weights(network("hs"))
    row = "whether scales are trained"
    yield Case(row, archive(search), "kind hs", wanted=search)
    yield Case(row, archive(search), "csla", flags=("--weights", "--kind=csla"), wanted=search)
    yield Case(row, save(search, {"kind": "csla"}), "kind csla", wanted=search)
    names = official_names(repopt_jax.searched_scales(network("hs")))
    yield Case("scales", archive(names), "RepOpt-VGG, 6 blocks", flags=(), wanted={})
    foreign = {f"backbone.{k}": v for k, v in names.items() if "stage0" not in k}
    says = "warning: these scales fit no network of ours"
    yield Case("scales of other networks", archive(foreign), says, flags=(), wanted={})


def head_cases():
    """Files of networks with heads that ours do not have."""
    row = "auxiliary and detection heads"
    branched = export_weights(network("repvgg", se=True))
    heads = {"stage1_aux.0.conv.weight": np.ones((4, 4, 3, 3), np.float32)}
    heads |= {f"{name}_aux.3.bias": np.ones(3) for name in ("stage1", "stage2", "stage3_first")}
    heads["stage1_aux.0.bn.num_batches_tracked"] = np.array(1)
    plus = renamed(branched, {**RBR, **plus_stages(1)}) | heads
    plus = {f"module.{name}": value for name, value in plus.items()}
    says = (
        r"left out 'num_batches_tracked' \(13 times\), 'stage1_aux' \(3 times\), 'stage2_aux', 's"
    )
    yield Case(row, archive(plus), says, wanted=branched)
    model = drawn(unfilled_model(**TINY["efficientrep_reppan_tiny"], kind="repvgg"))
    weights = export_weights(model)
    found = archive({**weights, "detect.stems.0.conv.weight": np.ones((4, 4, 1, 1), np.float32)})
    yield Case(row, found, r"left out .*, 'detect'\n", wanted=weights)


CONTAINERS = (
    *("model", "state_dict", "model_state_dict", "net", "network", "module", "weights", "params"),
    *("ema", "model_ema", "state_dict_ema", "ema_state_dict", "params_ema", "student", "teacher"),
)
PREFIXES = (
    *("module.", "_orig_mod.", "model.", "net.", "backbone.", "module._orig_mod.model."),
    "state_dict.model.ema.",
)


def refused_cases():
    """Files that are refused, each with the reason that is told."""
    weights = export_weights(network())
    plain = tensors(weights)

    def changed(row, says, **new):
        changes = {name.replace("__", "."): value for name, value in new.items()}
        return Case(row, archive(weights | changes), says, 1)

    tar = bytes(257) + b"ustar" + bytes(300)
    yield Case("tar archive, before torch 0.2", tar, "it is a tar file", 1)
    script = build.write_archive(b"N.", {}, records={"constants.pkl": b"N."})
    yield Case("TorchScript", script, "it is a TorchScript program", 1)
    packed = build.archive_of(plain, compression=zipfile.ZIP_DEFLATED)
    yield Case("compressed archives", packed, "compressed or encrypted", 1)
    yield Case("cut-off and changed files", archive(weights)[:-200], "its zip archive", 1)
    yield Case("other files", b"epoch: 3" * 9, "no torch file, as it starts with b'epoch", 1)
    for made_by, kind in TENSORS.items():
        tensor = build.Call(build.Name("torch._utils", made_by), ())
        data = build.archive_of({**plain, "linear.bias": tensor})
        yield Case("sparse, quantized and meta tensors", data, f"'linear.bias' is a {kind} tens", 1)
        module = build.archive_of(build.module("my.Net", {"linear.bias": tensor}))
        yield Case("sparse, quantized and meta tensors", module, f"is a {kind} tensor", 1)
    row = "integers, booleans and complex numbers"
    for kind in (np.int64, np.bool_, np.complex64):
        yield changed(row, "linear.bias must hold floats", linear__bias=np.ones(3, kind))
    row = "NaN, infinity, negative variances"
    for value in (np.nan, np.inf):
        bias = np.full(3, value, np.float32)
        yield changed(row, "linear.bias must be finite", linear__bias=bias)
    var = -np.ones(4, np.float32)
    yield changed(row, "running_var must not be negative", stage0__bn__running_var=var)
    row = "missing, unknown or misshapen tensors"
    yield changed(row, "surplus extra", extra=np.ones(1))
    many = {f"extra{i}": np.ones(1) for i in range(500)}
    yield changed(row, "surplus extra0; .*; and 492 more", **many)
    yield changed(row, "shape", stage0__conv__weight=np.ones(4))
    for name in ("linear__weight", "stage0__conv__weight"):
        said = rf"{name.replace('__', '.')} is a single number"
        yield changed(row, said, **{name: np.float32(1)})
    lacking = {k: v for k, v in weights.items() if k != "stage0.bn.bias"}
    yield Case(row, archive(lacking), "missing stage0.bn.bias", 1)
    cut = {k: numpy_array(v, size=4) if v.ndim else build.tensor(v) for k, v in weights.items()}
    yield Case(row, build.archive_of(cut), r"linear\.weight is missing", 1)
    text = build.archive_of({**plain, "linear.bias": numpy_array(np.array(["a"]), name="U1")})
    yield Case(row, text, "missing linear.bias", 1)
    row = "weights of other networks"
    for name, says in {
        "a.ERBlock_2.0.weight": "like YOLOv6",
        "fc.weight": "no network of RepOpt",
    }.items():
        yield Case(row, archive({name: np.ones((2, 2))}), says, 1)
    row = "names that cannot be printed, or too long"
    for name in ("x\x1b[31m", "a\nb", "\u202ex", "x" * 5000):
        yield Case(row, archive(weights | {name: np.ones(1)}), "printable|absurd length", 1)
        scale = {f"{name}.scale_conv.weight": np.ones(4, np.float32)}
        yield Case(row, archive(scale), "printable text|absurd length", 1, flags=())
        own = save({name: np.ones(1, np.float32)}, {"format_version": "1", "kind": "target"})
        yield Case(row, own, "printable text of at most 200 characters", 1, load=True)
    row = "sizes that no network has"
    none = {k: v[:0] if v.ndim else v for k, v in weights.items()}
    yield Case(row, archive(none), "widths must be 5 whole numbers from 1", 1)
    empty = {"linear__weight": np.ones((0, 8), np.float32), "linear__bias": np.ones(0, np.float32)}
    yield changed(row, "num_classes must be a whole number from 1", **empty)
    for count in (1000, 3000):
        yield Case(row, archive(tower(count)), "num_blocks must be .* from 1 to 128", 1, flags=())
    one, other = (np.ones(n, np.float32) for n in (4, 5))
    lengths = {"a.scale_conv.weight": one, "a.scale_1x1.weight": other}
    yield Case(row, archive(lengths), "must be of one length", 1, flags=())
    yield from metadata_cases()


TENSORS = {
    "_rebuild_sparse_tensor": "sparse",
    "_rebuild_sparse_csr_tensor": "sparse_csr",
    "_rebuild_qtensor": "quantized",
    "_rebuild_meta_tensor_no_storage": "meta",
}


def metadata_cases():
    """Weights files of ours, the metadata of which no network has."""
    row = "metadata of a weights file that states no network"

    def case(says, **changes):
        return Case(row, ours(**changes), says, 1, load=True)

    for version in ("99", "1\x1b", "null"):
        yield case(
            "format_version 1, got|it is no torch file|no network of RepOpt", format_version=version
        )
    for fact in ("rngs", "dtype", "param_dtype", "bn_group", "scales", "block_type", "x\x1b[31m"):
        yield case("must state its network, got|must be printable", **{fact: 3})
    for size, values in {
        "num_classes": (-3, 0, 2.5, True, "[3]", 10**12, "9" * 5000, '"3"', {}),
        "widths": ([4, 4, -6, 8, 8], [4, 4, 10**9, 8, 8], [4, 4, 6.0, 8, 8], [4], 4, [[4]], {}),
        "num_blocks": (
            [1, 10**6, 1, 1],
            [1, -1, 1, 1],
            [0, 1, 1, 1],
            "{",
            "[" * 100_000,
            7,
        ),
        "strides": ([0, 1, 1, 1, 1], [10**30, 1, 1, 1, 1], [2, 2], "2"),
        "name": ("RepOpt-VGG-B99", "x\nx", "x" * 1000),
        "kind": ("plain", "rep", "x\x1b"),
        "se": (True,),
        "groups": (3, -1, 10**30, [2], "x"),
        "num_blocks ": ([1, 2, 1, 1],),
    }.items():
        for value in values:
            yield case(r"must|does not fit", **{size: value})
    yield case("must have arrays for each of num_blocks", num_blocks=[128] * 4)
    one = {"name": "MobileOne", "num_blocks": [1] * 4, "widths": [4] * 5}
    for value in (3, "x", [0, 0, 0], [-1, 0, 0, 0], [0.5] * 4, [0] * 100_000):
        yield case(r"se_blocks must be|must state|must be printable", **one, se_blocks=value)
    for value in (0, 10**9, [2], "null "):
        yield case(r"copies must be|must state|does not fit", **one, copies=value)
    ghost = {"name": "RepOpt-GhostNet", "num_blocks": "null", "widths": "null"}
    for value in ("NaN", "1e300", "Infinity", "-1", '"x"', "true", "[0.5]"):
        yield case("width must be above 0", **ghost, width=value)
    yield case("dropout must be", **ghost, width=0.1, dropout=2)
    for kind in (np.int64, np.bool_, np.complex64):
        says = "must hold floats, got stage0/bn/bias of"
        yield Case("integers, booleans and complex numbers", ours(kind), says, 1, load=True)
    deep = b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    for head in (deep, b"{" + b" " * 300):
        data = len(head).to_bytes(8, "little") + head
        yield Case(row, data, "must be a safetensors file", 1)
    yield Case(row, (1 << 62).to_bytes(8, "little") + b'{"format_version":1}', "safetensors", 1)
