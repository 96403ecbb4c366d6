"""The table of names: bit for bit both ways, nothing lost, nothing made up, and every problem in one report."""

from functools import partial

import pytest
import torch
from helpers import noise, random_core
from scripts import load_script

key_map = load_script("cli", "key_map")
KeyMap, KeyMapError, Rule, core_key_map = key_map.KeyMap, key_map.KeyMapError, key_map.Rule, key_map.core_key_map
assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)


def transposed(x):
    return x.transpose(0, 1)


TABLE = KeyMap(
    [
        Rule("in.w", ("model.in.weight",), to_model=transposed, to_raw=transposed),
        Rule("layer.{}.qkv", ("blocks.{}.q", "blocks.{}.k", "blocks.{}.v")),
        Rule("layer.{}.qkv_t", ("blocks.{}.q_t", "blocks.{}.k_t"), to_model=transposed, to_raw=transposed),
    ],
    ignored=["mask", "layer.{}.unused"],
)


def example():
    raw = {"in.w": noise(2, 3), "layer.7.qkv": noise(6, 4, seed=1), "layer.12.qkv": noise(6, 4, seed=2)}
    raw["layer.7.qkv_t"] = noise(4, 6, seed=3)
    shapes = {"model.in.weight": (3, 2), "blocks.7.q_t": (3, 4), "blocks.7.k_t": (3, 4)}
    return raw, {**shapes, **{f"blocks.{i}.{part}": (2, 4) for i in (7, 12) for part in "qkv"}}


def test_parts_and_permutations_are_where_the_rules_put_them():
    raw, shapes = example()
    made = TABLE.to_model(raw, shapes)
    assert torch.equal(made["model.in.weight"], raw["in.w"].T)
    for number in (7, 12):
        for i, part in enumerate("qkv"):
            assert torch.equal(made[f"blocks.{number}.{part}"], raw[f"layer.{number}.qkv"][2 * i : 2 * i + 2])
    # Turned first, cut afterwards.
    assert torch.equal(made["blocks.7.k_t"], raw["layer.7.qkv_t"][:, 3:].T)
    assert list(made) == list(shapes)
    assert_same(TABLE.to_raw(made), raw)


def test_what_is_ignored_is_not_asked_for_and_not_in_the_way():
    raw, shapes = example()
    ignored = {"mask": torch.tensor(1), "layer.3.unused": noise(2)}
    assert_same(TABLE.to_model({**raw, **ignored}, shapes), TABLE.to_model(raw, shapes))
    with pytest.raises(KeyMapError, match=r"the model has no such part \(1\):\s+layer.x.unused"):
        TABLE.to_model({**raw, "layer.x.unused": noise(2)}, shapes)


def test_fused_projections_are_those_that_the_model_makes():
    core = random_core()
    made = {f"core.{name}": x for name, x in core.state_dict().items()}
    shapes = {name: x.shape for name, x in made.items()}
    fused = core_key_map(fused=True).to_raw(made)
    attention = core.decoder.blocks[1].attn
    attention.fuse_projections()
    for kind in ("weight", "bias"):
        assert torch.equal(fused[f"decoder.blocks.1.attn.to_qkv.{kind}"], getattr(attention.to_qkv, kind))
    assert not any(".to_q." in name or ".to_k." in name or ".to_v." in name for name in fused)
    # Fusing leaves the parts in the state dict, beside what they make.
    assert_same(core_key_map().to_model(core.state_dict(), shapes), made)


BROKEN = {
    "missing": ({"layer.7.qkv": None}, "missing in the checkpoint (1):\n  layer.7.qkv"),
    "left over": ({"other": noise(2)}, "the model has no such part (1):\n  other"),
    "another writing of 7": ({"layer.07.qkv": noise(6, 4)}, "no such part (1):\n  layer.07.qkv"),
    "a dot is no pattern": ({"inxw": noise(2, 3)}, "no such part (1):\n  inxw"),
    "shape": ({"layer.7.qkv": noise(7, 4)}, "layer.7.qkv: found (7, 4), expected (6, 4)"),
    "turned": ({"in.w": noise(3, 2)}, "in.w: found (3, 2), which becomes (2, 3), expected (3, 2)"),
    "not to be turned": ({"in.w": noise(3)}, "in.w: found (3,), expected what becomes (3, 2)"),
    "NaN": ({"in.w": torch.full((2, 3), torch.nan)}, "not finite (1):\n  in.w"),
    "integers": ({"in.w": torch.ones(2, 3, dtype=torch.int64)}, "in.w: found torch.int64"),
    "no tensor": ({"in.w": [1.0]}, "no tensors (1):\n  in.w: found list"),
    "no values": ({"in.w": torch.ones(2, 3, device="meta")}, "in.w: found torch.strided on meta"),
    "sparse": ({"in.w": torch.ones(2, 3).to_sparse()}, "in.w: found torch.sparse_coo on cpu"),
    "larger than memory": ({"in.w": torch.ones(1, 1).expand(2**40, 2**20)}, "found (1099511627776, 1048576)"),
}


@pytest.mark.parametrize("change, message", BROKEN.values(), ids=BROKEN)
def test_a_problem_says_what_was_found_and_expected(change, message):
    raw, shapes = example()
    broken = {key: x for key, x in {**raw, **change}.items() if x is not None}
    with pytest.raises(KeyMapError) as told:
        TABLE.to_model(broken, shapes)
    assert message in str(told.value)
    assert told.value.count == 1


def test_all_problems_are_told_at_once_and_long_lists_are_cut():
    raw, shapes = example()
    broken = {key: x for key, x in raw.items() if key != "in.w"} | {f"more.{i}": noise(1) for i in range(30)}
    broken["layer.7.qkv"] = torch.full((6, 4), torch.nan)
    with pytest.raises(KeyMapError) as told:
        TABLE.to_model(broken, shapes)
    report = str(told.value)
    assert told.value.count == 32
    assert "in.w" in report and "layer.7.qkv: found NaN" in report
    assert "no such part (30)" in report and "... and 22 more" in report and "more.20" not in report


def test_what_the_rules_and_the_model_do_not_share_is_named():
    raw, shapes = example()
    with pytest.raises(KeyMapError, match="extra, which no rule makes"):
        TABLE.to_model(raw, {**shapes, "extra": (1,)})
    with pytest.raises(KeyMapError, match=r"only partly in the model \(1\):\s+layer.7.qkv.*blocks.7.k"):
        TABLE.to_model(raw, {name: shape for name, shape in shapes.items() if name != "blocks.7.k"})
    made = TABLE.to_model(raw, shapes)
    for state, message in [
        ({**made, "extra": noise(1)}, r"no rule makes it \(1\):\s+extra"),
        ({name: x for name, x in made.items() if name != "blocks.12.v"}, r"missing in the model \(1\):\s+blocks.12.v"),
        ({**made, "blocks.12.v": made["blocks.12.v"].double()}, "not parts of one tensor"),
    ]:
        with pytest.raises(KeyMapError, match=message):
            TABLE.to_raw(state)
