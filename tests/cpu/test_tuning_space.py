"""Which configs are tried: constraints and candidates. The three bugs of the seed are cases here:
a rank that is always 64, an estimate of the wrong loop, and a key with the raw count of tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tuning_cases import GATED, GRAM, NARROW, PLAIN, SHARED_MEMORY, ask, gram, rows
from turnout.experts.triton_config import gram_config, rows_config
from turnout.ragged import tile_rows_of
from turnout.shapes import SHAPES
from turnout.specs import Activation, GemmProblem
from turnout.tuning.candidates import MOST, Family, built_in, candidates
from turnout.tuning.key import TILES, Ask, Config, Key, bucket_of, octaves
from turnout.tuning.space import fits, registers, shared_memory

CHIPS = sorted(SHARED_MEMORY)


def test_the_best_known_config_of_hopper_is_refused():
    assert fits(ask(), rows(256, 64, warps=8, stages=4)) is None


@pytest.mark.parametrize("arch", CHIPS)
@pytest.mark.parametrize("tokens", [64, 512, 8192, 65536])
def test_the_analytic_default_does_not_fit(arch, tokens):
    """For every product of a LoRA step at the named shapes, on every chip."""
    for shape in SHAPES:
        count, wide = tokens * shape.top_k, 2 * shape.intermediate
        tile = tile_rows_of(count, shape.experts)
        common = {"rows": count, "experts": shape.experts, "dtype": "bfloat16"}
        for n, k in ((wide, shape.hidden), (shape.hidden, shape.intermediate), (16, shape.hidden)):
            for dtype in ("bfloat16", "float32"):
                p = GemmProblem(
                    ragged="m", n=n, k=k, rank=0 if n == 16 else 16, weight_dtype=dtype,
                    **(common | {"dtype": dtype}), narrow=n == 16,
                )  # fmt: skip
                question = ask(p, arch, tile)
                config = Config.of(rows_config(p, tile, question.device))
                assert fits(question, config) is None, (p, config)
                g = replace(p, ragged="k", rank=0, narrow=False, gathered=True)
                question = ask(g, arch)
                assert fits(question, Config.of(gram_config(g, question.device))) is None


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (rows(256, 64, warps=4), "registers"),
        (rows(256, 128, stages=4), "shared memory"),
        (rows(96), "power of two"),
        (rows(8), "power of two"),
        (rows(128, warps=3), "num_warps"),
        (rows(128, stages=9), "num_stages"),
        (rows(128, group=0), "GROUP"),
        (rows(4096, 16, warps=16), "there are"),
        (gram(128, 128), "takes"),
        (Config.of({"BLOCK_N": 128}), "takes"),
    ],
    ids=str,
)
def test_an_impossible_config_is_tried(config, word):
    reason = fits(ask(), config)
    assert reason is not None
    assert word in reason


def test_warps_do_not_count_for_registers():
    """The seed divided by 32 whatever the warps, so no 128 x 128 tile was left."""
    assert fits(ask(), rows(128, warps=4)) is None
    assert registers(ask(), rows(256, warps=8)) < registers(ask(), rows(256, warps=4))
    assert fits(ask(), rows(256, warps=8)) is None
    assert "4 warps" in str(fits(ask(), rows(256, warps=4)))


def test_the_rank_is_taken_as_64_whatever_it_is():
    """A narrow product is as wide as the padded rank, and a tail outside of the loop has sums."""
    assert "rank" in str(fits(ask(NARROW), rows(64)))
    assert fits(ask(replace(NARROW, n=64)), rows(64)) is None
    masked = replace(PLAIN, rank=16, dropout=True)
    assert fits(ask(replace(masked, rank=0)), rows(256)) is None
    assert "registers" in str(fits(ask(masked), rows(256)))
    assert ask(replace(GATED, rank=16)).key != ask(replace(GATED, rank=64)).key
    sixteen, sixty_four = ask(NARROW), ask(replace(NARROW, n=64))
    assert candidates(sixteen)[0] != candidates(sixty_four)[0]


def test_the_estimate_is_of_another_loop_than_the_kernels():
    """`rows` steps over K, `gram` over the rows: each stage holds what one step reads."""
    assert shared_memory(ask(), rows(128, 64, stages=3)) == 3 * (128 + 128) * 64 * 2
    dense = replace(PLAIN, ragged="k", gathered=False)
    by_rows = shared_memory(ask(dense), gram(128, 128, m=64, stages=3))
    assert by_rows == 3 * (128 + 128) * 64 * 2 + 16
    assert shared_memory(ask(dense), gram(128, 128, m=128, stages=3)) > 1.9 * by_rows


def test_float32_is_counted_as_two_bytes():
    wide = replace(PLAIN, dtype="float32", weight_dtype="float32")
    half, full = (
        shared_memory(ask(PLAIN, 80), rows(64, 32)),
        shared_memory(ask(wide, 80), rows(64, 32)),
    )
    assert full == 2 * half


def test_the_accumulator_is_counted_as_shared_memory():
    one = shared_memory(ask(), rows(128, 64, stages=4))
    assert one == 4 * 256 * 64 * 2


def test_shared_memory_of_one_chip_is_used_for_all():
    config = rows(256, 64, stages=3)
    assert fits(ask(PLAIN, 90), config) is None
    assert "101376" in str(fits(ask(PLAIN, 120, name="RTX"), rows(256, 64, stages=4)))
    assert fits(ask(PLAIN, 80), config) is None  # one buffer less than Hopper


@pytest.mark.parametrize("arch", CHIPS)
@pytest.mark.parametrize("problem", [PLAIN, GATED, NARROW, GRAM, replace(GRAM, n=2048, k=768)])
@pytest.mark.parametrize("tile", [16, 64, 128])
def test_a_problem_has_nothing_or_too_much_to_try(arch, problem, tile):
    kept, pruned = candidates(ask(problem, arch, tile))
    assert 4 <= len(kept) <= MOST
    assert not set(kept) & set(pruned)
    assert all(reason for reason in pruned.values())


@pytest.mark.parametrize("kernel", TILES)
@pytest.mark.parametrize("is_roomy", [True, False])
@pytest.mark.parametrize("item", [2, 4])
def test_a_list_is_too_long_or_repeats_itself(kernel, is_roomy, item):
    for tile in (16, 64, 128) if kernel == "rows" else (0,):
        for narrow in (0, 16, 64):
            family = Family(kernel=kernel, tile_rows=tile, item=item, narrow=narrow)
            found = built_in(family, is_roomy)
            assert len(found) == len(set(found)) <= MOST


def test_a_shipped_list_is_not_tried_instead_of_the_built_in_one():
    kept, pruned = candidates(ask(), (rows(128), rows(128), rows(256, warps=4)))
    assert kept == (rows(128),)
    assert list(pruned) == [rows(256, warps=4)]


def test_the_key_holds_the_raw_count_of_tokens():
    few, more = ask(replace(PLAIN, rows=100_000)), ask(replace(PLAIN, rows=131_072))
    assert few.key == more.key
    assert bucket_of(few.rows) == bucket_of(more.rows) == 131_072


@pytest.mark.parametrize(
    ("count", "bucket"), [(0, 1), (1, 1), (3, 4), (90, 64), (91, 128), (131072, 131072)]
)
def test_a_bucket_is_not_the_nearest_power_of_two(count, bucket):
    assert bucket_of(count) == bucket
    assert octaves(count, bucket) <= 0.5 + 1e-9


@pytest.mark.parametrize(
    "change",
    [
        {"experts": 64},
        {"n": 1024},
        {"k": 1024},
        {"rank": 32},
        {"dtype": "float16"},
        {"weight_dtype": "float32"},
        {"epilogue": None, "activation": None},
        {"activation": Activation(interleaved=True)},
        {"gathered": False},
        {"weight_k_major": False},
        {"bias": True},
        {"dropout": True},
    ],
    ids=str,
)
def test_two_problems_share_a_key(change):
    assert ask(GATED).key != ask(replace(GATED, **change)).key


def test_the_row_tile_or_the_chip_or_triton_is_missing_in_the_key(monkeypatch):
    assert ask(tile_rows=64).key != ask(tile_rows=128).key
    assert ask(arch=80).key != ask(arch=90).key
    before = ask().key
    monkeypatch.setattr("turnout.tuning.key.triton_version", lambda: "9.9")
    assert ask().key != before


def test_a_key_changes_on_its_way_through_json():
    for problem in (PLAIN, GATED, NARROW, GRAM):
        key = ask(problem).key
        assert Key.from_dict(key.to_dict()) == key
    interpreter = replace(ask().key, arch=None)
    assert Key.from_dict(interpreter.to_dict()) == interpreter
    assert "E=128 N=1536 K=2048 R=16" in str(ask(GATED).key)


@pytest.mark.parametrize(
    "change",
    [{"kernel": "scatter"}, {"n": "1"}, {"n": True}, {"layout": "k_major"}, {"arch": "90"}],
    ids=str,
)
def test_a_wrong_key_is_taken(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Key.from_dict(ask().key.to_dict() | change)
    values = ask().key.to_dict()
    del values["k"]
    with pytest.raises(ValueError, match="k is missing"):
        Key.from_dict(values)


def test_a_question_can_not_be_a_key_of_a_dict():
    assert {ask(): 1}[
        Ask(kernel="rows", problem=PLAIN, device=ask().device, tile_rows=128, top_k=8)
    ]
