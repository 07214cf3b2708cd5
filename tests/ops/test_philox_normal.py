"""The noise: the published generator, and the same bits in every batch and backend. See test_noise_statistics.py."""

import hashlib
import os
import shutil

import numpy as np
import philox_oracle
import pytest
import torch
from compare import assert_close, assert_same_bits
from row_cases import ROWS, arguments_of
from scipy import stats

from lfm_fast import ops
from lfm_fast.ops.philox_normal import box_muller, philox_words

# Random123's known-answer file, philox4x32 with 10 rounds: counter, key, answer
# The first 64 bits of the SHA-256 of the noise below
DIGEST = "59292608a195dcfe"

KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def signed(low, high):
    value = low | high << 32
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_generator_gives_the_published_answers(counter, key, answer):
    assert philox_oracle.philox4x32_10(counter, key) == answer
    block, stream, low, high = counter
    words = philox_words(torch.tensor([signed(low, high)]), 1, signed(*key), stream, block)
    assert tuple(words.flatten().tolist()) == answer


def test_compiled_reference_draws_the_same_words():
    """No step of the reference relies on an integer overflow, which the C++ that Inductor writes may not do."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("there is no C++ compiler for Inductor")
    index = torch.tensor([3, 5_000_000_032, 2**63 - 1])
    arguments = (index, 64, 2**31 + 5, 2, 4)  # products beyond 2^63 occur
    assert torch.equal(torch.compile(philox_words, dynamic=False)(*arguments), philox_words(*arguments))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 123456789012345])
def test_words_are_the_oracles(seed):
    index = torch.tensor([0, 1, -1, 2**32, 2**63 - 1, -(2**63)])
    words = philox_words(index, 3, seed, 7, 2**32 - 3)
    for row, i in zip(words.tolist(), index.tolist()):
        assert [tuple(w) for w in row] == [philox_oracle.words(i, 2**32 - 3 + b, seed, 7) for b in range(3)]


def test_normals_are_the_oracles(backend):
    """1.5e-6 absolute: 3.6 ulp of at most 6.7 (1.7e-6 at the very end of the tail, 9e-7 below 4)."""
    index = torch.tensor([5, 2**40 + 1, -7])
    got = ops.philox_normal(index, 4003, seed=-99, stream=3, offset=17)
    want = [
        [x for block in range(17, 17 + 1001) for x in philox_oracle.normals(i, block, -99, 3)][:4003]
        for i in index.tolist()
    ]
    assert_close(got, torch.tensor(want, dtype=torch.float64), absolute=1.5e-6, what=f"normals on {backend}")


@pytest.mark.parametrize("numel", [1, 2, 3, 4, 5, 129, 1024])
def test_noise_has_the_same_bits_in_every_batch(numel, backend):
    """Batches of 64, 16 and 7, any order, any split of the elements."""
    index = torch.arange(64) * 3 + 10
    whole = ops.philox_normal(index, numel, seed=5)
    for size in (16, 7, 1):
        parts = torch.cat([ops.philox_normal(part, numel, seed=5) for part in index.split(size)])
        assert_same_bits(parts, whole, f"batches of {size}")
    assert_same_bits(ops.philox_normal(index.flip(0), numel, seed=5).flip(0), whole, "reversed")
    longer = ops.philox_normal(index, numel + 9, seed=5)[:, :numel]
    assert_same_bits(longer, whole, "first elements of longer noise")


def test_offset_moves_by_blocks_of_four(backend):
    index = torch.arange(3)
    assert_same_bits(ops.philox_normal(index, 9, 1, 5, 2), ops.philox_normal(index, 17, 1, 5)[:, 8:])


@pytest.mark.parametrize("numel", [1, 7, 127, 9_217])
def test_backends_agree_to_the_bit(numel, library):
    index = torch.tensor([0, 1, 2**33 + 5, -4, 12])
    for seed, stream, offset in ((0, 0, 0), (-3, 5, 1000), (2**62 + 7, 2**32 - 1, 2**31)):
        with ops.use_backend("cpp", ops="philox_normal"):
            got = ops.philox_normal(index, numel, seed, stream, offset)
        with ops.use_backend("reference"):
            want = ops.philox_normal(index, numel, seed, stream, offset)
        assert_same_bits(got, want, f"cpp, seed {seed}")


@pytest.mark.parametrize("shape", [(64, 4, 8, 8), (16, 3, 7), (7, 129)])
def test_noise_made_inside_other_ops_has_the_same_bits(shape, backend):
    batch = shape[0]
    index, ones, zeros = torch.arange(batch) + 2**34, torch.ones(batch), torch.zeros(batch)
    noise = ops.philox_normal(index, int(np.prod(shape[1:])), seed=11).view(shape)
    z = torch.zeros(shape)
    pick = torch.stack((zeros, ones, zeros, ones))
    for part in ops.interpolate(z, pick, index=index, seed=11):
        assert_same_bits(part, noise)
    assert (ops.velocity_loss(noise, z_0=z, coefficients=pick, index=index, seed=11) == 0).all()
    later = ops.philox_normal(index, int(np.prod(shape[1:])), seed=11, stream=5, offset=6).view(shape)
    step = ops.guided_step(z, z, None, None, [], torch.zeros(batch, 2), None, 0.0, 0.0, ones, index, 11, 6)
    assert_same_bits(step[0] + 0.0, later + 0.0)


def test_definition_has_not_moved(backend):
    """Checkpoints and seeds of users depend on these bits: a change of the noise must be deliberate."""
    bits = ops.philox_normal(torch.arange(16) - 3, 1001, seed=2024, stream=2).cpu().numpy().tobytes()
    assert hashlib.sha256(bits).hexdigest()[:16] == DIGEST


def test_edges_of_box_muller():
    """The words at which the radius, the quadrant or a sign turns; the values from the oracle's formula."""
    edge = [0, 1, 2, 2**29, 2**30, 2**31, 3 * 2**30, 2**32 - 1, 2**32 - 2, 2**32 - 512]
    edge += [2**29 - 1, 2**29 + 1, 2**30 - 1, 2**30 + 2**29, 2**31 + 2**29 - 1, 2**32 - 2**29]
    a, b = torch.cartesian_prod(torch.tensor(edge), torch.tensor(edge)).unbind(1)
    n0, n1 = box_muller(a, b)
    # float32 of u: at the upper end 1 - u is only known to 2^-25
    u = ((a >> 1).float() * 2.0**-31 + 2.0**-32).double()
    radius, angle = (-2 * u.log()).sqrt(), b.double() / 2**32
    for got, turn in ((n0, angle + 0.25), (n1, angle)):
        want = radius * torch.sin(2 * torch.pi * turn)
        assert_close(got, want, absolute=1.7e-6, what="edge")
    assert n0.abs().max() < 6.67
    assert not n0.isnan().any()


def test_uniform_numbers():
    index = torch.tensor([3, -1])
    got = ops.philox_uniform(index, 6, seed=8, stream=1, offset=2)
    want = [[w >> 8 for b in (2, 3) for w in philox_oracle.words(i, b, 8, 1)][:6] for i in index.tolist()]
    assert_same_bits(got, (torch.tensor(want).double() / 2**24).float())
    many = ops.philox_uniform(torch.arange(4096), 64, seed=1, stream=1)
    assert many.min() >= 0
    assert many.max() < 1
    # seeds are fixed, so this is no gamble: p is 0.3 or so, and 1e-3 is what a wrong range would be far below
    assert stats.kstest(many.flatten().numpy(), "uniform").pvalue > 1e-3


def calls_that_make_noise():
    """(row name, argument that names its part of the counter, arguments) of each row that draws."""
    for name, argument in (
        *((name, "stream") for name in ("philox_normal", "interpolate", "velocity_loss")),
        *((name, "offset") for name in ("philox_normal", "guided_step")),
    ):
        row = ROWS[name]
        drawing = (arguments_of(row, case) for case in row.cases)
        index = row.argument_names.index("index")
        yield name, argument, next(args for args in drawing if args[index] is not None and args[index].shape[0] > 1)


@pytest.mark.parametrize("value", [-1, 2**32])
@pytest.mark.parametrize(
    ("name", "argument", "args"), list(calls_that_make_noise()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_kernels_refuse_a_counter_that_would_come_round_again(name, argument, args, value, library, emulated):
    """Called without the row in front of them: the same words serve other numbers, and noise repeats without a sign."""
    row = ROWS[name]
    position = row.argument_names.index(argument)
    for kernel in (row.kernels["cpp"], emulated.kernel_of(row)):
        kernel(*args)
        with pytest.raises(RuntimeError, match=f"{argument}.* must "):
            kernel(*args[:position], value, *args[position + 1 :])
