"""The sampling form of a DiT: the plain forward's velocities, from a table of bounded size."""

import copy

import pytest
import torch
from test_dit import counting_backend, inputs, small_dit

from lfm_fast import ops
from lfm_fast.models import DiT

TIMES = torch.tensor([1.0, 0.77, 0.5, 0.031, 0.0], dtype=torch.float64)
LABELS = torch.tensor([3, 0, 3, 5])  # 5 is the null label


def deviation(found, expected):
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def largest_deviation(model, dtype):
    """Of the sampling form from the plain forward over all TIMES, relative."""
    _, z, _ = inputs(len(LABELS))
    times, z = TIMES.to(dtype), z.to(dtype)
    prepared = model.prepare(times, LABELS)
    return max(deviation(prepared(k, z, LABELS), model(time, z, LABELS)) for k, time in enumerate(times))


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "cpp"])  # cpp where there is a compiled library
def test_velocities_are_the_plain_forwards(backend):
    with ops.use_backend(backend):
        # the matrix products of the table have other shapes and may sum in another order: some roundings of 2^-53 ...
        assert largest_deviation(small_dit().double(), torch.float64) < 1e-12
        assert largest_deviation(small_dit(), torch.float32) < 1e-5  # ... of 2^-24, measured 1e-6 ...
        # ... or of 2^-8 where a sum then rounds to the other bfloat16 (measured 0): as test_dtypes allows bfloat16
        assert largest_deviation(small_dit().bfloat16(), torch.float32) < 4e-2
        with torch.autocast("cpu", torch.bfloat16):
            assert largest_deviation(small_dit(), torch.float32) < 4e-2


@torch.no_grad()
def test_bfloat16_is_no_further_from_float64_than_the_plain_forward():
    exact, low = small_dit().double(), small_dit().bfloat16()
    _, z, _ = inputs(len(LABELS))
    errors = []
    for velocity in (low.prepare(TIMES.float(), LABELS), lambda k, z, y: low(TIMES[k].float(), z, y)):
        errors.append(deviation(velocity(1, z, LABELS), exact(TIMES[1], z.double(), LABELS)))
    assert errors[0] < 1.5 * errors[1]  # two draws of the same rounding


@torch.no_grad()
def test_rows_of_one_sample_share_its_patches():
    model, (_, z, _) = small_dit().double(), inputs(3)
    samples, y = torch.tensor([0, 1, 2, 2, 0]), torch.tensor([4, 1, 2, 5, 5])
    embedded = []
    model.x_embedder.register_forward_hook(lambda _, arguments, x: embedded.append(len(x)))
    found = model.prepare(TIMES, y)(2, z.double(), y, samples)
    expected = model(TIMES[2], z.double()[samples], y)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert embedded == [3, 5]


@torch.no_grad()
def test_calls_without_labels():
    model, (_, z, _) = small_dit().double(), inputs(4)
    z = z.double()
    labelled = model.prepare(TIMES, LABELS[:3], unlabelled=True)
    for prepared in (model.prepare(TIMES), labelled):
        torch.testing.assert_close(prepared(1, z), model(TIMES[1], z), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(labelled(1, z[:3], LABELS[:3].int()), model(TIMES[1], z[:3], LABELS[:3]))


def adaln_rows(model):
    """The rows of each call of the last block's adaLN layer, from now on."""
    rows = []
    model.blocks[-1].adaLN_modulation[1].register_forward_hook(lambda _, arguments, result: rows.append(len(result)))
    return rows


@torch.no_grad()
def test_one_matrix_product_for_all_times_and_distinct_labels():
    model, (_, z, _) = small_dit(), inputs(4)
    rows, prepared = adaln_rows(model), model.prepare(TIMES.float(), LABELS)
    for k in (0, 1, 1, 2, 3, 4, 0):
        prepared(k, z, LABELS)
    assert rows == [5 * 3]  # five times, the labels 0, 3 and 5


@torch.no_grad()
def test_a_long_table_is_made_piece_by_piece():
    model, (_, z, _) = small_dit().double(), inputs(4)
    one_time = 2 * 3 * 3 * 6 * 24 * 8  # twice: parts, labels, shift to gate, hidden size, float64
    for max_bytes, pieces in [(2 * one_time + 1, [6, 6, 3]), (1, [3] * 5), (5 * one_time, [15])]:
        prepared = model.prepare(TIMES, LABELS, max_bytes=max_bytes)
        rows = adaln_rows(model)
        for k in (0, 1, 1, 2, 3, 3, 4):
            torch.testing.assert_close(
                prepared(k, z.double(), LABELS), model(TIMES[k], z.double(), LABELS), rtol=1e-12, atol=1e-12
            )
            assert 2 * prepared.table.nbytes <= max(max_bytes, one_time)
        assert [count for count in rows if count != 4] == pieces  # the plain forward has 4 rows
        # back again: a time that is gone is computed anew
        assert deviation(prepared(0, z.double(), LABELS), model(TIMES[0], z.double(), LABELS)) < 1e-12


def test_the_gradient_of_the_latents_is_the_plain_forwards():
    model, (_, z, y) = small_dit().double(), inputs()
    z = z.double().requires_grad_()
    gradients = [
        torch.autograd.grad(velocity.sin().sum(), z)[0]
        for velocity in (model.prepare(TIMES, y)(2, z, y), model(TIMES[2], z, y))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_compiled_blocks_and_trunk_take_the_table_as_the_models_own():
    torch._dynamo.reset()
    model, (_, z, y), graphs = small_dit(), inputs(), []
    expected, backend = model(TIMES[1].float(), z, y), counting_backend(graphs)
    for block in model.blocks:
        block.compile(fullgraph=True, backend=backend)
    torch.testing.assert_close(model(TIMES[1].float(), z, y), expected)
    torch.testing.assert_close(model.prepare(TIMES.float(), y)(1, z, y), expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
    model = small_dit()
    model.trunk = torch.compile(model.trunk, fullgraph=True, backend=backend)
    for velocity in (model.prepare(TIMES.float(), y)(1, z, y), model(TIMES[1].float(), z, y)):
        torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 2


class Halved(DiT):
    def forward(self, t, z, y=None):
        return super().forward(t, z, y) / 2


class OtherTimes(DiT):
    def velocity(self, t, z, y):
        return super().velocity(1 - t, z, y)


def test_whatever_a_call_does_beside_the_network_keeps_it_from_being_prepared():
    model = small_dit()
    assert model.prepares
    assert copy.deepcopy(model).bfloat16().prepares
    for other in (Halved, OtherTimes):
        assert not other(image_size=8, hidden_size=32, depth=1, num_heads=2).prepares
    for change in (
        lambda m: m.register_forward_hook(lambda *_: None),
        lambda m: m.register_forward_pre_hook(lambda *_: None),
        lambda m: m.compile(),
        lambda m: setattr(m, "forward", lambda t, z, y=None: z),
        lambda m: setattr(m, "velocity", lambda t, z, y: z),
    ):
        changed = copy.deepcopy(model)
        change(changed)
        assert not changed.prepares


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"times": torch.zeros(2, 1)}, r"times must be floating and \(N,\).*torch.float32 \(2, 1\)"),
        ({"times": torch.zeros(0)}, "times must be"),
        ({"times": torch.arange(3)}, "torch.int64"),
        ({"y": torch.tensor([1, 6])}, "0..5, but y holds 6"),
        ({"y": torch.tensor([[1]])}, r"integer labels of shape \(1,\)"),
        ({"y": torch.tensor([0.5])}, "integer labels"),
        ({"max_bytes": 0}, "max_bytes must be a positive integer, but is 0"),
        ({"max_bytes": 1e9}, "max_bytes must be a positive integer"),
    ],
)
def test_wrong_arguments_get_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        small_dit().prepare(**{"times": TIMES, "y": LABELS, **arguments})


def test_wrong_calls_get_a_sentence_before_any_work():
    model, (_, z, y) = small_dit(), inputs()
    prepared = model.prepare(TIMES.float(), torch.tensor([1, 2]))
    model.trunk = model.tokens = None  # work would fail another way
    for arguments, sentence in [
        ((5, z, y), "k is 5, but 5 times were prepared: give 0 to 4"),
        ((-1, z, y), "k is -1"),
        ((0, z, y), "the label 0 was not prepared"),
        ((0, z), "the label 5 was not prepared"),
        ((0, z, y + 4), "0..5, but y holds 6"),
        ((0, z, y[:2]), r"labels of shape \(3,\)"),
        ((0, z, y, torch.tensor([0, 1])), r"labels of shape \(2,\)"),
        ((0, z[:, :2], y), r"shape \(B, 3, 6, 6\)"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            prepared(*arguments)
