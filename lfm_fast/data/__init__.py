"""Images and latents to train on: the embedded set, pictures in any layout, and caches of encoded images."""

from lfm_fast.data.decoders import check_decoder
from lfm_fast.data.source import ImageSource, Report, check_num_classes

__all__ = ["ImageSource", "Report", "open_images"]


def open_images(
    source,
    image_size,
    *,
    layout="auto",
    split="train",
    flip=False,
    small="skip",
    check="decode",
    num_classes=None,
    compat=None,
    decoder="auto",
    device="cpu",
) -> ImageSource:
    """Open "embedded", "embedded-layouts" (scenes of it, with `.boxes`) or what lies at a path as an `ImageSource`.

    Args:
        source: "embedded", "embedded-layouts", or the path of a folder or file of a known layout.
        image_size: side in pixels of the square pictures.
        layout: how pictures lie there: "folder" (class = sub-folder, in order of name), "lmdb", "webdataset" or another
            of `lfm_fast.data.opening.LAYOUTS`; "auto" looks.
        split: "train", "held_out" or "all" of a set that has these; what has none is used whole ("train" or "all").
        flip: allow mirrored pictures as augmentation.
        small: images smaller than image_size: "skip" (named in `.report`), "upscale" or "error".
        check: of files, "decode" (every one once, remembered) or "headers" (sizes alone: for millions of files).
        num_classes: if given, refuse labels that do not fit.
        compat: "lfm" takes the first 120,000 pictures of LSUN.
        decoder: of files, "auto", "pil" or "dali" (`lfm_fast.data.decoders.decoder_named`).
        device: where batches are wanted, "cpu" or a CUDA device; only DALI decodes there, others leave them on the CPU.

    Raises:
        ValueError: one sentence, before any image is handed out.

    Example:
        >>> images = open_images("embedded", 32, split="held_out")
        >>> images.batch([0, 1]).shape
        torch.Size([2, 3, 32, 32])
    """
    if isinstance(image_size, bool) or int(image_size) != image_size or image_size < 1:
        raise ValueError(f"image_size={image_size!r} must be a whole number of pixels, at least 1.")
    if source in ("embedded", "embedded-layouts") and layout != "auto":
        raise ValueError(f"layout={layout!r}, but {source!r} is a set of its own: leave layout (--from) out.")
    check_decoder(decoder)
    if source == "embedded":
        from lfm_fast.data.embedded import EmbeddedImages

        images = EmbeddedImages(image_size, split=split, flip=flip)
    elif source == "embedded-layouts":
        from lfm_fast.data.layouts import EmbeddedLayouts

        images = EmbeddedLayouts(image_size, split=split, flip=flip)
    else:
        from lfm_fast.data.opening import open_store
        from lfm_fast.data.stored import StoredImages

        store = open_store(source, layout, split, compat)
        choices = {"flip": flip, "small": small, "check": check, "decoder": decoder, "device": device}
        images = StoredImages(store, int(image_size), **choices)
    if num_classes is not None:
        check_num_classes(images, num_classes)
    return images
