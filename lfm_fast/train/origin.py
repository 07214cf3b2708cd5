"""What a run learns from: kept in its checkpoints, since with other items its curve would go on as another one's."""


def origin_of(source) -> dict:
    """How many items a source of training has, which images they are of (names and labels in their order), and whose
    latents: None where the source does not say."""
    provenance = getattr(source, "provenance", None) or {}
    return {
        "items": int(source.num_items),
        "images": provenance.get("images_digest"),
        "autoencoder": provenance.get("fingerprint"),
    }


def require_one(origin: dict, config, world) -> None:
    """All ranks learn from the same items: a folder that changes while they start, or differs between machines, would
    give one number to two images. Raises ValueError on every rank."""
    first, *others = world.gather_objects(origin)
    for rank, other in enumerate(others, 1):
        if other != first:
            what = ", ".join(
                f"{name} {other[name]} and not {first[name]}" for name in first if other[name] != first[name]
            )
            raise ValueError(
                f"rank {rank} sees other data in {config.data} than rank 0 ({what}); give all ranks the same"
            )


def difference(before: dict, now: dict, config) -> str | None:
    """What makes `now` another origin than `before`, in words; None where nothing that both say differs."""
    changed = [name for name, value in before.items() if None not in (value, now.get(name)) and value != now[name]]
    if "items" in changed:
        return f"it learned from {before['items']} items, and {config.data} has {now['items']} now"
    if "images" in changed:
        return f"some of the {now['items']} items of {config.data} have other names or labels now"
    if "autoencoder" in changed:
        return f"the autoencoder {config.autoencoder} has other weights now"
    return None
