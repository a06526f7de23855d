"""DoRA, PiSSA, ranks by module and rsLoRA are PEFT's, and each is the plain adapter that it is exported as."""

import jax
import numpy as np
import pytest

from jaxlora.core.errors import InputError
from jaxlora.core.tree import leaves, map_leaves
from jaxlora.lora import tree, variants
from jaxlora.lora.peft import load_peft, save_peft
from jaxlora.lora.spec import TARGETS, LoraSpec

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")
CLOSE = 1e-4  # of float32 logits, whose largest are of order ten
PATTERN = ("q_proj=7", "mlp.*=2", "*_proj=3")


def random_adapter(base, lora):
    """Pairs in which b is not zero, as after training."""
    rng = np.random.default_rng(0)
    return map_leaves(
        lambda _, leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32),
        tree.adapter_shapes(base, lora.ranks),
    )


def spread(model, names, seed=0):
    """Gives PEFT's parameters of these names random values, as after training."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(known in name for known in names):
                noise = torch.randn(parameter.shape, generator=draw)
                parameter.copy_(parameter * (1 + 0.3 * noise) if "magnitude" in name else 0.3 * noise)


def changed(start, seed=0):
    """An adapter some way from where it started."""
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        noise = rng.standard_normal(x.shape, np.float32)
        return np.asarray(x) * (1 + 0.3 * noise) if path[-1] == "m" else np.asarray(x) + 0.2 * noise

    return map_leaves(leaf, start)


# ---- DoRA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Qwen2", "Mistral"])
@pytest.mark.parametrize("rslora", [False, True])
def test_dora_is_pefts_both_ways(name, rslora, tmp_path, peft, make_pair, close):
    pair = make_pair(tmp_path / "base", name)
    config = peft.LoraConfig(
        r=5,
        lora_alpha=7,
        target_modules="all-linear",
        use_dora=True,
        use_rslora=rslora,
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(pair.model, config).eval()
    spread(theirs, ["lora_A", "lora_B", "magnitude"])
    theirs.save_pretrained(tmp_path / "theirs")
    expected = pair.theirs(theirs)

    adapter, lora = load_peft(tmp_path / "theirs", pair.spec)
    assert lora == LoraSpec(5, 7.0, 0.0, TARGETS, "rslora" if rslora else "alpha/r", use_dora=True)
    effective = variants.effective(pair.base, adapter, lora.scales)
    close(
        "DoRA: logits against PEFT, ours exported, PEFT's imported, merged",
        pair.logits(effective),
        expected,
        CLOSE,
    )
    # the magnitudes are felt
    without = variants.effective(
        pair.base, map_leaves(lambda p, x: x * (2 if p[-1] == "m" else 1), adapter), lora.scales
    )
    assert np.abs(pair.logits(without) - expected).max() > 0.1
    # merged = applied
    close(
        "DoRA: logits against PEFT, ours exported, PEFT's imported, merged",
        pair.logits(base=tree.merge(pair.base, effective)),
        expected,
        CLOSE,
    )

    save_peft(tmp_path / "ours", adapter, lora, str(tmp_path / "base"))
    fresh = make_pair(tmp_path / "base", name).model
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    close(
        "DoRA: logits against PEFT, ours exported, PEFT's imported, merged",
        pair.theirs(again),
        expected,
        1e-5,
    )


def test_dora_starts_from_the_bases_norms_and_changes_nothing(tmp_path, make_pair):
    pair = make_pair(tmp_path, "Qwen2")
    lora = LoraSpec(rank=4, use_dora=True)
    adapter, anchor = variants.start(jax.random.key(0), pair.base, lora)
    kernel = np.asarray(pair.base["layers"]["mlp"]["down_proj"]["kernel"])
    np.testing.assert_allclose(
        adapter["layers"]["mlp"]["down_proj"]["m"], np.linalg.norm(kernel, axis=1), rtol=1e-6
    )
    assert anchor == {}
    effective = variants.effective(pair.base, adapter, lora.scales)
    np.testing.assert_allclose(pair.logits(effective), pair.logits(), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_norm_by_parts_is_the_norm_of_the_sum(dtype, tmp_path, make_pair):
    pair = make_pair(tmp_path, "Mistral")
    base = jax.tree.map(lambda x: x.astype(dtype), pair.base)
    lora = LoraSpec(rank=4, alpha=8.0, use_dora=True)
    adapter = changed(variants.start(jax.random.key(0), base, lora)[0])
    found = jax.jit(variants.column_norms)(base, adapter, lora.scales)
    assert len(found) == len(TARGETS)
    for path, norms in found.items():
        block, name = path[1:]
        kernel = np.asarray(base["layers"][block][name]["kernel"], np.float64)
        parts = adapter["layers"][block][name]
        whole = kernel + lora.scale * np.asarray(parts["a"], np.float64) @ parts["b"]
        tolerance = 1e-6 if dtype == "float32" else 2e-3  # bfloat16 rounds a for the product with W
        np.testing.assert_allclose(norms, np.linalg.norm(whole, axis=1), rtol=tolerance)


# ---- PiSSA ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_starts_as_pefts_does(rslora, tmp_path, peft, make_pair, close):
    pair = make_pair(tmp_path / "base", "Qwen2")
    lora = LoraSpec(6, 9.0, targets=("q_proj", "down_proj"), scaling="rslora" if rslora else "alpha/r")
    before = pair.theirs()
    config = peft.LoraConfig(
        r=6, lora_alpha=9, target_modules=["q_proj", "down_proj"], use_rslora=rslora,
        init_lora_weights="pissa", task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = peft.get_peft_model(pair.model, config).eval()
    adapter, anchor = variants.start(jax.random.key(0), pair.base, lora, "pissa")
    parameters = dict(theirs.named_parameters())
    for path, parts in tree.modules(adapter).items():
        for layer in range(pair.spec.num_layers):
            module = f"base_model.model.model.layers.{layer}.{'.'.join(path[1:])}"
            a, b, rest = (
                parameters[f"{module}.{name}.weight"].detach().numpy().T
                for name in ("lora_A.default", "lora_B.default", "base_layer")
            )
            product = np.asarray(parts["a"][layer]) @ np.asarray(parts["b"][layer])
            np.testing.assert_allclose(product, a @ b, atol=2e-5)  # each pair has a sign of its own
            kernel = np.asarray(pair.base["layers"][path[1]][path[2]]["kernel"][layer])
            np.testing.assert_allclose(kernel - lora.scale * product, rest, atol=2e-5)
            np.testing.assert_allclose(np.abs(parts["a"][layer]), np.abs(a), atol=2e-3)
    effective = variants.effective(pair.base, adapter, lora.scales, anchor)
    close("PiSSA's start: logits against the bare base's", pair.logits(effective), before)
    close("PiSSA's start in PEFT: the same", pair.theirs(theirs), before)


def test_pissa_by_iteration_finds_the_same_subspace(tmp_path, make_pair):
    pair = make_pair(tmp_path, "Qwen2")
    lora = LoraSpec(rank=6, targets=("up_proj",))
    exact, _ = variants.start(jax.random.key(0), pair.base, lora, "pissa")
    quick, anchor = variants.start(jax.random.key(0), pair.base, lora, "pissa_niter_16")
    a, b = (tree.modules(x)["layers", "mlp", "up_proj"] for x in (exact, quick))
    expected = np.matmul(a["a"], a["b"])
    assert np.linalg.norm(np.matmul(b["a"], b["b"]) - expected) < 1e-3 * np.linalg.norm(expected)
    for path, leaf in leaves(anchor):
        np.testing.assert_array_equal(leaf, dict(leaves(quick))[path])


@pytest.mark.parametrize("use_dora", [False, True])
def test_pissa_is_exported_as_an_ordinary_adapter_on_the_bases_own_weights(
    use_dora, tmp_path, peft, make_pair, close
):
    pair = make_pair(tmp_path / "base", "Qwen2")
    lora = LoraSpec(4, 6.0, scaling="rslora", use_dora=use_dora)
    start, anchor = variants.start(jax.random.key(0), pair.base, lora, "pissa")
    adapter = changed(start)
    expected = pair.logits(variants.effective(pair.base, adapter, lora.scales, anchor))
    save_peft(tmp_path / "a", *variants.ordinary(adapter, lora, anchor), str(tmp_path / "base"))
    loaded, found = load_peft(tmp_path / "a", pair.spec)
    assert found.rank == 8
    assert found.scale == pytest.approx(lora.scale)
    theirs = pair.theirs(peft.PeftModel.from_pretrained(pair.model, tmp_path / "a").eval())
    assert np.abs(theirs - pair.logits()).max() > 0.1
    close(
        "PiSSA exported as an ordinary adapter: logits against PEFT on the base's own weights",
        theirs,
        expected,
        CLOSE,
    )
    close(
        "PiSSA exported as an ordinary adapter: logits against PEFT on the base's own weights",
        pair.logits(variants.effective(pair.base, loaded, found.scales)),
        expected,
        CLOSE,
    )


# ---- ranks by module -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["alpha/r", "rslora"])
def test_ranks_by_module_are_pefts_and_are_exported_as_one_rank(scaling, tmp_path, peft, make_pair, close):
    pair = make_pair(tmp_path / "base", "Mistral")
    lora = LoraSpec(5, 8.0, scaling=scaling, rank_pattern=PATTERN)
    ranks = {"q_proj": 7, "k_proj": 3, "v_proj": 3, "o_proj": 3, "gate_proj": 2, "up_proj": 2, "down_proj": 2}
    assert lora.ranks == ranks
    adapter = random_adapter(pair.base, lora)
    config = peft.LoraConfig(
        r=5, lora_alpha=8, target_modules=list(TARGETS), rank_pattern=ranks,
        use_rslora=scaling == "rslora", task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = peft.get_peft_model(pair.model, config).eval()
    import torch

    with torch.no_grad():
        for path, parts in tree.modules(adapter).items():
            for layer in range(pair.spec.num_layers):
                module = theirs.get_submodule(f"base_model.model.model.layers.{layer}.{'.'.join(path[1:])}")
                module.lora_A["default"].weight.copy_(torch.from_numpy(parts["a"][layer].T))
                module.lora_B["default"].weight.copy_(torch.from_numpy(parts["b"][layer].T))
    expected = pair.theirs(theirs)
    close(
        "ranks by module: logits against PEFT, applied and exported as one rank",
        pair.logits(tree.scale(adapter, lora.scales)),
        expected,
        CLOSE,
    )

    save_peft(tmp_path / "a", *variants.ordinary(adapter, lora), str(tmp_path / "base"))
    fresh = make_pair(tmp_path / "base", "Mistral").model
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "a").eval()
    assert again.peft_config["default"].rank_pattern == {}
    assert again.peft_config["default"].r == 7
    close(
        "ranks by module: logits against PEFT, applied and exported as one rank",
        pair.theirs(again),
        expected,
        CLOSE,
    )


def test_a_plain_adapter_is_ordinary_as_it_is(tmp_path, make_pair):
    pair = make_pair(tmp_path, "Qwen2")
    lora = LoraSpec(rank=4, alpha=3.0)
    adapter = random_adapter(pair.base, lora)
    same, spec = variants.ordinary(adapter, lora)
    assert spec is lora
    for path, leaf in leaves(adapter):
        np.testing.assert_array_equal(dict(leaves(same))[path], leaf)
    scaled = variants.effective({}, adapter, lora.scales)
    for path, leaf in leaves(tree.scale(adapter, lora.scale)):
        np.testing.assert_array_equal(dict(leaves(scaled))[path], leaf)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"rank_pattern": ("q_proj=0",)},
            r"lora.rank_pattern has 'q_proj=0', and its value is 0; .* positive",
        ),
        ({"rank_pattern": ("q_proj=x",)}, "its value is 'x'; it must be a positive integer"),
        ({"rank_pattern": ("q_proj",)}, "its value is ''"),
        ({"rank_pattern": ("lm_head=4",)}, "matches none of the adapted modules: self_attn.q_proj"),
        ({"rank_pattern": ("v_proj=4",), "targets": ("q_proj",)}, "matches none .*: self_attn.q_proj."),
        ({"dropout_pattern": ("q_proj=1.0",)}, "its value is 1.0; it must be at least 0 and below 1"),
        ({"dropout_pattern": ("up*=nan",)}, "its value is nan"),
    ],
)
def test_a_pattern_that_means_nothing_is_refused(changes, said):
    with pytest.raises(InputError, match=said):
        LoraSpec(**changes)


def test_the_first_pattern_that_matches_counts():
    lora = LoraSpec(
        dropout=0.1, dropout_pattern=("down_proj=0.3", "mlp.*=0"), rank_pattern=("self_attn.?_proj=2",)
    )
    assert lora.dropouts == dict.fromkeys(TARGETS, 0.1) | {"gate_proj": 0, "up_proj": 0, "down_proj": 0.3}
    assert [lora.ranks[name] for name in TARGETS] == [2] * 4 + [16] * 3
    assert lora.scales["q_proj"] == 16
