"""diffusers' own networks and schedulers as oracles of their adapter."""

from types import SimpleNamespace

import pytest
import torch
from mixture import flowed, posterior, start
from test_diffusers import OurTimes

import lfm_fast
from lfm_fast.interop.diffusers import DiffusersVelocity, align, to_diffusers

SIDE, NULL = 8, 3
Y = torch.tensor([0, 2])


@pytest.fixture(scope="module")
def unet():
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    blocks = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    sizes = {"sample_size": SIDE, "in_channels": 4, "out_channels": 4, "norm_num_groups": 4, "layers_per_block": 1}
    return UNet2DModel(**sizes, **blocks, num_class_embeds=NULL + 1, add_attention=False).double().eval()


def noise(dtype=torch.float64):
    return lfm_fast.noise(2, (4, SIDE, SIDE), seed=3, dtype=dtype)


@torch.no_grad()
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_matching_scheduler_takes_the_same_steps(unet, shift):
    """Its Euler on its own sigmas, with the network called at its timesteps. It keeps sigmas in float32: 6e-8 each."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(4)
    x = noise()
    for timestep in scheduler.timesteps:
        velocity = unet(x, timestep.expand(2), class_labels=Y).sample
        x = scheduler.step(velocity, timestep, x).prev_sample.double()
    field = DiffusersVelocity(unet, scheduler)
    z0 = lfm_fast.sample(field, noise(), y=Y, method="euler", time_grid=scheduler.sigmas)
    torch.testing.assert_close(z0, x, rtol=0, atol=2e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "schedule"),
    [("epsilon", "linear"), ("sample", "squaredcos_cap_v2"), ("v_prediction", "scaled_linear")],
)
def test_a_ddim_step_is_ours(unet, kind, schedule):
    """DDIM is DPM-Solver++ of first order, which dpmpp_2m is in one step: exact for a prediction that does not change,
    so that all but the alphas of the table (float32 there, 6e-8) and the timestep has to agree."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_schedule=schedule, prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(10)
    field, x = DiffusersVelocity(unet, scheduler), noise()
    for timestep in (scheduler.timesteps[3], scheduler.timesteps[8]):
        step = scheduler.step(unet(x, timestep.expand(2), class_labels=Y).sample, timestep, x)
        times = [(int(timestep) + 1) / 1000, (int(timestep) - 100 + 1) / 1000]
        ours = lfm_fast.sample(field, x, y=Y, method="dpmpp_2m", time_grid=times)
        torch.testing.assert_close(ours, step.prev_sample.double(), rtol=1e-5, atol=1e-5)
        t = torch.full((2,), times[0], dtype=torch.float64)
        data = field.path.data_from_velocity(field(t, x, Y), x, t)
        torch.testing.assert_close(data, step.pred_original_sample.double(), rtol=1e-5, atol=1e-5)


def trained_by_diffusers(predicts):
    """A network in diffusers' call that knows the mixture: `predicts` of z, alpha, sigma, at times of its scheduler."""

    def network(z, timestep, class_labels):
        assert timestep.shape == class_labels.shape
        return SimpleNamespace(sample=predicts(z, timestep, class_labels))

    return network


def test_samples_of_a_flow_are_those_of_the_exact_one():
    from diffusers import FlowMatchHeunDiscreteScheduler

    def velocity(z, timestep, y):
        data, of_noise = posterior(z, 1 - timestep / 500, timestep / 500, y)
        return of_noise - data

    field = DiffusersVelocity(trained_by_diffusers(velocity), FlowMatchHeunDiscreteScheduler(num_train_timesteps=500))
    z1, y = start(4, 2, 2), torch.tensor([0, 1, 2, 0])
    z0 = lfm_fast.sample(field, z1, y=y, method="rk4", num_steps=50)
    torch.testing.assert_close(z0, flowed(z1, y, (0.0, 1.0), (1.0, 0.0)), rtol=0, atol=5e-7)


def test_samples_of_a_discrete_schedule_are_those_of_the_exact_one():
    """At whole timesteps, where the network knows the scheduler's table; Heun's 65 steps leave 4e-4."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(num_train_timesteps=200, beta_start=5e-4, beta_end=0.1)
    table = scheduler.alphas_cumprod.double()

    def of_noise(z, timestep, y):
        entry = table[timestep.round().long()]
        assert torch.allclose(timestep, timestep.round())
        return posterior(z, entry.sqrt(), (1 - entry).sqrt(), y)[1]

    field = DiffusersVelocity(trained_by_diffusers(of_noise), scheduler)
    z1, y = start(4, 2, 2), torch.tensor([0, 1, 2, 0])
    times = torch.tensor([*range(200, 20, -4), *range(20, 0, -1)], dtype=torch.float64) / 200
    z0 = lfm_fast.sample(field, z1, y=y, method="heun", time_grid=times)
    ends = [(float(table[i].sqrt()), float((1 - table[i]).sqrt())) for i in (199, 0)]
    torch.testing.assert_close(z0, flowed(z1, y, *ends), rtol=0, atol=1e-3)


def dit(out_channels):
    """A DiT as facebook's are in diffusers: noise and sigmas, 1000 steps, its own label table."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(1)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": SIDE, "patch_size": 2}
    model = DiTTransformer2DModel(
        **sizes, in_channels=4, out_channels=out_channels, num_embeds_ada_norm=NULL, norm_eps=1e-6
    )
    first = model.transformer_blocks[0].norm1.emb
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for block in model.transformer_blocks:  # one embedder for all, as published networks have it
        block.norm1.emb.load_state_dict(first.state_dict())
    return model.double().eval()


@torch.no_grad()
def test_learned_sigmas_of_a_dit_are_dropped_and_its_null_label_is_known():
    from diffusers import DDPMScheduler

    model = dit(8)
    field = DiffusersVelocity(model, DDPMScheduler(variance_type="learned_range"))
    t, z = torch.tensor([0.25, 0.9], dtype=torch.float64), noise()
    of_noise = model(z, timestep=1000 * t - 1, class_labels=Y).sample[:, :4]
    torch.testing.assert_close(field(t, z, Y), field.path.velocity_from_noise(of_noise, z, t))
    assert field.null_label == NULL
    torch.testing.assert_close(field(t, z), field(t, z, torch.full((2,), NULL)))
    with pytest.raises(ValueError, match="returned 8 channels for 4"):
        DiffusersVelocity(model)(t, z, Y)
    torch.testing.assert_close(
        DiffusersVelocity(model, learned_sigma=True)(t, z, Y), model(z, timestep=t, class_labels=Y).sample[:, :4]
    )


@torch.no_grad()
def test_optimize_takes_it_once_it_computes_what_ours_does():
    from diffusers import DDPMScheduler

    field = DiffusersVelocity(dit(8), DDPMScheduler())
    with pytest.raises(ValueError, match="computes something else"):  # its own time frequencies
        lfm_fast.optimize(field)
    align(field.network)
    for block in field.network.transformer_blocks:
        block.norm1.emb.time_proj = OurTimes()  # float64 as ours: its float32 would show at timestep 900
    t, z = torch.tensor([0.25, 0.9], dtype=torch.float64), noise()
    ours = field.around(field.as_dit())
    torch.testing.assert_close(ours(t, z, Y), field(t, z, Y), rtol=1e-9, atol=1e-9)
    fast = lfm_fast.optimize(field, precision="fp32")
    assert isinstance(fast.network, lfm_fast.DiT)
    assert fast.prepares


@torch.no_grad()
def test_a_converted_network_keeps_the_path_of_who_samples():
    """Without a scheduler nothing is said of the path, so that it may be Linear(sigma_min=1e-5)."""
    model = lfm_fast.DiT(image_size=SIDE, hidden_size=32, depth=1, num_heads=2, num_classes=NULL, label_dropout=0.1)
    field = DiffusersVelocity(to_diffusers(model))
    from lfm_fast.flow.paths import Linear

    z0 = lfm_fast.sample(field, noise(torch.float32), y=Y, path=Linear(sigma_min=1e-5), method="euler", num_steps=1)
    assert z0.shape == (2, 4, SIDE, SIDE)


def schedulers():
    import diffusers

    return diffusers


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda unet: DiffusersVelocity(unet), "a UNet2DModel does not tell whether .* give the scheduler"),
        (lambda unet: DiffusersVelocity(unet, "ddim"), "a str with prediction_type None is none of those known here"),
        (lambda unet: DiffusersVelocity(unet, schedulers().EDMEulerScheduler()), "a EDMEulerScheduler with prediction"),
        (
            lambda unet: DiffusersVelocity(unet, schedulers().FlowMatchEulerDiscreteScheduler(invert_sigmas=True)),
            "has invert_sigmas",
        ),
        (
            lambda unet: DiffusersVelocity(unet, schedulers().DDIMScheduler(rescale_betas_zero_snr=True)),
            "has to fall from step to step and to stay inside",
        ),
        (lambda unet: DiffusersVelocity(3, schedulers().DDIMScheduler()), "network is a int, expected a module"),
        (
            lambda unet: DiffusersVelocity(
                lambda z, timestep: {"x": z}, schedulers().FlowMatchEulerDiscreteScheduler()
            )(torch.tensor(0.5), noise()),
            "The model returned 'dict'",
        ),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(unet, call, says):
    with pytest.raises(ValueError, match=says):
        call(unet)
