# SPDX-License-Identifier: Apache-2.0
"""The plan of a loop on a CUDA device: budgets, choices, messages. No device is needed."""

from __future__ import annotations

import contextlib
import math
import types
from typing import Any

import pytest
import torch
from cuda_device import float32_products

import pyseq
from pyseq.cuda import CUDA_DEVICES, CudaDevice, CudaPlan, cuda_device

SMALL = CudaDevice(75, 6, 49_152, 65_536, 65_536, 1 << 20, 1.0e9, 100e9)
DEVICES = {**CUDA_DEVICES, "small": SMALL}


def plan(device: Any = "h200", **options: Any) -> CudaPlan:
    """A plan of usual sizes, for a device described here."""
    options = {"hidden_size": 512, "batch_size": 32, **options}
    return pyseq.cuda_plan(device=DEVICES.get(device, device), **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("hidden_size", [1, 7, 128, 509, 1024])
@pytest.mark.parametrize("batch_size", [1, 3, 64, 127])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_persistent_plans_keep_within_the_device(
    device: str, hidden_size: int, batch_size: int, dtype: torch.dtype
) -> None:
    for cell in ("lstm", "gru", "rnn_tanh"):
        made = plan(device, cell=cell, hidden_size=hidden_size, batch_size=batch_size, dtype=dtype)
        if math.isinf(made.persistent_us):
            assert made.path == "alternating"
            continue
        facts = DEVICES[device]
        assert 0 < made.shared_bytes <= facts.shared_per_block
        assert made.grid == made.tiles * made.groups <= facts.multiprocessors
        # Every unit and every row has a block, and no block is without.
        assert made.tiles * made.tile_units >= hidden_size > (made.tiles - 1) * made.tile_units
        assert made.groups * made.group_rows >= batch_size > (made.groups - 1) * made.group_rows
        assert made.tile_units % 4 == 0 or made.tile_units == hidden_size
        assert made.barrier_bytes >= 4 * made.groups


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("directions", [1, 2])
def test_directions_share_the_device(directions: int, backward: bool) -> None:
    made = plan(directions=directions, backward=backward, dtype=torch.float16)
    assert made.path == "persistent"
    assert made.grid == directions * made.tiles * made.groups <= 132


def test_no_step_is_faster_than_its_floor() -> None:
    for hidden_size in (128, 256, 512, 1024, 2048):
        for batch_size in (1, 16, 128):
            for dtype in (torch.float16, torch.float32, torch.float64):
                made = plan(hidden_size=hidden_size, batch_size=batch_size, dtype=dtype)
                assert 0 < made.floor_us <= made.step_us
                assert made.step_us == min(made.persistent_us, made.alternating_us)


def test_weights_that_do_not_fit_take_the_alternating_path() -> None:
    made = plan(hidden_size=2048)  # 64 MiB of weights, 30 MB of shared memory
    assert made.path == "alternating"
    assert "shared memory, of which a block has 232448" in made.reason
    assert math.isinf(made.persistent_us)
    assert made.grid == 0


def test_the_environment_leaves_multiprocessors_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSEQ_CUDA_MULTIPROCESSORS", "20")
    expected = plan(CUDA_DEVICES["h200"]._replace(multiprocessors=20), dtype=torch.float16)
    assert plan(dtype=torch.float16) == expected
    assert 0 < expected.grid <= 20
    monkeypatch.setenv("PYSEQ_CUDA_MULTIPROCESSORS", "1000")
    allowed = plan()
    monkeypatch.delenv("PYSEQ_CUDA_MULTIPROCESSORS")
    assert plan() == allowed
    for wrong in ("0", "-1", "many", "2x", ""):
        monkeypatch.setenv("PYSEQ_CUDA_MULTIPROCESSORS", wrong)
        with pytest.raises(ValueError, match="PYSEQ_CUDA_MULTIPROCESSORS must be a positive"):
            plan()


def test_a_decoder_of_many_rows_of_short_numbers_alternates() -> None:
    # The persistent decoder multiplies without tensor units, which a library uses.
    sizes = {"operator": "decode", "hidden_size": 1024, "batch_size": 128, "source_length": 30}
    made = plan(dtype=torch.float16, **sizes)
    assert made.path == "alternating"
    assert plan(dtype=torch.float16, **sizes | {"batch_size": 1}).path == "persistent"


def test_rounded_products_are_for_a_library() -> None:
    sizes = {"hidden_size": 1024, "batch_size": 128}
    strict, rounded = (plan(tf32=tf32, **sizes) for tf32 in (False, True))
    # The persistent kernel never rounds, so that its time stays.
    assert (strict.path, rounded.path) == ("persistent", "alternating")
    assert strict.persistent_us == rounded.persistent_us
    for allowed, expected in (("ieee", strict), ("tf32", rounded)):
        with float32_products(allowed):
            assert plan(**sizes) == expected
            # Other types know no such thing.
            double = plan(dtype=torch.float64, **sizes)
            assert double == plan(dtype=torch.float64, tf32=False, **sizes)


def test_the_host_launches_every_step_of_the_alternating_path() -> None:
    once = plan(hidden_size=8, batch_size=1).alternating_us
    assert once > 5
    assert plan(hidden_size=8, batch_size=1, directions=2).alternating_us == 2 * once
    assert plan(hidden_size=8, batch_size=1, proj_size=4).alternating_us == 2 * once


def test_fewer_multiprocessors_hold_more_units_each() -> None:
    whole = plan(dtype=torch.float16)
    part = plan(CUDA_DEVICES["h200"]._replace(multiprocessors=20), dtype=torch.float16)
    assert whole.path == part.path == "persistent"
    assert part.grid <= 20
    assert part.tile_units > whole.tile_units
    assert plan(CUDA_DEVICES["h200"]._replace(multiprocessors=2)).path == "alternating"


def test_a_device_without_cooperative_launches() -> None:
    made = plan(CUDA_DEVICES["h200"]._replace(cooperative=False))
    assert made.path == "alternating"
    assert "all run at once" in made.reason


def test_bfloat16_needs_its_arithmetic() -> None:
    assert "bfloat16" in plan("t4", hidden_size=64, dtype=torch.bfloat16).reason
    assert plan("a100", hidden_size=64, dtype=torch.bfloat16).path == "persistent"


def test_cells_without_recurrent_weights_never_wait() -> None:
    made = plan(cell="indrnn_relu")
    assert made.path == "persistent"
    assert made.floor_us < plan(cell="rnn_relu").floor_us


def test_environment_variable_overrides_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan().path == "persistent"
    monkeypatch.setenv("PYSEQ_CUDA_PATH", "alternating")
    assert plan().path == "alternating"
    assert plan().reason == "asked for"
    assert plan(path="persistent").path == "persistent"
    monkeypatch.setenv("PYSEQ_CUDA_PATH", "persistent")
    with pytest.raises(ValueError, match="does not fit: a block would hold the weights of"):
        plan(hidden_size=2048)
    monkeypatch.setenv("PYSEQ_CUDA_PATH", "fast")
    with pytest.raises(ValueError, match="PYSEQ_CUDA_PATH must be one of auto, persistent"):
        plan()


def test_decoders_keep_their_weights_in_the_cache() -> None:
    made = plan(operator="decode", hidden_size=2048, source_length=50, additive=True)
    assert math.isfinite(made.persistent_us)
    assert made.shared_bytes < SMALL.shared_per_block


def test_described_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = SMALL._asdict()
    assert cuda_device(facts) == SMALL
    assert cuda_device("a100") is CUDA_DEVICES["a100"]
    del facts["clock"]
    with pytest.raises(ValueError, match="got no clock"):
        cuda_device(facts)
    with pytest.raises(ValueError, match="multiprocessors of device must be positive, got 0"):
        cuda_device(SMALL._replace(multiprocessors=0))
    with pytest.raises(ValueError, match=r"device must be one of t4, a100, .* got 'z9'"):
        cuda_device("z9")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no CUDA device 'cuda' here"):
        cuda_device("cuda")


def test_a_present_device_is_what_the_kernels_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(pyseq.cuda._C, "cuda_device", SMALL._asdict)
    assert cuda_device("cuda") == SMALL
    # Without kernels for it, what torch tells.
    found = types.SimpleNamespace(name="some", major=9, minor=0)
    monkeypatch.setattr(pyseq.cuda._C, "cuda_device", dict)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    with pytest.raises(RuntimeError, match=r"does not tell clock_rate, .* of some: name one of"):
        cuda_device("cuda")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operator": "attend"}, "operator must be scan or decode, got 'attend'"),
        ({"cell": "mlp"}, "cell of a scan must be one of rnn_tanh"),
        ({"operator": "decode", "cell": "slstm_exp"}, "cell of a decode must be one of"),
        ({"dtype": torch.int8}, "dtype must be float16, bfloat16, float32 or float64"),
        ({"batch_size": 0}, "batch must be positive, got 0"),
        ({"directions": 3}, "directions must be 1 or 2, got 3"),
        ({"hidden_size": 10, "heads": 3}, "heads must divide hidden_size = 10, got 3"),
        ({"path": "both"}, "path must be one of auto, persistent, alternating, got 'both'"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**options)


def test_a_plan_reads_as_a_sentence() -> None:
    made = plan(dtype=torch.float16)
    assert str(made).startswith("persistent: the weights fit on the chip")
    assert f"floor {made.floor_us:.2f} µs" in str(made)
