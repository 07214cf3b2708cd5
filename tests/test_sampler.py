"""lfm_fast.Sampler: the results of lfm_fast.sample for batch after batch."""

import itertools

import pytest
import torch

import lfm_fast
from lfm_fast import guidance, ops
from lfm_fast.sampler import Sampler

CLASSES, NULL, SHAPE = 5, 5, (4, 4, 8, 8)
METHODS = ["euler", "heun", "rk4", "ab3", "abm5", "dpmpp_2m", "unipc", "euler_maruyama", "sde_heun"]


def dit(**settings):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    sizes = {"image_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2}
    model = lfm_fast.DiT(**sizes, num_classes=CLASSES, label_dropout=0.1, **settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def batches(count=4, dtype=torch.float32):
    """Noise, labels and sample numbers, other ones each time."""
    generator = torch.Generator().manual_seed(3)
    for seed in range(count):
        y = torch.randint(CLASSES, (SHAPE[0],), generator=generator)
        numbers = torch.randint(100, (SHAPE[0],), generator=generator)
        yield lfm_fast.noise(SHAPE[0], SHAPE[1:], seed=seed, dtype=dtype), y, numbers


def one_label_more(t, z, y=None):
    """A field that costs nothing and keeps samples apart to the bit."""
    shift = 0.5 if y is None else y.to(z.dtype).view(-1, 1, 1, 1) / 3
    return torch.sin(z + t.view(-1, 1, 1, 1)) + shift


@pytest.mark.parametrize("method", METHODS)
def test_every_batch_is_that_of_sample_to_the_bit(method):
    settings = {"null_label": NULL, "method": method, "num_steps": 4, "guidance_interval": (0.2, 0.9)}
    model = dit()
    sampler = Sampler(model, SHAPE, guidance_scale=2.0, **settings)
    scales = (None, 3.0, torch.tensor([1.0, 2.0, 0.5, 1.0]), ((0.2, 1.0), (0.8, 4.0)))
    for (z1, y, numbers), scale in zip(batches(), scales, strict=True):
        for labels in (y, None):
            scale_now = 1.0 if labels is None else scale
            found = sampler(z1, labels, guidance_scale=scale_now, indices=numbers, seed=7)
            scale_now = 2.0 if scale_now is None else scale_now
            expected = lfm_fast.sample(
                model, z1, y=labels, guidance_scale=scale_now, indices=numbers, seed=7, **settings
            )
            assert torch.equal(found, expected)
            assert found.data_ptr() != z1.data_ptr()


GUIDANCES = {
    "rescale": lambda: guidance.Rescale(3.0, factor=0.6),
    "zero-star": lambda: guidance.CFGZeroStar(2.0, zero_steps=1),
    "apg": lambda: guidance.APG(3.0, norm_threshold=2.0, momentum=-0.5),
    "auto": lambda: guidance.Autoguidance(dit(qk_norm=True), 2.0, interval=(0.1, 0.8)),
    "linear": lambda: guidance.LinearGuidance(torch.tensor([1.0, 1.5, 2.0, 3.0]), joint=False),
}


@pytest.mark.parametrize("name", GUIDANCES)
def test_guidance_begins_anew_with_every_batch(name):
    model, settings = dit(), {"null_label": NULL, "method": "heun", "num_steps": 4, "guidance": GUIDANCES[name]()}
    sampler = Sampler(model, SHAPE, **settings)
    for z1, y, _ in batches(3):
        assert torch.equal(sampler(z1, y), lfm_fast.sample(model, z1, y=y, **settings))


def test_sizes_types_and_modes_may_change_between_batches():
    model, settings = dit(), {"null_label": NULL, "method": "heun", "num_steps": 3}
    sampler, made = Sampler(model, SHAPE, guidance_scale=2.0, **settings), []
    for (z1, y, _), count, dtype in zip(
        batches(6), (4, 2, 4, 1, 3, 4), itertools.cycle([torch.float32, torch.bfloat16])
    ):
        z1, y = z1[:count].to(dtype), y[:count].to(torch.int32 if count == 2 else torch.int64)
        expected = lfm_fast.sample(model, z1, y=y, guidance_scale=2.0, **settings)
        assert torch.equal(sampler(z1, y), expected)
        with torch.inference_mode():
            assert torch.equal(sampler(z1.clone(), y.clone()), expected)
        made.append(sampler(z1, y))
        assert torch.equal(made[-1], expected)
    assert len(sampler._loops) == 4  # of six kinds


def modulations_of(model):
    """Counts the rows of each product that makes modulations."""
    rows = []
    model.final_layer.adaLN_modulation[1].register_forward_hook(lambda _, given, made: rows.append(len(made)))
    return rows


def test_the_sampling_form_is_made_once_for_the_same_labels():
    model = dit()
    rows = modulations_of(model)
    sampler = Sampler(model, SHAPE, null_label=NULL, guidance_scale=2.0, method="heun", num_steps=4)
    for y in ([0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 2, 3], [4, 4, 4, 4], [4, 4, 4, 4]):
        sampler(lfm_fast.noise(4, SHAPE[1:]), torch.tensor(y))
    assert rows == [5 * 5, 5 * 2]  # times and labels, the null label among them


def test_what_is_kept_is_of_the_weights_as_they_are():
    model, (z1, y, _) = dit(), next(batches())
    settings = {"null_label": NULL, "method": "heun", "num_steps": 3, "guidance_scale": 2.0}
    sampler = Sampler(model, SHAPE, **settings)
    before = sampler(z1, y)
    with torch.no_grad():
        model.blocks[0].adaLN_modulation[1].weight.mul_(1.5)
    after = sampler(z1, y)
    assert not torch.equal(before, after)
    assert torch.equal(after, lfm_fast.sample(model, z1, y=y, **settings))
    with torch.autocast("cpu", torch.bfloat16):
        low = sampler(z1, y)
        assert torch.equal(low, lfm_fast.sample(model, z1, y=y, **settings))
    assert not torch.equal(low, after)
    with ops.use_backend("reference"):
        assert torch.equal(sampler(z1, y), lfm_fast.sample(model, z1, y=y, **settings))
    model.load_state_dict(dit().state_dict())
    assert torch.equal(sampler(z1, y), before)
    model.double()
    assert torch.equal(sampler(z1.double(), y), lfm_fast.sample(model, z1.double(), y=y, **settings))
    model.register_forward_hook(lambda module, given, v: 2 * v)  # the sampling form would go round it
    assert torch.equal(sampler(z1.double(), y), lfm_fast.sample(model, z1.double(), y=y, **settings))


class Conditioned(torch.nn.Module):
    """A model with an argument of one entry per sample."""

    sample_arguments = ("condition",)

    def forward(self, t, z, y=None, condition=None, push=0.0):
        return one_label_more(t, z, y) + (0.0 if condition is None else condition) + push


def test_entries_come_with_the_batch_and_other_arguments_with_the_sampler():
    model, settings = Conditioned(), {"method": "heun", "num_steps": 4, "null_label": 2}
    sampler = Sampler(model, SHAPE, guidance_scale=2.0, model_kwargs={"push": 0.25}, **settings)
    for z1, y, numbers in batches():
        condition = numbers.float().view(-1, 1, 1, 1) / 50
        expected = lfm_fast.sample(
            model, z1, y=y, guidance_scale=2.0, model_kwargs={"condition": condition, "push": 0.25}, **settings
        )
        assert torch.equal(sampler(z1, y, condition=condition), expected)


REFUSED = [
    ({"method": "dopri5"}, {}, "method dopri5 finds its steps as it goes; a Sampler takes euler, midpoint, heun"),
    ({"method": "torchdiffeq:rk4"}, {}, "method torchdiffeq:rk4 finds its steps as it goes"),
    ({"callback": print}, {}, "callback: a Sampler runs all steps at once; use lfm_fast.sample"),
    ({"trajectory": True, "progress": True}, {}, "trajectory, progress: a Sampler runs all steps at once"),
    ({"num_steps": 0}, {}, "num_steps is 0"),
    ({"null_label": -1}, {}, "null_label is -1"),
    ({"guidance_scale": "strong"}, {}, "guidance_scale is 'strong'"),
    ({"cuda_graph": True, "guidance": lfm_fast.approximations.Reuse()}, {}, "guidance by Reuse cannot be recorded"),
    ({"cuda_graph": True}, {}, "cuda_graph is True, but a CUDA graph needs a CUDA device, and this is a cpu"),
    ({"guidance": guidance.APG(2.0)}, {"guidance_scale": 2.0}, "Both guidance and guidance_scale were given"),
    ({}, {"guidance_scale": torch.ones(3)}, "guidance_scale is"),
    ({}, {"push": 0.5}, "push is no argument of one entry per sample of this model"),
    ({}, {"condition": torch.zeros(3)}, "condition in model_kwargs is"),
    ({}, {"z1": torch.zeros(4, 4, 8, 9)}, r"z1 is \(4, 4, 8, 9\), but this Sampler was made for \(4, 4, 8, 8\)"),
    (
        {},
        {"z1": torch.zeros(5, 4, 8, 8), "y": torch.zeros(5, dtype=torch.int64)},
        r"z1 is \(5, 4, 8, 8\), but this Sampler was made for \(4, 4, 8, 8\)",
    ),
    ({}, {"y": torch.zeros(4)}, "y is"),
    ({}, {"indices": torch.zeros(3, dtype=torch.int64)}, "indices is"),
    ({}, {"seed": -1}, "seed"),
    ({}, {"y": None, "guidance_scale": 2.0}, "there are no labels y to be guided by"),
]


@pytest.mark.parametrize(("made", "called", "sentence"), REFUSED, ids=[row[2][:40] for row in REFUSED])
def test_what_cannot_be_is_one_sentence_and_nothing_is_computed(made, called, sentence):
    class Untouched(Conditioned):
        def forward(self, *given, **more):
            raise AssertionError("called")

    arguments = {"z1": torch.zeros(SHAPE), "y": torch.zeros(4, dtype=torch.int64), **called}
    with pytest.raises(ValueError, match=sentence) as caught:
        Sampler(Untouched(), SHAPE, **made)(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(4,), [], None, (0, 4, 8, 8), (4, 4.0), "44"])
def test_a_shape_that_is_none_is_refused(shape):
    with pytest.raises(ValueError, match="shape is"):
        Sampler(Conditioned(), shape)
