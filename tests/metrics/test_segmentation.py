import math

import pytest
import torch

from lfm_fast.data.palettes import get_palette
from lfm_fast.metrics.segmentation import compare, map_agreement, segment, tellable


def random_ids(shape, num_classes, seed):
    return torch.randint(num_classes, shape, generator=torch.Generator().manual_seed(seed))


def test_by_hand():
    predicted = torch.tensor([[[0, 0, 1, 2]], [[2, 2, 0, 0]]])
    expected = torch.tensor([[[0, 1, 1, 1]], [[2, 2, 2, 0]]])
    scores = compare(predicted, expected, 4)
    # class 0: in both 2, in either 4; class 1: 1 of 3; class 2: 2 of 4; class 3 nowhere
    assert scores.iou[:3].tolist() == pytest.approx([0.5, 1 / 3, 0.5])
    assert math.isnan(scores.iou[3])
    assert scores.mean_iou == pytest.approx(4 / 9)
    assert scores.accuracy == 5 / 8


@pytest.mark.parametrize("num_classes", [2, 23])
def test_against_torchmetrics(num_classes):
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    predicted, expected = (random_ids((3, 17, 9), num_classes, seed) for seed in (0, 1))
    expected = torch.where(random_ids((3, 17, 9), 2, 2) == 0, predicted, expected)
    scores = compare(predicted, expected, num_classes)
    each = MulticlassJaccardIndex(num_classes, average="none")(predicted, expected)
    torch.testing.assert_close(scores.iou.float(), each, rtol=1e-6, atol=0)  # theirs is float32
    assert scores.mean_iou == pytest.approx(float(MulticlassJaccardIndex(num_classes)(predicted, expected)), rel=1e-6)
    accuracy = MulticlassAccuracy(num_classes, average="micro")(predicted, expected)
    assert scores.accuracy == pytest.approx(float(accuracy), rel=1e-6)


def test_a_class_that_is_in_neither_does_not_count_and_one_in_either_does():
    from torchmetrics.classification import MulticlassJaccardIndex

    predicted, expected = torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, 1]])
    scores = compare(predicted, expected, 5)
    assert scores.mean_iou == pytest.approx(float(MulticlassJaccardIndex(5)(predicted, expected)), rel=1e-6)
    invented = compare(torch.tensor([[0, 2, 1]]), torch.tensor([[0, 0, 1]]), 5)
    assert invented.mean_iou == pytest.approx((0.5 + 1 + 0) / 3)


def test_pictures_in_palette_colours_are_segmented_exactly():
    palette = get_palette("embedded")
    ids = random_ids((2, 13, 11), len(palette), 0)
    pictures = torch.tensor(palette.appearance, dtype=torch.uint8)[ids].movedim(-1, 1)
    assert torch.equal(segment(pictures), tellable(ids))
    assert torch.equal(segment(pictures.float() / 255), tellable(ids))
    scores = map_agreement(pictures, ids)
    assert (scores.mean_iou, scores.accuracy) == (1.0, 1.0)
    assert map_agreement(pictures.roll(1, 0), ids).mean_iou < 0.1  # 22 colours at random: about 1/43


def test_bad_input():
    with pytest.raises(ValueError, match=r"classes of ade20k have no colour of their own"):
        segment(torch.zeros(1, 3, 2, 2), "ade20k")
    with pytest.raises(ValueError, match=r"shape \(3, 2, 2\); expected \(N, 3, H, W\)"):
        segment(torch.zeros(3, 2, 2))
    with pytest.raises(ValueError, match="the id 23 at row 0, column 1"):
        tellable(torch.tensor([[0, 23]]))
    with pytest.raises(ValueError, match=r"have shape \(1, 2, 2\) and label maps \(1, 2, 3\)"):
        map_agreement(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="ids range from 0 to 4; expected 0 to 3"):
        compare(torch.tensor([[4]]), torch.tensor([[0]]), 4)
