import pytest
import torch

from lfm_fast.metrics.layout import ClassExamples, layout_agreement

COLOURS = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.1, 0.9], [0.2, 0.2, 0.2]])


def scenes(count, seed=0, canvas=0.95):
    """Pictures of two filled boxes each in their classes' colours, at whole pixels of 32, and their boxes."""
    generator = torch.Generator().manual_seed(seed)
    images, boxes = torch.full((count, 3, 32, 32), canvas), torch.full((count, 3, 5), -1.0)
    for i in range(count):
        for k in range(2):
            label = int(torch.randint(3, (), generator=generator))
            x, y = (
                16 * k + int(torch.randint(4, (), generator=generator)),
                int(torch.randint(20, (), generator=generator)),
            )
            images[i, :, y : y + 10, x : x + 10] = COLOURS[label][:, None, None]
            boxes[i, k] = torch.tensor([label, x / 32, y / 32, (x + 10) / 32, (y + 10) / 32])
    return images, boxes


def test_pictures_of_their_layouts_agree_in_everything():
    images, boxes = scenes(20)
    agreement = layout_agreement(images, boxes, ClassExamples.of(*scenes(20, seed=1, canvas=1.0)))
    assert (agreement.inside, agreement.filled, agreement.classes, agreement.boxes) == (1.0, 1.0, 1.0, 40)


def test_pictures_of_other_layouts_do_not():
    images, boxes = scenes(200)
    examples = ClassExamples.of(*scenes(20, seed=1))
    agreement = layout_agreement(images, boxes.roll(1, 0), examples)
    assert agreement.inside < 0.7
    assert agreement.filled < 0.7
    assert agreement.classes < 0.5
    # the places alone, with other classes in them: 1/3 of 400 boxes within 3 sigma
    relabelled = boxes.clone()
    relabelled[..., 0] = torch.where(boxes[..., 0] >= 0, boxes.roll(1, 0)[..., 0], boxes[..., 0])
    agreement = layout_agreement(images, relabelled, examples)
    assert (agreement.inside, agreement.filled) == (1.0, 1.0)
    assert agreement.classes == pytest.approx(1 / 3, abs=0.08)


def test_shares_are_of_pixels_and_boxes():
    images = torch.ones(1, 3, 16, 16)
    images[:, 0, 0:4, 0:4] = 0.5  # 16 pixels of ink, 8 of them in the first box
    images[:, 1, 12:14, 12:16] = 0.5  # 8 pixels, all in the second
    images[:, 2, 8, 8] = 0.95  # no ink
    boxes = torch.tensor([[[0, 0, 0, 0.25, 0.125], [0, 0.75, 0.75, 1, 1], [-1, 0, 0, 1, 1]]])
    agreement = layout_agreement(images, boxes)
    assert agreement.inside == pytest.approx((8 + 8) / 24)
    assert agreement.filled == pytest.approx((8 / 8 + 8 / 16) / 2)
    assert agreement.classes is None
    assert agreement.boxes == 2


def test_an_empty_picture_has_no_ink_in_any_box():
    agreement = layout_agreement(torch.ones(1, 3, 8, 8), torch.tensor([[[0, 0, 0, 1, 1.0]]]))
    assert (agreement.inside, agreement.filled) == (0.0, 0.0)


def test_a_box_thinner_than_a_pixel_is_one():
    images = torch.ones(1, 3, 8, 8)
    images[:, :, 7, 7] = 0
    agreement = layout_agreement(images, torch.tensor([[[0, 0.99, 0.99, 1, 1.0]]]))
    assert (agreement.inside, agreement.filled) == (1.0, 1.0)


def test_most_of_five_neighbours_decide():
    crops = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 5.0]).view(6, 1, 1, 1).expand(6, 3, 8, 8)
    examples = ClassExamples(crops, torch.tensor([2, 0, 2, 0, 0, 1]))
    assert examples.nearest_class(crops[:1]).tolist() == [0]  # nearest is a 2, three of five are 0
    tied = ClassExamples(crops[:4], torch.tensor([2, 1, 2, 1]))
    assert tied.nearest_class(crops[:1]).tolist() == [1]


@pytest.mark.parametrize(
    ("images", "boxes", "words"),
    [
        (torch.ones(2, 1, 8, 8), torch.zeros(2, 1, 5), r"images are \(2, 1, 8, 8\)"),
        (torch.ones(2, 3, 8, 8).byte(), torch.zeros(2, 1, 5), "uint8, expected floats"),
        (torch.ones(2, 3, 8, 8), torch.zeros(3, 1, 5), r"expected \(2, N, 5\)"),
        (torch.ones(2, 3, 8, 8), torch.full((2, 1, 5), -1.0), "no box in any"),
    ],
)
def test_bad_input_gets_a_sentence(images, boxes, words):
    with pytest.raises(ValueError, match=words):
        layout_agreement(images, boxes)
