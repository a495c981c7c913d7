"""Where an edit acts: blocks, tokens, parts; everything else is left alone."""

from __future__ import annotations

import pytest
import torch
from conftest import acts, relative
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.interventions.config import InterventionConfig
from fusion_bench_intervmerge.interventions.functions import build_function
from fusion_bench_intervmerge.interventions.placement import (
    Placement,
    resolve_blocks,
    resolve_tokens,
)


def fit(width=768, num_blocks=12, num_tokens=50, **settings_):
    config = InterventionConfig(**settings_)
    return Placement.fit(config, width=width, num_blocks=num_blocks, num_tokens=num_tokens)


def test_mini_noreft_gives_the_published_numbers(golden):
    function = build_function("noreft", 64, 3)
    with torch.no_grad():
        for name in ("W1", "W2"):
            getattr(function, name).copy_(golden[f"mini.noreft.0:64.{name}"])
        function.b.copy_(golden["mini.noreft.0:64.b"] - golden["mini.noreft.0:64.b2"])
    z, expected = golden["mini.z"], golden["mini.noreft.0:64.output"]
    edited = fit(part=[0, 64], num_tokens=1 + 1).apply(z.unsqueeze(1).clone(), 0, function)
    assert relative(edited.squeeze(1), expected) < 1e-5
    assert acts(z, expected) and torch.equal(z[:, 64:], expected[:, 64:])


@pytest.mark.parametrize("block", [0, 3, 11])
def test_a_shifted_part_is_that_blocks_slice(block, golden):
    placement = fit(part={"size": 64, "shift": True})
    assert placement.parts[block] == slice(64 * block, 64 * block + 64)
    function = build_function("lobireft", 64, 3)
    with torch.no_grad():
        function.R = golden[f"mini.lobireft.shift.block{block}.R"]
        function.b.copy_(golden[f"mini.lobireft.shift.block{block}.b"])
    z, expected = golden["mini.z"], golden[f"mini.lobireft.shift.block{block}.output"]
    edited = placement.apply(z.unsqueeze(1).clone(), block, function)
    assert relative(edited.squeeze(1), expected) < 1e-5
    assert acts(z, expected)


def test_parts_may_be_shares_of_the_width():
    assert fit(part={"size": 0.25, "start": 0.5}).parts[3] == slice(384, 576)
    assert fit(part={"size": 1.0}).width == 768
    assert fit(part={"size": 0.0001}).width == 1
    even = fit(part={"size": "even", "shift": True})
    assert even.width == 64 and even.parts[11] == slice(704, 768)
    spread = fit(part={"size": "even", "shift": True}, blocks="every_4")
    assert spread.parts == {0: slice(0, 256), 4: slice(256, 512), 8: slice(512, 768)}


@given(
    size=st.integers(1, 30),
    start=st.integers(0, 29),
    block=st.integers(0, 11),
    shift=st.booleans(),
)
def test_shifted_parts_wrap_where_the_width_ends(size, start, block, shift):
    part = fit(width=30, part={"size": size, "start": start, "shift": shift}).parts[block]
    found = torch.arange(30)[part].tolist()
    begin = start + (block * size if shift else 0)
    assert found == [(begin + offset) % 30 for offset in range(size)]


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_nothing_outside_the_edit_is_touched(data):
    width, tokens = 12, 6
    chosen = data.draw(
        st.one_of(
            st.sampled_from(["class", "first", "middle", "last", "patch", "all"]),
            st.lists(st.integers(0, tokens - 1), min_size=1, max_size=4, unique=True),
        )
    )
    part = data.draw(
        st.sampled_from(
            [None, [0, 4], [5, 12], [[0, 3], [7, 9]], {"size": 5, "start": 9, "shift": True}]
        )
    )
    share = data.draw(st.booleans())
    placement = fit(
        width=width, num_blocks=4, num_tokens=tokens, tokens=chosen, part=part, share_tokens=share
    )
    function = build_function("noreft", placement.width, 2, copies=placement.copies)
    z = torch.randn(3, tokens, width)
    edited = placement.apply(z.clone(), 2, function)
    rows = torch.zeros(tokens, dtype=torch.bool)
    columns = torch.zeros(width, dtype=torch.bool)
    rows[placement.tokens], columns[placement.parts[2]] = True, True
    inside = rows[:, None] & columns[None, :]
    assert torch.equal(edited[:, ~inside], z[:, ~inside])
    expected = function(z[:, rows][:, :, placement.parts[2]])
    torch.testing.assert_close(edited[:, rows][:, :, placement.parts[2]], expected)


def test_gradients_reach_the_edit_and_what_it_read():
    placement = fit(width=8, num_blocks=1, num_tokens=4, part=[2, 6])
    function = build_function("noreft", 4, 2).double()
    source = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    inputs = (source, *function.parameters())
    assert torch.autograd.gradcheck(lambda z, *_: placement.apply(z * 1, 0, function), inputs)


def test_named_blocks():
    resolve = {n: resolve_blocks(n, 12) for n in ("every_4", "first_3", "last_3")}
    assert resolve == {"every_4": [0, 4, 8], "first_3": [0, 1, 2], "last_3": [9, 10, 11]}
    assert resolve_blocks("all", 5) == [0, 1, 2, 3, 4]
    assert resolve_blocks("middle_1", 12) == [5]
    assert resolve_blocks([8, 0, 4], 12) == [0, 4, 8]


def test_named_tokens_are_the_papers_patch_positions():
    assert resolve_tokens("first", 50) == slice(1, 2)
    assert resolve_tokens("middle", 50) == slice(25, 26)
    assert resolve_tokens("last", 50) == slice(49, 50)
    assert resolve_tokens("patch", 50) == slice(1, 50)
    assert resolve_tokens("all", 50) == slice(0, 50)
    assert resolve_tokens([7, 0], 50).tolist() == [0, 7]


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"blocks": "every_0"}, "blocks: 'every_0' does not name blocks"),
        ({"blocks": "some"}, "blocks: 'some' does not name blocks"),
        ({"blocks": [12]}, "there is no block 12; allowed: all, every_n"),
        ({"blocks": [-1]}, "there is no block -1"),
        ({"blocks": [3, 3]}, "a block is named twice"),
        ({"blocks": []}, "blocks: []; allowed: all, every_n"),
        ({"tokens": "cls"}, "tokens: 'cls' does not name tokens; allowed: class"),
        ({"tokens": [50]}, "there is no token position 50"),
        ({"part": [700, 800]}, "part: [700, 800] lies outside the width 768"),
        ({"part": [64, 64]}, "lies outside the width"),
        ({"part": [[0, 8], [4, 12]]}, "the spans overlap"),
        ({"part": {"size": 0}}, "part.size: 0 does not fit; allowed: 1 to 768"),
        ({"part": {"size": 1.5}}, "part.size: 1.5 does not fit"),
        ({"part": {"size": "odd"}}, "part.size: 'odd' does not fit"),
        ({"rank": 9, "part": [0, 8]}, "rank: 9 does not fit vectors of width 8; allowed: 1 to 8"),
        ({"part": {"size": 8, "start": 1.0}}, "part.start: 1.0 does not fit"),
        ({"part": {"size": 8, "start": 768}}, "part.start: 768"),
        ({"part": {"width": 8}}, "part.width: no such setting"),
        ({"part": "half"}, "part: 'half'; allowed: null, [j, p]"),
    ],
)
def test_says_in_one_line_what_does_not_exist(settings_, message):
    with pytest.raises(ConfigError) as error:
        fit(**settings_)
    assert message in str(error.value) and "\n" not in str(error.value)
