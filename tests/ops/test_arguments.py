"""Arguments: a wrong one is named in one sentence before any work. Any call at all: test_properties.py."""

import re

import pytest
import torch
from compare import assert_close
from row_cases import ROWS, arguments_of

from lfm_fast import ops

GOOD = {name: arguments_of(row, row.cases[0]) for name, row in ROWS.items()}
Z = GOOD["interpolate"][0]  # (3, 4, 5, 7)
NOISE = dict(zip(("z_0", "coefficients", "index"), (Z, GOOD["interpolate"][1], torch.arange(3))))

WRONG = [
    ("philox_normal", {"index": [1, 2]}, "index is a list: pass a torch.Tensor"),
    ("philox_normal", {"index": torch.arange(3).int()}, "index is int32, expected int64"),
    ("philox_normal", {"index": torch.arange(4).view(2, 2)}, r"index is \(2, 2\), expected \(B,\)"),
    ("philox_normal", {"index": torch.arange(3).to_sparse()}, "index has layout torch.sparse_coo"),
    ("philox_normal", {"numel": -1}, "numel is -1, expected an int >= 0"),
    ("philox_normal", {"numel": 2.0}, "numel is a float: pass an int"),
    ("philox_normal", {"seed": 1.5}, "seed is a float: pass an int"),
    ("philox_normal", {"seed": 2**63}, "seed is 9223372036854775808, expected a signed 64-bit number"),
    ("philox_normal", {"seed": torch.tensor(1)}, "seed is a Tensor: pass an int"),
    ("philox_normal", {"stream": -1}, "stream is -1, expected 0 <= stream < 2"),
    ("philox_normal", {"stream": 2**32}, "stream is 4294967296"),
    ("philox_normal", {"offset": -1}, "offset -1 and 129 numbers leave"),
    ("philox_normal", {"offset": 2**32 - 32}, "offset 4294967264 and 129 numbers leave"),
    ("interpolate", {"z_0": None}, "z_0 is a NoneType"),
    ("interpolate", {"z_0": torch.tensor(1.0)}, r"z_0 has no dimensions, expected \(B, ...\)"),
    ("interpolate", {"z_0": Z.bfloat16()}, "z_0 is bfloat16, expected float32, float64"),
    ("interpolate", {"coefficients": torch.ones(4)}, r"coefficients is \(4,\), expected \(4, 3\)"),
    ("interpolate", {"coefficients": torch.ones(4, 1)}, r"coefficients is \(4, 1\), expected \(4, 3\)"),
    ("interpolate", {"coefficients": torch.ones(4, 3).double()}, "coefficients is float64 but z_0 is not"),
    ("interpolate", {"z_1": Z[:2]}, r"z_1 is \(2, 4, 5, 7\) but z_0 is \(3, 4, 5, 7\)"),
    ("interpolate", {"z_1": Z.double()}, "z_1 is float64, expected float32"),
    ("interpolate", {"z_1": Z.to("meta")}, "z_1 is on meta but z_0 is on cpu"),
    ("interpolate", {"z_1": None}, "Pass exactly one of z_1 and index; neither came"),
    ("interpolate", {"index": torch.arange(3)}, "Pass exactly one of z_1 and index; z_1 and index came"),
    ("interpolate", {"z_1": None, "index": torch.arange(2)}, r"index is \(2,\), expected \(3,\)"),
    ("interpolate", {"z_1": None, "index": torch.arange(3), "stream": -2}, "stream is -2"),
    ("velocity_loss", {"velocity": Z.long()}, "velocity is int64, expected float32, bfloat16, float16, float64"),
    ("velocity_loss", {"target": Z[..., :1]}, r"target is \(3, 4, 5, 1\) but velocity is \(3, 4, 5, 7\)"),
    ("velocity_loss", {"target": Z.double()}, "target is float64 but velocity is not"),
    ("velocity_loss", {"target": None}, "exactly one of target and z_0; neither came"),
    ("velocity_loss", {"index": torch.arange(3)}, "coefficients and index rebuild the target, which came as well"),
    (
        "velocity_loss",
        {"target": None, "z_0": Z},
        "go together: coefficients and index is missing",
    ),
    ("velocity_loss", {**NOISE, "target": None, "index": torch.ones(3)}, "index is float32, expected int64"),
    ("velocity_loss", {"weight": torch.ones(1)}, r"weight is \(1,\), expected \(3,\)"),
    ("velocity_loss", {"weight": torch.ones(3, 1)}, r"weight is \(3, 1\), expected \(3,\)"),
    ("guided_step", {"z": Z.half()}, "z is float16, expected float32, float64"),
    ("guided_step", {"velocity": Z[:1]}, r"velocity is \(1, 4, 5, 7\) but z is"),
    ("guided_step", {"velocity": Z.double()}, "velocity is float64 but z is not"),
    ("guided_step", {"scale": None}, "unconditional and scale go together: scale is missing"),
    ("guided_step", {"scale": 1.5}, "scale is a float: pass a torch.Tensor"),
    ("guided_step", {"scale": torch.ones(2)}, r"scale is \(2,\), expected \(3,\)"),
    ("guided_step", {"unconditional": Z[:, :2]}, r"unconditional is \(3, 2, 5, 7\) but z is"),
    ("guided_step", {"stored": Z}, "stored is a Tensor, expected a list of at most 16"),
    ("guided_step", {"stored": [Z] * 17}, "stored is a list of 17, expected a list of at most 16"),
    ("guided_step", {"stored": [Z, Z[:2], Z]}, r"a stored velocity is \(2, 4, 5, 7\)"),
    ("guided_step", {"stored": [Z]}, r"weights is \(3, 5\), expected \(3, 3\)"),
    ("guided_step", {"weights": torch.ones(5)}, r"weights is \(5,\), expected \(3, 5\)"),
    ("guided_step", {"error_weights": torch.ones(3, 5)}, r"error_weights is \(3, 5\), expected \(3, 4\)"),
    ("guided_step", {"noise_scale": torch.ones(3)}, "noise_scale and index go together: index is missing"),
    ("guided_step", {"index": torch.arange(3)}, "noise_scale and index go together: noise_scale is missing"),
    ("guided_step", {"noise_scale": torch.ones(3), "index": torch.arange(3), "offset": -1}, "offset -1"),
    ("guided_step", {"seed": 1.5}, "seed is a float: pass an int"),
    ("guided_step", {"seed": 2**63}, "seed is 9223372036854775808, expected a signed 64-bit number"),
    ("guided_step", {"offset": -1}, "offset -1"),
    ("posterior_interpolate", {"mean": Z.long()}, "mean is int64, expected float32, bfloat16, float16, float64"),
    ("posterior_interpolate", {"rows": torch.arange(3).int()}, "rows is int32, expected int64"),
    ("posterior_interpolate", {"rows": torch.zeros(3, 1).long()}, r"rows is \(3, 1\) on cpu, expected \(B,\) on cpu"),
    ("posterior_interpolate", {"rows": torch.arange(2)}, r"index is \(3,\), expected \(2,\) for rows of shape \(2,\)"),
    ("posterior_interpolate", {"rows": torch.tensor([0, 3, -1])}, "rows goes from -1 to 3, but mean has rows 0 to 2"),
    ("posterior_interpolate", {"index": torch.arange(3.0)}, "index is float32, expected int64"),
    ("posterior_interpolate", {"coefficients": torch.ones(3, 4)}, r"coefficients is \(3, 4\), expected \(4, 3\)"),
    ("posterior_interpolate", {"log_variance": Z[:2]}, r"log_variance is \(2, 4, 5, 7\) but mean is \(3, 4, 5, 7\)"),
    ("posterior_interpolate", {"log_variance": Z.bfloat16()}, "log_variance is bfloat16, expected float32"),
    ("posterior_interpolate", {"seed": 2**63}, "seed is 9223372036854775808"),
    ("interpolate", {"seed": "3"}, "seed is a str: pass an int"),
    ("interpolate", {"stream": 2**32}, "stream is 4294967296"),
    ("velocity_loss", {"seed": None}, "seed is a NoneType: pass an int"),
    ("guided_step", {"atol": "1"}, "atol is a str: pass a number"),
    ("guided_step", {"rtol": -1.0}, "rtol is -1.0, expected a number >= 0"),
]


@pytest.mark.parametrize(("name", "changes", "sentence"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_a_wrong_argument_is_named(name, changes, sentence):
    row = ROWS[name]
    args = [changes.get(key, value) for key, value in zip(row.argument_names, GOOD[name])]
    with pytest.raises(ValueError, match=sentence) as caught:
        row(*args)
    text = str(caught.value)
    assert text.endswith("."), text
    assert not re.search(r"\.\s+[A-Z]", text), f"more than one sentence: {text}"


@pytest.mark.parametrize("name", ROWS)
def test_the_arguments_those_start_from_are_good(name):
    ROWS[name](*GOOD[name])


def test_a_scale_without_an_unconditional_velocity_has_no_effect():
    """What a field returns outside the guidance interval."""
    weights = torch.ones(3, 2)
    with_scale = ops.guided_step(Z, Z, None, torch.full((3,), 4.0), [], weights)[0]
    assert_close(with_scale, ops.guided_step(Z, Z, None, None, (), weights)[0])
