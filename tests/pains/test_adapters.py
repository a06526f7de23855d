"""Pains of the adapter: decay that does nothing, steps of another size, and answers that change on the way out."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxlora.config.build import programs
from jaxlora.config.schema import Config
from jaxlora.core.tree import leaves, unflatten
from jaxlora.lora import tree as lora
from jaxlora.lora.peft import load_peft, save_peft
from jaxlora.lora.spec import TARGETS, LoraSpec
from jaxlora.models.decoder import Decoder, unembedding
from jaxlora.models.spec import DecoderSpec
from jaxlora.models.weights import load_params, param_shapes, resolve_model
from jaxlora.training.optimizer import decay_budget, learning_rate

# ---- weight decay, and the scale ----------------------------------------------------------------------------------


def test_weight_decay_seems_to_do_nothing(make_tiny, train_step, finished):
    """`plan` and the journal print this decay budget; the decay applied to A and B is the configured one"""
    tiny = make_tiny(weight_decay=0.5, learning_rate=0.1)
    batch = tiny.batch(0, 8, 16, 1)
    # A head of zeros has no gradient: what moves is moved by decay alone.
    base = {**tiny.base, "lm_head": jax.tree.map(jnp.zeros_like, tiny.base["lm_head"])}
    state, shrunk = tiny.state, 1.0
    for step in range(4):
        shrunk *= 1.0 - 0.5 * float(learning_rate(tiny.state.settings.optimizer, step))
        state, _ = train_step(state, base, batch)
    assert shrunk < 0.9
    for path, leaf in leaves(state.adapter):
        start = dict(leaves(tiny.state.adapter))[path]
        np.testing.assert_allclose(leaf, shrunk * start, rtol=1e-5, atol=1e-7, err_msg=str(path))

    # The budget of a whole run, in the figures of the pain: 3,000 steps of 2e-4, half of which a cosine leaves.
    settings = tiny.state.settings.optimizer._replace(
        learning_rate=2e-4, warmup_steps=0, total_steps=3000, final_fraction=0.0
    )
    budgets = {decay: decay_budget(settings._replace(weight_decay=decay)) for decay in (0.01, 0.1)}
    rates = sum(2e-4 * 0.5 * (1 + math.cos(math.pi * step / 3000)) for step in range(3000))
    for decay, budget in budgets.items():
        assert budget == pytest.approx(1 - math.exp(-decay * rates), rel=1e-4)
    assert [f"{budget:.0%}, {budget:.1%}" for budget in budgets.values()] == ["0%, 0.3%", "3%, 3.0%"]

    # What a run says before it trains: one step of 0.01 with a decay of 0.5.
    before, _ = finished.said.split("step 1/1  loss")
    assert f"0.5: shrinks a weight by {1 - math.exp(-0.5 * 0.01):.2%} over the run" in before


def test_two_runs_that_differ_only_in_rank_also_differ_in_step_size(finished):
    """the journal prints alpha/r and says when it differs"""

    def scale(**changed) -> float:
        config = {"model": {"path": "base"}, "data": {"train": "rows"}, "lora": {"alpha": 8.0, **changed}}
        return programs.settings(Config.from_dict(config), steps=1000).lora_scale["q_proj"]  # type: ignore[return-value]

    assert [scale(rank=rank) for rank in (4, 8, 16)] == [2.0, 1.0, 0.5]
    assert scale(rank=16, scaling="rslora") == 2.0
    # What a run says before it trains, and exports its adapter with.
    before, _ = finished.said.split("step 1/1  loss")
    assert re.search(r"adapter +rank 4 on .*, scale 2: ", before)
    exported = json.loads((finished.workdir / "last/adapter_config.json").read_text())
    assert exported["lora_alpha"] / exported["r"] == 2.0


# ---- out and in again ---------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 61, "hidden_size": 30, "intermediate_size": 47, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip


def random_adapter(spec: DecoderSpec, constants: LoraSpec):
    base = unflatten({path: jax.ShapeDtypeStruct(s, jnp.float32) for path, s in param_shapes(spec).items()})
    draw = np.random.default_rng(0)
    shapes = lora.adapter_shapes(base, constants.ranks)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * draw.standard_normal(leaf.shape), jnp.float32), shapes)


def test_merged_or_exported_adapters_give_other_answers(make_tiny):
    """PEFT loads the folder and its logits equal ours; merge = apply; export -> import is the identity"""
    tiny = make_tiny()
    scaled, batch = lora.scale(tiny.state.adapter, 2.0), tiny.batch(0, 2, 16)
    inputs = [jnp.asarray(batch[name]) for name in ("tokens", "positions", "segments")]
    hidden = jax.jit(lambda base, adapter: tiny.decoder.apply({"params": base, "lora": adapter}, *inputs))
    logits = hidden(tiny.base, scaled) @ unembedding(tiny.base).T
    merged = hidden(lora.merge(tiny.base, scaled), {}) @ unembedding(tiny.base).T
    assert float(jnp.abs(logits - hidden(tiny.base, {}) @ unembedding(tiny.base).T).max()) > 0.1  # it is felt
    np.testing.assert_allclose(merged, logits, rtol=1e-4, atol=1e-4)
    # In a bfloat16 base the sum is made in float32, and rounded once.
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.base)
    kernels = dict(leaves(lora.merge(narrow, scaled)))
    pairs = dict(leaves(scaled))
    for path, kernel in leaves(narrow):
        if path[-1] == "kernel":
            a, b = (np.asarray(pairs[(*path[:-1], name)], np.float64) for name in ("a", "b"))
            exact = np.asarray(kernel, np.float64) + a @ b
            error = np.abs(np.asarray(kernels[path], np.float64) - exact) / np.abs(exact).clip(1e-3)
            assert kernels[path].dtype == jnp.bfloat16
            assert error.max() <= 2**-8 * 1.001, path


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")
@pytest.mark.parametrize("name", ["Qwen2", "Mistral"])
def test_merged_or_exported_adapters_give_other_answers_in_peft(name, tmp_path):
    """PEFT loads the folder and its logits equal ours; merge = apply; export -> import is the identity"""
    torch, peft, transformers = map(pytest.importorskip, ("torch", "peft", "transformers"))
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**SIZES)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.15)
    model.save_pretrained(tmp_path / "base")
    files = resolve_model(str(tmp_path / "base"))
    spec = DecoderSpec.from_hf(files.config)
    base, constants = load_params(files, spec, "float32"), LoraSpec(5, 7.0, 0.2, TARGETS, "rslora")
    adapter = random_adapter(spec, constants)

    # ---- there: PEFT's logits, with the adapter applied and with PEFT's own merge
    save_peft(tmp_path / "ours", adapter, constants, str(tmp_path / "base"))
    tokens = np.random.default_rng(3).integers(0, SIZES["vocab_size"], (2, 13)).astype(np.int32)
    positions = jnp.broadcast_to(jnp.arange(13), tokens.shape)
    variables = {"params": base, "lora": lora.scale(adapter, constants.scale)}
    decoder = Decoder(spec, remat="none", dtype=jnp.float32)
    hidden = jax.jit(decoder.apply)(variables, jnp.asarray(tokens), positions, jnp.ones_like(positions))
    logits = np.asarray(hidden @ unembedding(base).T)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    with torch.no_grad():
        ids = torch.from_numpy(tokens).long()
        bare = theirs.base_model.disable_adapter_layers() or theirs(ids).logits.numpy()
        theirs.base_model.enable_adapter_layers()
        applied = theirs(ids).logits.numpy()
        merged = theirs.merge_and_unload()(ids).logits.numpy()
    assert np.abs(applied - bare).max() > 0.1
    assert np.abs(logits - applied).max() < 1e-4
    assert np.abs(logits - merged).max() < 1e-4

    # ---- and back: the same leaves, and the same files
    again, found = load_peft(tmp_path / "ours", spec)
    assert found == constants
    jax.tree.map(np.testing.assert_array_equal, again, adapter)
    save_peft(tmp_path / "again", again, found, str(tmp_path / "base"))
    one, other = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "again"))
    assert one.keys() == other.keys()
    jax.tree.map(np.testing.assert_array_equal, one, other)
