from tests.sweeps.conftest import trial


def test_smoke(sweep, base_config, tmp_path):
    trials = [
        trial(base_config, "a", optim__learning_rate=1e-2),
        trial(base_config, "b", optim__learning_rate=3e-2, lora__rank=8),
        trial(base_config, "c", optim__learning_rate=3e-3, train__max_steps=12),
    ]
    s = sweep(trials, tmp_path / "s")
    print(s.outcomes, s.board.states, s.board.said)
