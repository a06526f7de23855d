"""The decoder gives transformers' numbers: logits of random models of odd sizes, log-probabilities of real ones."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.models.decoder import Decoder, unembedding
from jaxlora.models.spec import DecoderSpec
from jaxlora.models.weights import load_params, resolve_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH, SHORT = 19, 11
SIZES = {
    "vocab_size": 89,
    "hidden_size": 42,
    "intermediate_size": 67,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
}
WINDOW = {"sliding_window": 5}
VARIANTS = {
    "qwen2": ("Qwen2", {}),
    "qwen2, tied, one key head": ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen2, 2:1": ("Qwen2", {"hidden_size": 60, "num_attention_heads": 6}),
    "qwen2, head_dim": ("Qwen2", {"head_dim": 10, "num_key_value_heads": 1}),
    "qwen2, window": ("Qwen2", WINDOW | {"use_sliding_window": True, "max_window_layers": 0}),
    "qwen2, window not used": ("Qwen2", WINDOW | {"use_sliding_window": False}),
    "mistral, window": ("Mistral", WINDOW),
    "mistral, window of one": ("Mistral", {"sliding_window": 1}),
    "mistral, no window, tied": ("Mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "mistral, 2:1, window": ("Mistral", WINDOW | {"hidden_size": 60, "num_attention_heads": 6}),
    "mistral, 7:1, head_dim": (
        "Mistral",
        {"num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 8},
    ),
    "llama": ("Llama", {}),
    "llama, tied, 3:1": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama, head_dim": ("Llama", {"head_dim": 6}),
}


def make_model(variant, folder):
    """A random model in which every parameter matters: biases and norm scales are not left at zero and one."""
    name, changes = VARIANTS[variant]
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}}
    config = getattr(transformers, f"{name}Config")(**SIZES | rope | changes)
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            spread = 0.5 if parameter.ndim == 1 else 0.15
            parameter.normal_(1.0 if "norm" in parameter_name else 0.0, spread)
    model.save_pretrained(folder)
    return model


def load(folder):
    files = resolve_model(str(folder))
    spec = DecoderSpec.from_hf(files.config)
    params = load_params(files, spec, "float32")
    return partial(jax.jit(Decoder(spec, dtype=jnp.float32).apply), {"params": params}), params, spec


def logits_of(hidden, params):
    return np.asarray(jnp.einsum("BTD,VD->BTV", hidden, unembedding(params)))


def rows(lengths, vocab_size):
    """Right-padded rows of random tokens: tokens, positions, segments [B, T]."""
    tokens = np.random.default_rng(1).integers(0, vocab_size, (len(lengths), LENGTH)).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    segments = (positions < np.array(lengths)[:, None]).astype(np.int32)
    return tokens * segments, positions * segments, segments


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_transformers(variant, tmp_path):
    model = make_model(variant, tmp_path)
    apply, params, spec = load(tmp_path)
    tokens, positions, segments = rows([LENGTH, SHORT], spec.vocab_size)
    ours = logits_of(apply(tokens, positions, segments), params)
    with torch.no_grad():
        mask = torch.from_numpy(segments).long()
        theirs = model(torch.from_numpy(tokens).long(), attention_mask=mask).logits.numpy()
    assert np.abs(theirs[segments > 0]).mean() > 0.3  # a model whose logits vanish would agree with anything
    assert np.abs(ours - theirs)[segments > 0].max() < 1e-4


def test_the_window_in_these_tests_is_felt(tmp_path):
    """The parity above means something only if a model without its window gives other logits."""
    make_model("mistral, window", tmp_path)
    apply, params, spec = load(tmp_path)
    batch = rows([LENGTH], spec.vocab_size)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"sliding_window": None}))
    whole, _, _ = load(tmp_path)
    gap = np.abs(logits_of(apply(*batch), params) - logits_of(whole(*batch), params))[0]
    assert gap[:5].max() < 1e-5
    assert gap[5:].max() > 1e-2


@pytest.mark.parametrize("variant", ["qwen2", "mistral, 2:1, window", "llama, tied, 3:1"])
def test_a_packed_row_equals_its_examples_alone(variant, tmp_path):
    make_model(variant, tmp_path)
    apply, _, spec = load(tmp_path)
    tokens, positions, segments = rows([8, 7], spec.vocab_size)
    packed_tokens, packed_positions, packed_segments = (np.zeros((1, LENGTH), np.int32) for _ in range(3))
    for start, row, length in ((0, 0, 8), (8, 1, 7)):
        packed_tokens[0, start : start + length] = tokens[row, :length]
        packed_positions[0, start : start + length] = np.arange(length)
        packed_segments[0, start : start + length] = row + 1
    alone = apply(tokens, positions, segments)
    packed = apply(packed_tokens, packed_positions, packed_segments)
    np.testing.assert_allclose(packed[0, :8], alone[0, :8], atol=1e-5)
    np.testing.assert_allclose(packed[0, 8:15], alone[1, :7], atol=1e-5)


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize("remat", ["none", "dots", "full", "offload"])
def test_rematerialisation_and_loops_change_neither_values_nor_gradients(remat, scanned, tmp_path):
    make_model("qwen2, 2:1", tmp_path)
    _, params, spec = load(tmp_path)
    batch = jax.tree.map(jnp.asarray, rows([LENGTH, SHORT], spec.vocab_size))

    def value_and_gradient(remat, scanned):
        decoder = Decoder(spec, dtype=jnp.float32, remat=remat, scanned=scanned)

        def loss(params):
            hidden = decoder.apply({"params": params}, *batch)
            return jnp.sum(jnp.sin(hidden)), hidden

        (_, hidden), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        # Added up here: float32 loses more of this sum of terms of either sign than what is looked for.
        return np.sum(np.sin(np.asarray(hidden, np.float64))), gradient

    value, gradient = value_and_gradient(remat, scanned)
    plain_value, plain_gradient = value_and_gradient("none", True)
    np.testing.assert_allclose(value, plain_value, rtol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), gradient, plain_gradient)


def test_layers_that_are_written_out_are_computed_again_all_the_same(tmp_path):
    """The compiler would otherwise see that the backward pass makes what the forward pass made, and keep it."""
    make_model("qwen2, 2:1", tmp_path)
    _, params, spec = load(tmp_path)
    batch = jax.tree.map(jnp.asarray, rows([LENGTH, SHORT], spec.vocab_size))

    def flops(remat):
        decoder = Decoder(spec, dtype=jnp.float32, remat=remat, scanned=False)
        step = jax.jit(jax.grad(lambda params: jnp.sum(decoder.apply({"params": params}, *batch))))
        return step.lower(params).compile().cost_analysis()["flops"]

    assert flops("full") > 1.2 * flops("none")


def test_nothing_after_a_token_and_no_padding_reaches_it(tmp_path):
    make_model("mistral, no window, tied", tmp_path)
    apply, _, spec = load(tmp_path)
    tokens, positions, segments = rows([SHORT], spec.vocab_size)
    other = tokens.copy()
    other[0, 6:] = (other[0, 6:] + 1) % spec.vocab_size
    np.testing.assert_array_equal(
        apply(tokens, positions, segments)[0, :6], apply(other, positions, segments)[0, :6]
    )


# --- real models ---


def assert_log_probabilities(folder, references):
    """Each token's log-probability given those before it, the loss of each text, and the last token's top five."""
    apply, params, _ = load(folder)
    assert references
    longest = max(len(text["ids"]) for text in references)
    tokens, positions, segments = (np.zeros((len(references), longest), np.int32) for _ in range(3))
    for row, text in enumerate(references):
        length = len(text["ids"])
        tokens[row, :length], positions[row, :length] = text["ids"], np.arange(length)
        segments[row, :length] = 1
    logits = logits_of(apply(tokens, positions, segments), params)
    for row, text in enumerate(references):
        length = len(text["ids"])
        log_probabilities = np.asarray(jax.nn.log_softmax(logits[row, :length]))
        of_next = log_probabilities[np.arange(length - 1), tokens[row, 1:length]]
        assert np.abs(of_next - np.array(text["token_logprobs"])).max() < 1e-3
        assert abs(-of_next.mean() - text["loss"]) < 1e-3
        last = logits[row, length - 1]
        top = np.argsort(-last)[:5]
        assert list(top) == [token for token, _ in text["last_top5"]]
        assert np.abs(last[top] - np.array([logit for _, logit in text["last_top5"]])).max() < 1e-3


@pytest.fixture(scope="session")
def references(real):
    return json.loads((real / "fixtures" / "reference_logprobs_torch_f32.json").read_text())


@pytest.mark.parametrize("architecture", ["mistral", "qwen2"])
def test_log_probabilities_of_stories260k(architecture, real, references):
    folder = real / "models" / f"stories260k-{architecture}"
    assert_log_probabilities(folder, references["stories260k"]["texts"])


@pytest.mark.slow
def test_log_probabilities_of_smollm2(smollm2, references):
    assert_log_probabilities(smollm2, references["smollm2-135m-instruct"]["texts"])
