"""The benchmark of the U-Nets: its contenders compute the same."""

import pytest

from benchmarks import names, plain, unets
from benchmarks.workloads import LARGEST_ERROR, relative_error

SIZES = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["adm-original", "adm-layout"])
def test_networks_and_their_rivals_compute_the_same(name, precision, monkeypatch):
    monkeypatch.setitem(unets.ARGUMENTS, name, SIZES)
    monkeypatch.setattr(unets, "flops", lambda name: 1)
    workload = unets.UNetForward(name, 3, precision)
    contenders = workload.contenders()
    assert list(contenders)[0] == names.FAST
    assert {names.REFERENCE, names.EAGER} <= set(contenders)
    for contender in contenders.values():
        with plain.forced(contender.backend):
            assert 0 < relative_error(contender.result(), workload.truth_of("")) < LARGEST_ERROR[precision]
