"""The search compiles few settings, in a useful order."""

import dataclasses

from imagen_jax.planning import search


def test_the_search_tries_meshes_then_remat_policies():
    tried = []

    def attempt(s):
        tried.append(dataclasses.astuple(s))
        # Fits with twice the microbatches or with block; tensor is fast, block is slow.
        fits = s.remat == "block" or s.microbatches >= 2
        seconds = 1 / s.fsdp / s.tensor + (s.remat == "block")
        return {"step_s": seconds if fits else None}

    start = search.Setting("none", 4, 1, 1)
    rows = search.search(start, ("none", "block"), 16, attempt)
    assert tried == [
        ("none", 4, 1, 1),
        ("none", 8, 1, 1),
        ("none", 8, 1, 2),
        ("none", 16, 1, 1),
        ("none", 16, 1, 2),
        ("none", 8, 2, 1),
        ("none", 8, 2, 2),
        ("block", 16, 1, 1),
    ]
    assert [row["step_s"] for row in rows][-3:] == [None, 1 / 16, 1 + 1 / 16]


def test_the_search_halves_the_microbatches_while_that_is_faster():
    tried = []

    def attempt(s):
        tried.append((s.remat, s.microbatches))
        return {"step_s": None if s.microbatches == 1 else s.microbatches + (s.remat == "block")}

    search.search(search.Setting("block", 1, 1, 8), ("none", "block"), 1, attempt)
    assert tried == [("block", 8), ("none", 8), ("none", 4), ("none", 2), ("none", 1)]


def test_a_search_ends_if_nothing_fits():
    tried = []

    def attempt(s):
        tried.append(s.microbatches)
        return {"step_s": None}

    search.search(search.Setting("block", 1, 1, 8), ("block",), 1, attempt)
    assert tried == [8, 16, 32]


def test_the_search_tries_mesh_sizes_that_divide_the_slice():
    assert search.meshes(1) == [(1, 1)]
    assert search.meshes(4) == [(4, 1), (2, 2)]
    assert search.meshes(16) == [(8, 1), (16, 1), (8, 2)]
    assert search.meshes(256) == [(8, 1), (64, 1), (8, 2), (64, 2)]


def test_suggestions_begin_with_the_smallest_change():
    none = search.Setting("none", 1, 1, 1)
    tried = search.nearest(none, 8, split=True)
    assert tried[:2] == [search.Setting("block", 1, 1, 1), search.Setting("none", 8, 1, 1)]
    assert tried[-1] == search.Setting("block", 8, 1, 8)
    assert {s.fsdp for s in search.nearest(none, 8, split=False)} == {1}
    block = search.Setting("block", 8, 1, 1)
    assert search.nearest(block, 8, split=True)[0] == search.Setting("block", 8, 1, 2)
