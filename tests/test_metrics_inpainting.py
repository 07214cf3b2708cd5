"""Errors of painted holes, counted pixel by pixel in plain Python."""

import math

import numpy as np
import pytest
import torch

from lfm_fast.metrics.inpainting import filled_with_mean, hole_errors


@pytest.fixture
def case():
    generator = np.random.default_rng(0)
    images, truths = (torch.from_numpy(generator.uniform(size=(3, 3, 6, 5))) for _ in range(2))
    holes = torch.from_numpy(generator.uniform(size=(3, 6, 5)) < [[[0.5]], [[0.2]], [[0.8]]])
    return images, truths, holes


def by_hand(image, truth, hole):
    squares = [(image[c, i, j] - truth[c, i, j]) ** 2 for i, j in np.argwhere(hole) for c in range(3)]
    steps = {"painted": [], "true": []}
    for i, j in np.argwhere(hole):
        for k, m in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
            if 0 <= k < hole.shape[0] and 0 <= m < hole.shape[1] and not hole[k, m]:
                steps["painted"] += [abs(image[c, i, j] - truth[c, k, m]) for c in range(3)]
                steps["true"] += [abs(truth[c, i, j] - truth[c, k, m]) for c in range(3)]
    rmse = math.sqrt(np.mean(squares))
    return rmse, -20 * math.log10(rmse), np.mean(steps["painted"]), np.mean(steps["true"])


def test_as_counted_by_hand(case):
    errors = hole_errors(*case)
    expected = zip(*(by_hand(*(x.numpy() for x in each)) for each in zip(*case)))
    for found, values in zip((errors.rmse, errors.psnr, errors.seam, errors.seam_of_truth), expected):
        np.testing.assert_allclose(found.numpy(), values, rtol=1e-12)


def test_outside_the_hole_nothing_counts(case):
    images, truths, holes = case
    other = torch.where(holes[:, None], images, 1 - images)
    assert torch.equal(hole_errors(other, truths, holes).seam, hole_errors(*case).seam)
    assert torch.equal(hole_errors(other, truths, holes).rmse, hole_errors(*case).rmse)


def test_bytes_are_two_hundred_and_fifty_fifths(case):
    images, truths = ((255 * x).round().to(torch.uint8) for x in case[:2])
    expected = hole_errors(images.double() / 255, truths.double() / 255, case[2])
    assert torch.equal(hole_errors(images, truths, case[2]).rmse, expected.rmse)


def test_the_mean_colour_is_of_what_is_known(case):
    images, _, holes = case
    filled = filled_with_mean(images, holes)
    for image, result, hole in zip(images, filled, holes):
        colour = image[:, ~hole].mean(1)
        np.testing.assert_allclose(result[:, hole], colour[:, None].expand(-1, int(hole.sum())), rtol=1e-12)
        assert torch.equal(result[:, ~hole], image[:, ~hole])


@pytest.mark.parametrize("hole", [True, False])
def test_what_has_no_edge_is_refused(case, hole):
    with pytest.raises(ValueError, match="one hole or has none"):
        hole_errors(*case[:2], torch.full((3, 6, 5), hole))
    with pytest.raises(ValueError, match="do not go together"):
        hole_errors(*case[:2], torch.full((3, 5, 6), hole))
