"""Class names and colours of label maps: the published tables as facts, and the embedded set's own."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Palette:
    """The classes of a kind of label map; a class's id is its place in `classes`.

    Attributes:
        name: what `get_palette` knows it by.
        classes: K names.
        colours: K (red, green, blue) triples that a map is drawn in.
        stored: the value that stands for each id in published PNG files, K numbers.
        mirrored: the id that each id becomes when the picture is mirrored, K numbers: left and right change places.
        appearance: the colour that pixels of each class have in the pictures themselves, K triples; None where a class
            has no colour of its own, as in photographs.
        source: where names and colours come from.
    """

    name: str
    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    source: str
    stored: tuple[int, ...] = ()
    mirrored: tuple[int, ...] = ()
    appearance: tuple[tuple[int, int, int], ...] | None = None

    def __post_init__(self):
        count = len(self.classes)
        for field in ("stored", "mirrored"):
            object.__setattr__(self, field, getattr(self, field) or tuple(range(count)))
        assert len(self.colours) == len(self.stored) == count
        assert sorted(self.mirrored) == list(range(count))

    def __len__(self):
        return len(self.classes)

    def table(self) -> torch.Tensor:
        """The colours as (K, 3) uint8."""
        return torch.tensor(self.colours, dtype=torch.uint8)

    def mirror(self, label_map) -> torch.Tensor:
        """(..., H, W) ids of the mirrored picture: flipped, and left and right parts renamed."""
        return torch.tensor(self.mirrored)[label_map.long()].flip(-1)


def get_palette(name) -> Palette:
    """The palette of a name; a `Palette` is given back as it is.

    Raises:
        ValueError: the name is unknown.

    Example:
        >>> get_palette("celebamask-hq").classes[13]
        'hair'
        >>> len(get_palette("ade20k")), len(get_palette("coco-stuff"))
        (151, 183)
    """
    if isinstance(name, Palette):
        return name
    if name not in PALETTES:
        raise ValueError(f"palette is {name!r}; there is {', '.join(PALETTES)}.")
    return PALETTES[name]


def bit_colours(count: int) -> tuple[tuple[int, int, int], ...]:
    """The colour map of PASCAL VOC: bits 0, 3, 6, ... of the id from the top of red down, the next ones green, blue.

    Example:
        >>> bit_colours(5)
        ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128))
    """
    return tuple(
        tuple(sum((k >> (3 * i + c) & 1) << (7 - i) for i in range(8)) for c in range(3)) for k in range(count)
    )


def _colours(text: str) -> tuple[tuple[int, int, int], ...]:
    return tuple(tuple(bytes.fromhex(word)) for word in text.split())


def _names(text: str) -> tuple[str, ...]:
    return tuple(" ".join(name.split()) for name in text.split(","))


# --- CelebAMask-HQ (arXiv 1907.11922): ids and colours as its authors list and draw them. l_ and r_ are left and right,
# except in u_lip and l_lip, upper and lower; eye_g is eyeglasses, ear_r an earring, neck_l a necklace
_CELEBA_CLASSES = _names(
    """background, skin, nose, eye_g, l_eye, r_eye, l_brow, r_brow, l_ear, r_ear, mouth, u_lip, l_lip, hair, hat,
    ear_r, neck_l, neck, cloth"""
)
_CELEBA_COLOURS = _colours(
    """000000 cc0000 4c9900 cccc00 3333ff cc00cc 00ffff ffcccc 663300 ff0000 66cc00 ffff00 000099 0000cc ff3399 00cccc
    003300 ff9933 00cc00"""
)

# --- ADE20K, the 150 classes of the scene parsing benchmark (arXiv 1608.05442); in its files 0 is everything else.
# Names and colours as MMSegmentation documents them; road and skyscraper share one colour there
_ADE_CLASSES = _names(
    """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door,
    table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field,
    armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard,
    chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway,
    case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower,
    book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine,
    hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane,
    dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship,
    fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag,
    minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher,
    screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate,
    monitor, bulletin board, shower, radiator, glass, clock, flag"""
)
_ADE_COLOURS = _colours(
    """787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d 787846 08ff33 ff0652
    8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0 0907e6 dcdcdc ff095c 7009ff 08ffd6 07ffe0
    ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff eb0cff a09614 00a3ff
    8c8c8c fa0a0f 14ff00 1fff00 ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff 0bc8c8 ff5200 00fff5 003dff
    00ff70 00ff85 ff0000 ffa300 ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad 0a00ff adff00 00ff99 ff5c00 ff00ff
    ff00f5 ff0066 ffad00 ff0014 ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2 00ff52 000aff 0070ff 3300ff 00c2ff 007aff
    00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00 08b8aa 8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070
    5cff00 00e0ff 70e0ff 46b8a0 a300ff 9900ff 47ff00 ff00a3 ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500
    0abed4 d6ff00 00ccff 1400ff ffff00 0099ff 0029ff 00ffcc 2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8 005cff
    b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff"""
)

# --- COCO-Stuff (arXiv 1612.03716): the ids of its label list, of which 11 things are never annotated. Its pixel maps
# hold id - 1, and 255 for unlabelled. The list has no colours, so here they are PASCAL VOC's
_COCO_CLASSES = _names(
    """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, street sign,
    stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, hat,
    backpack, umbrella, shoe, eye glasses, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite,
    baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, plate, wine glass, cup, fork, knife,
    spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch,
    potted plant, bed, mirror, dining table, window, desk, toilet, door, tv, laptop, mouse, remote, keyboard, cell
    phone, microwave, oven, toaster, sink, refrigerator, blender, book, clock, vase, scissors, teddy bear, hair
    drier, toothbrush, hair brush, banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard,
    carpet, ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt,
    door-stuff, fence, floor-marble, floor-other, floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit,
    furniture-other, grass, gravel, ground-other, hill, house, leaves, light, mat, metal, mirror-stuff, moss,
    mountain, mud, napkin, net, paper, pavement, pillow, plant-other, plastic, platform, playingfield, railing,
    railroad, river, road, rock, roof, rug, salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other,
    stairs, stone, straw, structural-other, table, tent, textile-other, towel, tree, vegetable, wall-brick,
    wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind,
    window-other, wood"""
)

# --- OpenMoji's published colours, and the navy blue of its flags, the one more that covers over 2 % of the drawn set
_EMOJI_CLASSES = _names(
    """black, white, blue, blue shadow, red, red shadow, green, green shadow, yellow, yellow shadow, light grey, grey,
    dark grey, orange, orange shadow, pink, pink shadow, purple, purple shadow, brown, brown shadow, navy blue"""
)
_EMOJI_COLOURS = _colours(
    """000000 ffffff 92d3f5 61b2e4 ea5a47 d22f27 b1cc33 5c9e31 fcea2b f1b31c d0cfce 9b9b9a 3f3f3f f4aa41 e27022 ffa7c0
    e67a94 b399c8 8967aa a57939 6a462f 1e50a0"""
)

PALETTES = {
    palette.name: palette
    for palette in (
        Palette(
            "embedded",
            ("background", *_EMOJI_CLASSES),
            ((224, 240, 230), *_EMOJI_COLOURS),  # a tint that OpenMoji does not use: opaque white is another class
            "OpenMoji's colour palette",
            appearance=((255, 255, 255), *_EMOJI_COLOURS),
        ),
        Palette(
            "celebamask-hq",
            _CELEBA_CLASSES,
            _CELEBA_COLOURS,
            "CelebAMask-HQ, arXiv 1907.11922",
            mirrored=(0, 1, 2, 3, 5, 4, 7, 6, 9, 8, *range(10, 19)),
        ),
        Palette(
            "ade20k",
            ("unlabelled", *_ADE_CLASSES),
            ((0, 0, 0), *_ADE_COLOURS),
            "ADE20K's 150 classes, arXiv 1608.05442, in the colours that MMSegmentation documents",
        ),
        Palette(
            "coco-stuff",
            ("unlabelled", *_COCO_CLASSES),
            bit_colours(183),
            "COCO-Stuff's label list, arXiv 1612.03716, in PASCAL VOC's colour map",
            stored=(255, *range(182)),
        ),
    )
}
