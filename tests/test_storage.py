"""Edits in fewer bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_bench_intervmerge.model.artifact import pack, size, unpack


def tensors(seed: int, spread: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = 10.0 ** (spread * torch.randn(5, 1, generator=generator)) * torch.randn(
        5, 7, generator=generator
    )
    rows[2] = 0
    return {"W1": rows, "b": torch.randn(5, generator=generator)}


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), spread=st.floats(0, 6))
def test_int8_is_off_by_half_a_step_of_its_row_and_packs_to_the_same_bits(seed, spread):
    given = tensors(seed, spread)
    packed = pack(given, "int8")
    found = unpack(packed)
    for name, tensor in given.items():
        step = tensor.abs().amax(dim=-1, keepdim=True) / 127
        assert ((found[name] - tensor).abs() <= step * 0.5 * (1 + 2**-7)).all()
    again = pack(found, "int8")
    assert again.keys() == packed.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in packed.items())


@pytest.mark.parametrize(("storage", "bytes_"), [("float32", 160), ("float16", 80), ("int8", 64)])
def test_sizes(storage, bytes_):
    assert size(tensors(0, 0), storage) == bytes_  # int8: 40 numbers, and 6 scales of 4 bytes


def test_other_storages_come_back_as_they_were_stored():
    given = tensors(1, 0)
    same, half = unpack(pack(given, "float32")), unpack(pack(given, "float16"))
    for name, tensor in given.items():
        assert torch.equal(same[name], tensor)
        assert torch.equal(half[name], tensor.half().float())


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="W1 has numbers beyond float16"):
        pack({"W1": torch.tensor([[1e6]])}, "float16")
    packed = pack(tensors(0, 0), "int8")
    with pytest.raises(ValueError, match="W1 has no scale"):
        unpack({name: t for name, t in packed.items() if name != "W1.scale"})
