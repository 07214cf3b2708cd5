import math

import pytest
import torch

from lfm_fast.models.box_encoder import BoxEncoder, check_boxes

SIZES = {"num_classes": 3, "max_boxes": 4, "context_dim": 10, "hidden_size": 12, "num_frequencies": 5}


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return BoxEncoder(**SIZES).double()


def layouts(count=3, rows=4):
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(count, rows, 2, 2, generator=generator, dtype=torch.float64).sort(dim=2).values
    classes = torch.randint(3, (count, rows, 1), generator=generator)
    return torch.cat([classes, corners.flatten(2)], dim=2)


def test_a_token_is_the_mlp_of_class_and_coordinate_waves(encoder):
    """Against the equation, number by number with Python's own sine and cosine."""
    label, *coordinates = [2, 0.1, 0.25, 0.7, 0.95]
    waves = []
    for c in coordinates:
        waves += [math.sin(2**k * math.pi * c) for k in range(5)] + [math.cos(2**k * math.pi * c) for k in range(5)]
    x = torch.cat([encoder.class_table.weight[label], torch.tensor(waves, dtype=torch.float64)])
    first, _, second = encoder.mlp
    h = first.weight @ x + first.bias
    expected = second.weight @ (h / (1 + torch.exp(-h))) + second.bias
    boxes = torch.tensor([[[label, *coordinates]]], dtype=torch.float64)
    torch.testing.assert_close(encoder(boxes)[0, 0], expected, rtol=1e-12, atol=1e-12)  # float64 in another order


def test_permuting_boxes_permutes_tokens(encoder):
    boxes = layouts()
    boxes[1, 2, 0] = -1
    order = torch.tensor([2, 0, 3, 1])
    tokens = encoder(boxes)
    torch.testing.assert_close(encoder(boxes[:, order]), tokens[:, order], rtol=1e-13, atol=1e-13)
    assert (tokens[:, order] - tokens).abs().max() > 0.1


def test_rows_without_a_box_are_one_learned_token_wherever_they_come_from(encoder):
    boxes = layouts(rows=2)
    padded = torch.cat([boxes, torch.tensor([-1, 0.3, 0.2, 0.1, float("nan")]).expand(3, 2, 5)], dim=1)
    tokens = encoder(boxes)
    assert tokens.shape == (3, 4, 10)
    assert torch.equal(tokens, encoder(padded))
    assert torch.equal(tokens[:, 2:], encoder.absent.expand(3, 2, 10))
    assert not torch.equal(tokens[:, 1], encoder.absent.expand(3, 10))


def test_each_weight_gets_its_gradient_and_the_absent_token_only_from_absent_rows(encoder):
    boxes = layouts()
    encoder(boxes).square().sum().backward()
    assert not encoder.absent.grad.any()
    assert all(p.grad.abs().max() > 0 for name, p in encoder.named_parameters() if name != "absent")
    boxes[0, 0, 0] = -1
    encoder(boxes).square().sum().backward()
    torch.testing.assert_close(encoder.absent.grad, 2 * encoder.absent.detach())


def test_samples_are_apart_and_the_batch_makes_no_difference(encoder):
    boxes = layouts()
    together = encoder(boxes)
    alone = torch.cat([encoder(boxes[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-13, atol=1e-13)


def test_bfloat16_weights_keep_the_places_in_float32():
    torch.manual_seed(0)
    encoder = BoxEncoder(**{**SIZES, "num_frequencies": 10})
    boxes = layouts().float()
    exact = encoder(boxes)
    low = encoder.to(torch.bfloat16)(boxes)
    assert low.dtype == torch.bfloat16
    # roundings to 2^-9 on the way, none of them of a coordinate: 2^9 pi 2^-9 would be half a wave
    torch.testing.assert_close(low.float(), exact, rtol=0.03, atol=0.02)


def test_it_compiles_to_one_graph_for_any_number_of_boxes(encoder):
    compiled = torch.compile(encoder, fullgraph=True, backend="eager", dynamic=True)
    for count, rows in ((3, 4), (2, 2), (1, 3)):
        boxes = layouts(count, rows)
        assert torch.equal(compiled(boxes), encoder(boxes))


def test_the_configuration_builds_it_again(encoder):
    again = BoxEncoder(**encoder.config).double()
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again(layouts()), encoder(layouts()))
    assert (encoder.kind, encoder.argument) == ("boxes", "context")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: b.select(1, 0)[:, :4], r"boxes are \(3, 4\).*expected floats \(B, N, 5\)"),
        (lambda b: b.long(), r"int64, expected floats"),
        (lambda b: b.tolist(), "boxes are a list"),
        (lambda b: b[:2], r"boxes are \(2, 4, 5\), expected \(3, N, 5\)"),
        (lambda b: b[0], r"boxes are \(4, 5\), expected \(3, N, 5\)"),
        (lambda b: b.repeat(1, 2, 1), "has 8 boxes, but the network was made for 4"),
        (lambda b: b.index_fill(2, torch.tensor([0]), 3), "box class 3 is not known: classes are 0 to 2"),
        (lambda b: b.index_fill(2, torch.tensor([0]), -2), "box class -2 is not known"),
        (lambda b: b.index_fill(2, torch.tensor([0]), 0.5), r"box class 0\.5 is not known"),
        (lambda b: b.index_fill(2, torch.tensor([0]), math.nan), "not finite"),
        (lambda b: b.index_fill(2, torch.tensor([4]), math.inf), "not finite"),
        (lambda b: b.index_fill(2, torch.tensor([4]), 1.01), r"leaves the image; coordinates go from 0 to 1"),
        (lambda b: b.index_fill(2, torch.tensor([1]), -0.01), "leaves the image"),
        (lambda b: b[..., [0, 3, 2, 1, 4]], "has no area.*x0 < x1"),
        (lambda b: b[..., [0, 1, 4, 3, 2]], "has no area"),
        (lambda b: b[..., [0, 1, 2, 1, 4]], "has no area"),
    ],
)
def test_what_are_no_boxes_gets_one_sentence(encoder, change, words):
    encoder.check(layouts(), 3)
    with pytest.raises(ValueError, match=words) as error:
        encoder.check(change(layouts()), 3)
    assert str(error.value).count(". ") == 0


def test_rows_without_a_box_may_hold_anything():
    check_boxes(torch.tensor([[-1, math.nan, 5, -3, 0]]), 2)


def test_planes_hold_the_classes_vectors_by_the_share_of_a_cell_that_is_covered():
    """Against the area of the intersection, cell by cell; tokens are as they are without planes."""
    torch.manual_seed(0)
    encoder = BoxEncoder(**SIZES, planes=5, side=6).double()
    boxes = layouts()
    boxes[1, 2, 0] = -1
    made = encoder(boxes)
    plain = BoxEncoder(**SIZES).double()
    plain.load_state_dict({k: v for k, v in encoder.state_dict().items() if k != "plane_table.weight"})
    assert torch.equal(made["context"], plain(boxes))
    expected = torch.zeros(3, 5, 6, 6, dtype=torch.float64)
    for sample, rows in enumerate(boxes.tolist()):
        for label, x0, y0, x1, y1 in rows:
            for row in range(6):
                for column in range(6):
                    width = max(0.0, min(x1, (column + 1) / 6) - max(x0, column / 6))
                    height = max(0.0, min(y1, (row + 1) / 6) - max(y0, row / 6))
                    if label >= 0:
                        expected[sample, :, row, column] += 36 * width * height * encoder.plane_table.weight[int(label)]
    torch.testing.assert_close(made["condition"], expected, rtol=1e-12, atol=1e-12)  # float64 in another order
    padded = torch.cat([boxes[:, :1], torch.tensor([-1, 0.3, 0.2, 0.1, float("nan")]).expand(3, 2, 5)], dim=1)
    assert torch.equal(encoder(padded)["condition"], encoder(boxes[:, :1])["condition"])
    again = BoxEncoder(**encoder.config).double()
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again(boxes)["condition"], made["condition"])


@pytest.mark.parametrize(("planes", "side"), [(0, 6), (5, 0), (-1, 6), (2.0, 6)])
def test_planes_have_a_number_and_a_side(planes, side):
    with pytest.raises(ValueError, match=r"(planes|side) must be a positive integer"):
        BoxEncoder(**SIZES, planes=planes, side=side)


@pytest.mark.parametrize("name", list(SIZES))
@pytest.mark.parametrize("value", [0, -1, 2.0, True])
def test_sizes_are_positive_integers(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a positive integer"):
        BoxEncoder(**{**SIZES, name: value})
