"""TFDS sets stored as ArrayRecord, read without TensorFlow. Nothing is downloaded."""

import sys
from typing import Any

from repopt_jax.data.sources import ArrayRecordSource, Dataset, printable

# TFDS 4.9 declares none of the three, and its command cannot do without them.
_COMMAND = "the command needs `pip install tensorflow apache-beam mlcroissant`"


class TfdsSource(ArrayRecordSource):
    """One split of a TFDS set."""

    def __init__(self, builder, split: str):
        import tensorflow_datasets as tfds

        self._image_key, self._label_key = _keys(builder)
        decoders = {self._image_key: tfds.decode.SkipDecoding()}
        reader = builder.as_data_source(split=split, decoders=decoders)
        super().__init__(reader, builder.data_dir)

    def item(self, record: dict[str, Any]) -> dict[str, Any]:
        """The image of a record."""
        return {
            "image": record[self._image_key],
            "label": int(record[self._label_key]),
            "name": printable(record.get("file_name", "")),
        }


def load_tfds(
    name: str, data_dir: str | None, train_split: str | None, eval_split: str | None
) -> Dataset:
    """Opens a set that TFDS has prepared; the arguments are those of `load_dataset`."""
    builder = _prepared(name, data_dir)
    features, splits = builder.info.features, builder.info.splits
    image_key, label_key = _keys(builder)
    classes = getattr(dict(features.items()).get(label_key), "num_classes", None)
    if image_key not in features or classes is None:
        raise ValueError(
            f"name must be an image classification set, got {name!r} with features {list(features)}"
        )
    if eval_split is None:
        # ImageNet's test split in TFDS has no labels.
        labelled_test = "test" in splits and builder.name != "imagenet2012"
        eval_split = "test" if labelled_test else "validation"
    _allow_open_files(sum(split.num_shards for split in splits.values()))
    height, width, _ = features[image_key].shape
    return Dataset(
        name,
        classes,
        _open_split(builder, "train_split", train_split or "train"),
        _open_split(builder, "eval_split", eval_split),
        None if None in (height, width) else (height, width, 3),
        class_names=tuple(features[label_key].names),
    )


def _prepared(name: str, data_dir: str | None):
    """The builder of a set whose ArrayRecord files are there; else say what makes them."""
    import tensorflow_datasets as tfds
    from etils import epath

    try:
        # Offline by design: TFDS asks its public bucket only with `try_gcs=True`.
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        # TFDS's own message lists a thousand names.
        raise ValueError(
            "name must be 'digits', 'folder', a TFDS set or a TFDS folder in "
            f"data_dir={str(data_dir)!r}, got {name!r}"
        ) from None
    folder = epath.Path(builder.data_dir)  # may lie in a bucket
    if not (folder / "dataset_info.json").exists():
        # The folder is <root>/name/version or <root>/name/config/version.
        root = folder.parents[builder.info.full_name.count("/")]
        # ImageNet cannot be downloaded without an account.
        manual = " --manual_dir=DIR_OF_THE_TAR_FILES" if builder.name == "imagenet2012" else ""
        raise FileNotFoundError(
            f"data set {name!r} is not prepared in {folder}: run `tfds build {name} "
            f"--data_dir={root} --file_format=array_record{manual}` once ({_COMMAND})"
        )
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        # It knows formats that were added later; a set's own class does not.
        builder = tfds.builder_from_directory(folder)
    if tfds.core.FileFormat.ARRAY_RECORD not in builder.info.available_file_formats():
        raise ValueError(
            f"data set {name!r} in {folder} must be stored as array_record, got "
            f"{builder.info.file_format.value}: run `tfds convert_format "
            f"--dataset_version_dir={folder} --out_file_format=array_record --num_workers=1`, "
            f"which adds such files beside the others ({_COMMAND})"
        )
    return builder


def _open_split(builder, argument: str, split: str) -> TfdsSource:
    try:
        return TfdsSource(builder, split)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{argument} must select from the splits {list(builder.info.splits)} "
            f"of {builder.name!r}, got {split!r}"
        ) from error


def _allow_open_files(shards: int):
    """Let this process open all files of a set: their readers stay open, and shuffling needs all.

    ImageNet has 1024 for training alone, as many as many systems allow a process by default.
    """
    if sys.platform == "win32":
        return
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (sys.maxsize if x == resource.RLIM_INFINITY else x for x in limits)
    if hard < shards + 256:
        raise ValueError(
            f"a process must be allowed to open more than the {shards} files of the set, got "
            f"{hard}: raise the limit, which `ulimit -Hn` shows"
        )
    wanted = min(2 * shards + 512, hard)  # two parts of a run may have theirs open at a time
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, limits[1]))


def _keys(builder) -> tuple[str, str]:
    """Names of the image and of the label in the set's records."""
    keys = builder.info.supervised_keys
    return keys if keys and len(keys) == 2 else ("image", "label")
