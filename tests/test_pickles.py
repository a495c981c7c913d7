"""Pickles are read without calling anything: a sample of ``benchmarks/hostile_checkpoints.py``."""

from __future__ import annotations

import importlib.util
import pickle
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from fusion_bench_intervmerge import pickles

CAMPAIGN = Path(__file__).parents[1] / "benchmarks" / "hostile_checkpoints.py"


@pytest.fixture(scope="module")
def campaign():
    spec = importlib.util.spec_from_file_location(CAMPAIGN.stem, CAMPAIGN)
    module = importlib.util.module_from_spec(spec)
    sys.modules[CAMPAIGN.stem] = module
    spec.loader.exec_module(module)
    return module


def test_hostile_files_run_nothing_leave_nothing_and_are_one_line(campaign, tmp_path, monkeypatch):
    """Every seventh file of the campaign, and all that lie about their tensors."""
    monkeypatch.setenv("FUSION_BENCH_INTERVMERGE_CACHE", str(tmp_path / "cache"))
    campaign.fingerprint()  # the first look imports what it looks at
    before, trace = campaign.fingerprint(), tmp_path / "trace"
    for index, (name, content) in enumerate(campaign.files(str(trace))):
        if index % 7 and not name.startswith("lies"):
            continue
        path = tmp_path / f"checkpoint.{'safetensors' if 'safetensors' in name else 'pt'}"
        path.write_bytes(content)
        outcomes = []
        for load in (campaign.checkpoints.load_encoder, campaign.checkpoints.load_head):
            try:
                load(path)
                outcomes.append("read")
            except campaign.ConfigError as error:
                assert "\n" not in str(error), name
                outcomes.append("refused")
        assert not trace.exists(), name
        if "lie: " in name:
            assert outcomes[0 if "spec" in name else 1] == "refused", name
    assert campaign.fingerprint() == before


@pytest.mark.parametrize("legacy", [False, True])
def test_what_torch_saves_is_read(legacy, tmp_path):
    base = torch.arange(24.0)
    saved = {
        "plain": torch.randn(3, 4),
        "transposed": base.view(4, 6).T,
        "part": base[5:17:3],
        "single": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "half": torch.randn(5).half(),
        "bfloat16": torch.randn(7).bfloat16(),
        "whole numbers": torch.arange(5),
        "parameter": nn.Parameter(torch.randn(2)),
        "expanded": torch.ones(1).expand(1),
    }
    torch.save(saved, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    found = pickles.read(tmp_path / "x.pt")
    for name, tensor in saved.items():
        copied = found[name].tensor()
        assert torch.equal(copied, tensor) and copied.dtype == tensor.dtype, name
        assert copied.data_ptr() % copied.element_size() == 0


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_what_pickle_dumps_is_read(protocol, tmp_path):
    saved = OrderedDict(a=[1, 2.5, None, True, ("x", b"y")], b={"c": {1, 2}}, d=2**70)
    with (tmp_path / "x.pkl").open("wb") as stream:
        pickle.dump(saved, stream, protocol=protocol)
    assert pickles.read(tmp_path / "x.pkl") == saved


def test_one_tensor(tmp_path):
    torch.save(torch.arange(3.0), tmp_path / "x.pt")
    assert torch.equal(pickles.read_tensor(tmp_path / "x.pt"), torch.arange(3.0))
    torch.save([1], tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds a list"):
        pickles.read_tensor(tmp_path / "x.pt")


def test_a_shared_storage_may_be_shown_once(tmp_path):
    tied = torch.randn(1000)
    torch.save({"a": tied, "b": tied}, tmp_path / "x.pt")
    views = pickles.read(tmp_path / "x.pt")
    assert torch.equal(pickles.copy_out({"a": views["a"]}, 10_000)["a"], tied)
    with pytest.raises(pickle.UnpicklingError, match="larger than the file"):
        pickles.copy_out(views, (tmp_path / "x.pt").stat().st_size)
