import pytest
import torch
from torch import nn

from ssd_torchrec.distributed.optimizers import DenseOptimizerConfig, decays, dense_optimizer, set_learning_rate
from ssd_torchrec.distributed.plan import ShardingConfig
from ssd_torchrec.errors import ConfigError
from tests.distributed.example import SGD, train, trainable, whole_weights

TABLE_OPTIMIZERS = ["sgd", "adagrad", "rowwise_adagrad", "adam"]


def one_step(config: DenseOptimizerConfig, weight: float, gradient: float, name: str = "proj.weight") -> float:
    parameter = nn.Parameter(torch.full((1, 1), weight))
    optimizer = dense_optimizer({name: parameter}, config)
    parameter.grad = torch.full((1, 1), gradient)
    optimizer.step()
    return parameter.item()


def test_first_adam_step_is_the_learning_rate_whatever_the_gradient():
    for gradient in (1e-3, 10.0):
        assert one_step(DenseOptimizerConfig(learning_rate=0.01), 1.0, gradient) == pytest.approx(0.99, abs=1e-6)


def test_weight_decay_spares_what_zero_means_nothing_to():
    config = DenseOptimizerConfig(learning_rate=0.1, weight_decay=0.5)
    assert one_step(config, 1.0, 0.0) == pytest.approx(0.95)
    assert one_step(config, 1.0, 0.0, name="mixer.A_log") == 1.0
    assert [decays(name, torch.zeros(2, 2)) for name in ("proj.weight", "x.A_log", "x.D", "x.dt_bias")] == [True] + [
        False
    ] * 3
    assert not decays("norm.weight", torch.zeros(2))


def test_clipping_bounds_the_global_norm_of_the_dense_gradient():
    config = DenseOptimizerConfig(optimizer="sgd", learning_rate=1.0, clip_norm=0.5)
    assert one_step(config, 0.0, 100.0) == pytest.approx(-0.5, rel=1e-4)
    assert one_step(config, 0.0, 0.25) == pytest.approx(-0.25)


def test_muon_turns_matrices_by_the_learning_rate_and_leaves_the_rest_to_adam():
    config = DenseOptimizerConfig(optimizer="muon", learning_rate=0.01)
    weights = {
        "proj.weight": torch.eye(64)[:32],
        "gate.weight": torch.ones(4, 64),
        "conv.weight": torch.ones(64, 1, 4),
        "bias": torch.ones(64),
    }
    parameters = {name: nn.Parameter(value.clone()) for name, value in weights.items()}
    optimizer = dense_optimizer(parameters, config)
    for seed, parameter in enumerate(parameters.values()):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    optimizer.step()
    moved = {name: (parameters[name] - weights[name]).detach() for name in weights}
    turned = moved.pop("proj.weight")
    singular = torch.linalg.svdvals(turned) / (0.01 * 0.2 * 64**0.5)
    assert singular.min() > 0.5
    assert singular.max() < 1.3  # all alike, within what five iterations in bf16 reach
    for step in moved.values():
        assert step.abs() == pytest.approx(torch.full_like(step, 0.01), rel=1e-3)


def test_muon_is_clipped_with_adam_by_one_norm():
    config = DenseOptimizerConfig(optimizer="muon", clip_norm=1.0)
    parameters = {"proj.weight": nn.Parameter(torch.zeros(32, 32)), "bias": nn.Parameter(torch.zeros(1))}
    optimizer = dense_optimizer(parameters, config)
    parameters["proj.weight"].grad, parameters["bias"].grad = torch.ones(32, 32), torch.ones(1)
    optimizer.step()
    norm = sum(float(p.grad.square().sum()) for p in parameters.values()) ** 0.5
    assert norm == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("dense", ["adam", "muon"])
@pytest.mark.parametrize("optimizer", TABLE_OPTIMIZERS)
def test_all_state_exists_and_is_zero_before_the_first_step(optimizer, dense, alone):
    t = trainable(alone, ShardingConfig(optimizer=optimizer), DenseOptimizerConfig(optimizer=dense, weight_decay=0.5))
    fresh = trainable(alone, ShardingConfig(optimizer=optimizer), SGD)
    weights, untouched = whole_weights(t), whole_weights(fresh)
    assert all(torch.equal(weights[name], untouched[name]) for name in weights)
    values = [v for state in t.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert values
    assert not any(v.any() for v in values)


def test_a_factor_sets_all_rates_and_the_next_factor_forgets_it(alone):
    t = trainable(alone, ShardingConfig(optimizer="sgd", learning_rate=0.4), SGD)
    for factor in (0.5, 0.25):
        set_learning_rate(t.optimizer, factor)
        assert {group["lr"] for group in t.optimizer.param_groups} == {0.4 * factor, 0.05 * factor}


def test_rate_zero_trains_neither_split_tables_nor_the_rest(group_of_one):
    t = trainable(group_of_one, ShardingConfig(sharding="row_wise", optimizer="sgd"), SGD)
    before = whole_weights(t)
    set_learning_rate(t.optimizer, 0.0)
    train(t, group_of_one, range(1))
    after = whole_weights(t)
    assert all(torch.equal(before[name], after[name]) for name in before)
    set_learning_rate(t.optimizer, 1.0)
    train(t, group_of_one, range(1))
    after = whole_weights(t)
    assert not torch.equal(before["items.embeddings.item.weight"], after["items.embeddings.item.weight"])


REFUSED = {
    "rate": dict(learning_rate=0.0),
    "betas": dict(betas=(0.9, 1.0)),
    "eps": dict(eps=0.0),
    "decay": dict(weight_decay=-0.1),
    "clip": dict(clip_norm=0.0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_values_out_of_range_are_refused(name):
    with pytest.raises(ConfigError, match="got"):
        DenseOptimizerConfig(**REFUSED[name])
