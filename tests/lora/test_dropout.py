"""Dropout is PEFT's: on the adapter's input, drawn anew for every module, at each module's own rate."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.core.prng import named
from jaxlora.core.tree import leaves, map_leaves
from jaxlora.lora import tree, variants
from jaxlora.lora.peft import load_peft
from jaxlora.lora.spec import LoraSpec
from jaxlora.models import decoder
from jaxlora.models.decoder import Decoder, unembedding
from tests.lora.conftest import TOKENS

SPEC = LoraSpec(4, 6.0, dropout=0.3, dropout_pattern=("self_attn.?_proj=0.6", "down_proj=0"))


def kept(shape, rate):
    """A mask that both sides can make for themselves; its share is the rate's."""
    b, t, i = np.indices(shape)
    return (3 * b + 7 * t + i + t * i) % 10 >= round(10 * rate)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")
@pytest.mark.parametrize("name", ["Qwen2", "Mistral"])
def test_with_the_same_masks_losses_and_gradients_are_pefts(name, make_pair, peft, tmp_path, monkeypatch):
    import torch

    class Mask(torch.nn.Module):
        def __init__(self, rate):
            super().__init__()
            self.rate = rate

        def forward(self, x):
            return x * torch.from_numpy(kept(x.shape, self.rate)) / (1 - self.rate)

    pair = make_pair(tmp_path / "base", name)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(pair.model, config).train()
    draw = torch.Generator().manual_seed(0)
    for path, module in model.named_modules():
        if hasattr(module, "lora_dropout"):
            with torch.no_grad():
                module.lora_B["default"].weight.normal_(0, 0.3, generator=draw)
            module.lora_dropout["default"] = Mask(SPEC.dropouts[path.rpartition(".")[2]])
    model.save_pretrained(tmp_path / "adapter")
    theirs = (model(torch.from_numpy(TOKENS).long()).logits ** 2).mean()
    theirs.backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}

    def masked(x, rate, key):
        shape = x.shape
        masks = jnp.stack([jnp.asarray(kept(shape, r)) for r in (0.0, 0.3, 0.6)])
        return x * masks[jnp.asarray(rate * 10 / 3 + 0.5, jnp.int32)] / (1 - rate)

    monkeypatch.setattr(decoder, "_dropout", masked)
    adapter, spec = load_peft(tmp_path / "adapter", pair.spec)

    def loss(adapter, rates):
        positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
        variables = {"params": pair.base, "lora": tree.scale(adapter, spec.scale)}
        hidden = Decoder(pair.spec, dtype=jnp.float32).apply(
            variables, jnp.asarray(TOKENS), positions, jnp.ones_like(positions),
            lora_dropout=rates, rngs={"dropout": jax.random.key(0)},
        )  # fmt: skip
        return jnp.mean(jnp.einsum("BTD,VD->BTV", hidden, unembedding(pair.base)) ** 2)

    value, gradient = jax.value_and_grad(loss)(jax.tree.map(jnp.asarray, adapter), SPEC.dropouts)
    assert float(value) == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert float(loss(adapter, dict.fromkeys(SPEC.dropouts, 0.0))) != pytest.approx(float(value), rel=1e-3)
    for path, leaf in leaves(gradient):
        for layer, found in enumerate(np.asarray(leaf)):
            expected = gradients[f"base_model.model.model.layers.{layer}.{'.'.join(path[1:-1])}"
                                 f".lora_{path[-1].upper()}.default.weight"].T  # fmt: skip
            assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected), (path, layer)


def test_every_module_of_every_layer_draws_its_own_mask_at_its_own_rate(make_pair, tmp_path, monkeypatch):
    pair = make_pair(tmp_path, "Qwen2")
    adapter, _ = variants.start(jax.random.key(0), pair.base, SPEC)
    adapter = map_leaves(lambda _, x: x + 0.1, adapter)
    seen, draw = [], decoder._dropout

    def recorded(x, rate, key):
        out = draw(x, rate, key)

        def record(key, rate, x, out):
            seen.append((key.tobytes(), round(float(rate), 2), np.mean((out == 0) & (x != 0))))

        jax.debug.callback(record, jax.random.key_data(key), rate, x, out)
        return out

    monkeypatch.setattr(decoder, "_dropout", recorded)
    apply = jax.jit(Decoder(pair.spec, remat="none", dtype=jnp.float32).apply)
    tokens = jnp.tile(jnp.asarray(TOKENS), (8, 4))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    for step in range(2):
        key = named(jax.random.key(0), "dropout", step)
        lora = {"params": pair.base, "lora": tree.scale(adapter, SPEC.scales)}
        apply(
            lora,
            tokens,
            positions,
            jnp.ones_like(positions),
            lora_dropout=SPEC.dropouts,
            rngs={"dropout": key},
        )
    jax.effects_barrier()
    modules = 7 * pair.spec.num_layers
    assert len({key for key, _, _ in seen}) == len(seen) == 2 * modules
    rates = collections.Counter(rate for _, rate, _ in seen)
    assert rates == {
        0.6: 2 * 4 * pair.spec.num_layers,
        0.3: 2 * 2 * pair.spec.num_layers,
        0.0: 2 * pair.spec.num_layers,
    }
    for _, rate, share in seen:
        assert share == pytest.approx(rate, abs=0.02)
