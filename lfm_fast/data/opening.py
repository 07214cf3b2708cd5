"""Which `Store` reads what lies at a path: the layouts by name, and what a path looks like."""

from importlib import import_module
from pathlib import Path

from lfm_fast.data.store import Store, first_names

# name -> (module, function(path, split) -> Store, function(path, names in it) -> bool: whether it looks like it)
_LAYOUTS = {
    "folder": ("lfm_fast.data.folder", "open_folder", None),
    "list": ("lfm_fast.data.file_list", "open_list", None),
    "lsun": ("lfm_fast.data.lmdb_store", "open_lsun", "holds_lsun"),
    "lmdb": ("lfm_fast.data.lmdb_store", "open_lmdb", "holds_lmdb"),
    "lmdb-raw": ("lfm_fast.data.lmdb_store", "open_raw_lmdb", None),
    "webdataset": ("lfm_fast.data.tar_store", "open_tars", "holds_tars"),
    "celebamask-hq": ("lfm_fast.data.mapped_sets", "CelebAMaskStore", "holds_celebamask"),
    "ade20k": ("lfm_fast.data.mapped_sets", "open_ade20k", "holds_ade20k"),
    "coco-stuff": ("lfm_fast.data.mapped_sets", "open_coco_stuff", "holds_coco_stuff"),
    "cifar10": ("lfm_fast.data.cifar", "CifarStore", "holds_cifar"),
    "imagenet": ("lfm_fast.data.imagenet", "ImageNetStore", "holds_imagenet"),
}
LAYOUTS = tuple(_LAYOUTS)
SPLITS = ("train", "held_out", "all")
FIRST_OF_LSUN = 120_000  # pictures, that latent flow matching's runs take of a scene
_LIST_SUFFIXES = (".txt", ".lst", ".list", ".tsv")


def open_store(path, layout: str = "auto", split: str = "train", compat: str | None = None) -> Store:
    """The pictures that lie at a path.

    Args:
        path: a folder or a file.
        layout: one of `LAYOUTS`, or "auto", what the path looks like (`layout_of`).
        split: "train", "held_out" or "all", where the layout has any.
        compat: "lfm" takes the first 120,000 pictures of LSUN.

    Raises:
        ValueError: an unknown name, or what lies there is not of this layout.
    """
    if layout != "auto" and layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is not known: choose 'auto' or one of {', '.join(LAYOUTS)}.")
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not known: choose one of {', '.join(SPLITS)}.")
    if compat not in (None, "lfm"):
        raise ValueError(f"compat={compat!r} is not known: choose 'lfm' or None.")
    layout = layout_of(path) if layout == "auto" else layout
    module, function, _ = _LAYOUTS[layout]
    try:
        store = getattr(import_module(module), function)(path, split)
    except OSError as error:
        raise ValueError(f"{path} cannot be read as {layout} ({error.strerror}: {error.filename}).") from error
    if layout == "lsun" and compat == "lfm":
        store.keep_first(FIRST_OF_LSUN)
    return store


def layout_of(path) -> str:
    """What a path looks like, by names of files and folders alone; "folder" where nothing speaks for anything else.

    Example:
        >>> layout_of("birds-{000..146}.tar"), layout_of("birds.txt"), layout_of("birds")
        ('webdataset', 'list', 'folder')
    """
    path = Path(path).expanduser()
    if path.suffix == ".tar":
        return "webdataset"
    if path.suffix in _LIST_SUFFIXES and not path.is_dir():
        return "list"
    try:
        names = first_names(path)
        for layout, (module, _, looks) in _LAYOUTS.items():
            if looks and path.exists() and getattr(import_module(module), looks)(path, names):
                return layout
    except OSError:  # a folder that may not be listed: who reads it says so
        pass
    return "folder"


def held_out_split(path) -> str:
    """The split to evaluate with: "held_out" where the data set says which pictures these are, else "train", all."""
    layout, names = layout_of(path), first_names(Path(path).expanduser())
    if layout == "lmdb":
        return "held_out" if "validation.lmdb" in names else "train"
    if layout == "webdataset":
        from lfm_fast.data.tar_store import names_hold_out

        return "held_out" if names_hold_out(names) else "train"
    return "train" if layout in ("folder", "list") else "held_out"


def palette_of(path, layout: str) -> str | None:
    """The palette of the label maps that come with images of this layout; None where none come."""
    layout = layout_of(path) if layout == "auto" else layout
    return layout if layout in ("celebamask-hq", "ade20k", "coco-stuff") else None
