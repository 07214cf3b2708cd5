"""Every row that has a Triton backend, over its cases and in every configuration, in Triton's interpreter."""

import importlib

import calls
import pytest
import torch
from compare import assert_same_bits
from row_cases import ROWS, all_cases, arguments_of, first_cases, outputs
from test_philox_normal import (  # noqa: F401
    test_definition_has_not_moved,
    test_normals_are_the_oracles,
    test_offset_moves_by_blocks_of_four,
)
from test_posterior_interpolate import (  # noqa: F401
    test_each_of_its_noises_has_the_bits_of_its_stream,
    test_it_is_gather_draw_and_interpolate_in_turn,
    test_rows_of_nothing,
)
from test_properties import FULL, many
from test_rows import (  # noqa: F401
    test_a_bad_number_stays_in_its_sample,
    test_a_sample_does_not_depend_on_its_neighbours,
    test_inputs_are_left_alone,
    test_result_is_that_of_float64,
)

from lfm_fast import ops
from lfm_fast.kernels.triton._tuning import Tuned, use_configuration


def test_rows_of_tables_that_lie_apart_and_rows_that_are_not_there():
    """Mean and log-variance with strides of their own, rows and numbers every second one; a row that is not there makes
    its sample NaN, and no other."""
    row = ROWS["posterior_interpolate"]
    kernel = importlib.import_module("lfm_fast.kernels.triton.posterior_interpolate").kernel
    generator = torch.Generator().manual_seed(0)
    mean, log_variance = (torch.randn(5, 12 + wider, generator=generator)[:, :12] for wider in (3, 8))
    rows, index = torch.tensor([4, 9, 0, 9, 2, 9])[::2], torch.tensor([7, 0, 2**40, 0, 7, 0])[::2]
    coefficients = torch.randn(4, 3, generator=generator)
    want = row.reference(mean, rows, index, coefficients, log_variance, 5)
    for got, expected in zip(kernel(mean, rows, index, coefficients, log_variance, 5), want):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for bad in (5, -1):
        rows[1] = bad
        for got, expected in zip(kernel(mean, rows, index, coefficients, log_variance, 5), want):
            assert got[1].isnan().all()
            torch.testing.assert_close(got[::2], expected[::2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "with_noise"), [(12, True), (8200, False), (0, False)])
def test_steps_of_tensors_that_lie_apart(size, with_noise):
    """Each with a stride of its own, tables every second column; samples of one program, of two, and of no element."""
    row = ROWS["guided_step"]
    kernel = importlib.import_module("lfm_fast.kernels.triton.guided_step").kernel
    generator = torch.Generator().manual_seed(size)

    def field(wider):
        return torch.randn(3, size + wider, generator=generator)[:, :size]

    def table(*shape):
        return torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)[..., ::2]

    index = torch.tensor([5, 0, 2**40, 0, 7, 0])[::2]
    noise = (table(3), index) if with_noise else (None, None)
    stored = [field(4), field(12)]
    args = (field(0), field(8), field(16), table(3), stored, table(3, 4), table(3, 3), 1e-2, 1e-2, *noise, 4, 7, True)
    for got, want in zip(kernel(*args), row.reference(*args), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


WITH_TRITON = {name: row for name, row in ROWS.items() if any(b.name == "triton" for b in row.backends)}


def configurations(row):
    module = importlib.import_module(f"lfm_fast.kernels.triton.{row.name}")
    return max(len(value.configurations) for value in vars(module).values() if isinstance(value, Tuned))


def size_of(row, case):
    return max(x.numel() for x in arguments_of(row, case) if isinstance(x, torch.Tensor))


def float64_among(args):
    flat = [x for a in args for x in (a if isinstance(a, list) else [a])]
    return any(isinstance(x, torch.Tensor) and x.dtype is torch.float64 for x in flat)


@pytest.mark.parametrize("row", WITH_TRITON.values(), ids=WITH_TRITON)
def test_only_float64_is_refused(row):
    backend = row.named("triton")
    for case in row.cases:
        args = arguments_of(row, case)
        reason = backend.refusal(args, forced=True)
        assert (reason is not None) == float64_among(args), f"{case}: {reason}"


@pytest.mark.parametrize("row", WITH_TRITON.values(), ids=WITH_TRITON)
def test_every_configuration_gives_the_same_bits(row):
    """So timings, which choose the configuration on a GPU, never change a result."""
    backend = row.named("triton")
    served = [case for case in row.cases if backend.refusal(arguments_of(row, case), forced=True) is None]
    longest = max((case for case in served if size_of(row, case) < 1500), key=lambda case: size_of(row, case))
    for case in (row.cases[0], longest):
        args = arguments_of(row, case)
        results = []
        for number in range(configurations(row)):
            with ops.use_backend("triton", ops=row.name), use_configuration(number):
                results.append(outputs(row(*args)))
        for number, result in enumerate(results):
            for got, want in zip(result, results[0]):
                assert_same_bits(got, want, f"{row.name}, {case}, configuration {number} beside the default")


def test_noise_in_other_ops_has_the_bits_of_the_reference(backend):
    """2,500 of them, so that no kernel has a sample in one block."""
    index, ones = torch.tensor([2**34 + 5, -3]), torch.ones(2)
    with ops.use_backend("reference"):
        noise = ops.philox_normal(index, 2500, seed=11).view(2, 2500)
        later = ops.philox_normal(index, 2500, seed=11, stream=5, offset=6)
    z = torch.zeros(2, 2500)
    pick = torch.stack((0 * ones, ones, 0 * ones, ones))
    for part in ops.interpolate(z, pick, index=index, seed=11):
        assert_same_bits(part, noise)
    assert (ops.velocity_loss(noise, z_0=z, coefficients=pick, index=index, seed=11) == 0).all()
    step = ops.guided_step(z, z, None, None, [], torch.zeros(2, 2), None, 0.0, 0.0, ones, index, 11, 6)
    assert_same_bits(step[0] + 0.0, later + 0.0)


def test_a_row_that_is_not_there_makes_its_sample_nan():
    """The kernel itself, whose host has not looked."""
    rows, table = torch.tensor([1, 2, -1, 0]), torch.randn(2, 129)
    for log_variance in (None, table):
        parts = ROWS["posterior_interpolate"].kernels["triton"](
            table, rows, torch.arange(4), torch.ones(4, 4), log_variance, 3
        )
        for part in parts:
            assert part[[0, 3]].isfinite().all()
            assert part[[1, 2]].isnan().all()


def test_a_table_and_its_rows_are_read_where_they_lie(backend):
    """Of mean, log-variance, rows, index and coefficients each has strides of its own."""
    both, numbers, noise = torch.randn(5, 3, 129), torch.tensor([[4, 7], [0, -8], [2, 9]]), torch.randn(3, 4)
    parts = both[:, 0], numbers[:, 0], numbers[:, 1], noise.T, torch.randn(5, 129)
    want = ops.posterior_interpolate(*(x.contiguous() for x in parts), 3)
    for got, part in zip(ops.posterior_interpolate(*parts, 3), want):
        assert_same_bits(got, part)


@pytest.mark.parametrize("shape", [(3, 4, 5, 7), (2, 6, 7), (1, 6, 33, 65)])
def test_a_group_too_large_for_one_program_is_cut_into_tiles(shape, monkeypatch):
    monkeypatch.setattr("lfm_fast.kernels.triton.group_norm_silu._WHOLE", 0)
    row = ROWS["group_norm_silu"]
    with ops.use_backend("triton", ops=row.name):
        test_result_is_that_of_float64(row, {"shape": shape, "num_groups": 2}, "triton, in tiles")


@pytest.mark.slow
@pytest.mark.fuzz
@pytest.mark.parametrize("row", WITH_TRITON.values(), ids=WITH_TRITON)
def test_any_call_is_right_or_refused(row, monkeypatch):
    monkeypatch.setattr(calls, "usable_backends", lambda row: ["triton"])
    many(300 if FULL else 8, not FULL, row)


@pytest.mark.slow
@pytest.mark.fuzz
@pytest.mark.parametrize(("row", "case"), all_cases() if FULL else first_cases())
def test_every_configuration_on_every_case(row, case):
    for number in range(configurations(row)):
        with ops.use_backend("triton", ops=row.name), use_configuration(number):
            test_result_is_that_of_float64(row, case, f"triton, configuration {number}")
