"""What models and jobs do on a GPU: the same as on the CPU, from the encoders to runs of the command line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from ssd_torchrec.__main__ import main
from ssd_torchrec.data.generate import generate
from ssd_torchrec.data.ranking.clicks import ClicksConfig, generate_clicks
from ssd_torchrec.data.synthetic import SyntheticConfig
from ssd_torchrec.distributed.process import World, process_group
from ssd_torchrec.distributed.shard import ShardingConfig
from ssd_torchrec.encoders.encoder import Encoder, StreamingEncoder
from ssd_torchrec.encoders.registry import SYSTEMS
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.training.recommend import RecommendConfig, recommend
from ssd_torchrec.training.run import EvaluationConfig, evaluate_checkpoint
from tests.distributed import test_dlrm_pipelines as plugged
from tests.distributed import test_managed_ids as managed
from tests.distributed.example import SGD, batch, over_ranks, trainable, whole_weights
from tests.distributed.world import free_port
from tests.models.clicks import KINDS

DEVICE = torch.device("cuda", 0)
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation"),  # of PyTorch's, here and there
]

LENGTHS = [5, 0, 1, 50, 33, 20, 2, 64]
OUTPUT, GRADIENT = 1e-4, 1e-3
"""Of fp32, by root mean square over that of the truth."""
OUTPUT_BF16 = 5e-2
TRAINED_AS_ON_CPU = 1e-4
"""Of losses and weights after 20 steps."""


@pytest.fixture(autouse=True)
def fp32_means_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch lets cuDNN round the operands of convolutions and GRUs to tf32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A group of one process, on NCCL."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    world = World(device=DEVICE, meeting_point=f"127.0.0.1:{free_port()}")
    with process_group(world, timeout_s=100):
        yield world


def encoder(system: str) -> Encoder:
    """Without dropout; a GRU's gradient cuDNN computes in training mode alone, where one of one layer drops nothing."""
    torch.manual_seed(0)
    net = SYSTEMS[system].small.build().eval()
    for module in net.modules():
        if isinstance(module, nn.RNNBase):
            assert module.num_layers == 1
            module.train()
    return net


def history(encoder: Encoder, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, JaggedLayout]:
    draw = torch.Generator().manual_seed(1)
    events = torch.randn(sum(LENGTHS), encoder.width, generator=draw)
    gaps_s = torch.randint(0, 10**6, (sum(LENGTHS),), generator=draw)
    stamps = 1_600_000_000 + gaps_s.cumsum(0)
    return (
        events.to(device, dtype).requires_grad_(),
        stamps.to(device),
        JaggedLayout.from_lengths(LENGTHS, device),
    )


def output_and_gradients(net: Encoder, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    net = net.to(device, dtype)
    events, stamps, layout = history(net, device, dtype)
    y = net(events, stamps, layout)
    named = {"events": events, **dict(net.named_parameters())}
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    grads = torch.autograd.grad(y, list(named.values()), cotangent, allow_unused=True)
    found = {name: g for name, g in zip(named, grads, strict=True) if g is not None}
    return {name: t.detach().double().cpu() for name, t in {"output": y, **found}.items()}


def off(got: Tensor, truth: Tensor) -> float:
    return float((got - truth).square().mean().sqrt() / truth.square().mean().sqrt())


@pytest.mark.parametrize("system", SYSTEMS)
def test_an_encoder_gives_what_it_gives_on_the_cpu(system):
    truth = output_and_gradients(encoder(system), torch.device("cpu"), torch.float64)
    got = output_and_gradients(encoder(system), DEVICE, torch.float32)
    assert got.keys() == truth.keys()
    scale = max(float(t.square().mean().sqrt()) for t in truth.values())
    errors = {name: off(got[name], t) for name, t in truth.items() if t.abs().max() > 1e-9 * scale}
    assert errors.pop("output") <= OUTPUT
    assert max(errors.values()) <= GRADIENT, {name: f"{e:.1e}" for name, e in errors.items() if not e <= GRADIENT}


@pytest.mark.parametrize("system", SYSTEMS)
def test_an_encoder_in_bf16_stays_near_to_what_it_is(system):
    truth = encoder(system).double()
    expected = truth(*history(truth, torch.device("cpu"), torch.float64)).detach()
    net = encoder(system).to(DEVICE)
    events, stamps, layout = history(net, DEVICE, torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        y = net(events, stamps, layout)
    y.float().square().sum().backward()
    assert off(y.detach().double().cpu(), expected) <= OUTPUT_BF16
    assert events.grad is not None
    assert events.grad.isfinite().all()


@pytest.mark.parametrize("system", [name for name, system in SYSTEMS.items() if system.small.streams])
def test_appending_gives_the_whole(system):
    net = encoder(system).to(DEVICE)
    assert isinstance(net, StreamingEncoder)
    events, stamps, layout = history(net, DEVICE, torch.float32)
    with torch.no_grad():
        whole = net(events, stamps, layout)
        state, got = net.initial_state(len(LENGTHS)), torch.full_like(whole, torch.nan)
        starts = layout.offsets[:-1].tolist()
        for low, high in ((0, 3), (3, 40), (40, 64)):
            spans = [(s + min(n, low), s + min(n, high)) for s, n in zip(starts, LENGTHS, strict=True)]
            picked = torch.cat([torch.arange(a, b) for a, b in spans]).to(DEVICE)
            part = JaggedLayout.from_lengths([b - a for a, b in spans], DEVICE)
            got[picked], state = net.append(events[picked], stamps[picked], part, state)
    assert off(got.double(), whole.double()) <= OUTPUT


SPLITS = {
    "row_wise-adam": ShardingConfig(sharding="row_wise", optimizer="adam"),
    "row_wise-rowwise_adagrad": ShardingConfig(sharding="row_wise", optimizer="rowwise_adagrad", learning_rate=0.02),
    "table_wise-adam": ShardingConfig(sharding="table_wise", optimizer="adam"),
    "column_wise-adagrad": ShardingConfig(sharding="column_wise", optimizer="adagrad", learning_rate=0.02),
    "table_row_wise-sgd": ShardingConfig(
        sharding="row_wise", by_table={"segment": "table_row_wise"}, optimizer="sgd", learning_rate=0.05
    ),
    "grid_shard-sgd": ShardingConfig(
        sharding="row_wise", by_table={"segment": "grid_shard"}, optimizer="sgd", learning_rate=0.05
    ),
    "uvm": ShardingConfig(sharding="row_wise", optimizer="adam", compute_kernel="fused_uvm"),
    "uvm-caching": ShardingConfig(sharding="row_wise", optimizer="adam", compute_kernel="fused_uvm_caching"),
}


def train(world: World, sharding: ShardingConfig) -> tuple[list[float], dict[str, Tensor]]:
    """Adam without a context: FBGEMM's leaves rows alone that a batch has not, as it has all items but few segments."""
    t, losses = trainable(world, sharding, SGD, context=sharding.optimizer != "adam"), []
    for step in range(20):
        mine = batch(step, world).to(world.device)
        t.optimizer.zero_grad()
        loss, local = t.model(mine)
        loss.backward()
        t.optimizer.step()
        losses.append(over_ranks(local)[0].item() / mine.global_targets)
    return losses, whole_weights(t)


@pytest.mark.parametrize("split", SPLITS)
def test_split_tables_train_as_whole_ones_do_on_the_cpu(split, one_gpu):
    sharding = SPLITS[split]
    whole = ShardingConfig(sharding="none", optimizer=sharding.optimizer, learning_rate=sharding.learning_rate)
    losses, weights = train(one_gpu, sharding)
    expected_losses, expected = train(World(), whole)
    assert losses == pytest.approx(expected_losses, abs=TRAINED_AS_ON_CPU)
    assert weights.keys() == expected.keys()
    assert max(float((weights[n].cpu() - expected[n]).abs().max()) for n in weights) <= TRAINED_AS_ON_CPU
    assert losses[0] - losses[-1] > 100 * TRAINED_AS_ON_CPU


@pytest.mark.parametrize("pipeline", plugged.PIPELINES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_plugged_dlrm_trains_as_on_the_cpu(kind, pipeline, one_gpu, on_cpu):
    got = plugged.train(one_gpu, kind, pipeline)
    assert got["losses"][: plugged.EXACT] == pytest.approx(on_cpu[kind][: plugged.EXACT], abs=1e-4)
    if pipeline == "sparse-dist":
        assert got["pipelined"] == {"ShardedEmbeddingCollection", "ShardedEmbeddingBagCollection"}


@pytest.fixture(scope="module")
def on_cpu() -> dict[str, list[float]]:
    losses = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "1")
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        with process_group(World(meeting_point=f"127.0.0.1:{free_port()}"), timeout_s=100):
            for kind in KINDS:
                losses[kind] = plugged.train(World(meeting_point="127.0.0.1:1"), kind, "base")["losses"]
    return losses


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    generate(SyntheticConfig(num_users=500), folder / "histories")
    generate_clicks(ClicksConfig(num_rows=1200, longest=20), folder / "clicks")
    return folder


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


QUICK = ["--training.epochs", "1", "--training.warmup-steps", "2", "--data.tokens-per-batch", "1024"]


@pytest.mark.parametrize("system", SYSTEMS)
def test_what_was_trained_in_bf16_is_evaluated_alike_on_the_cpu(system, data, tmp_path):
    words = ["train", system, "--data.path", str(data / "histories"), "--output", str(tmp_path), "--name", "run"]
    assert main([*words, *QUICK, "--training.precision", "bf16"]) == 0
    trained = result_of(tmp_path / "run")
    again = evaluate_checkpoint(tmp_path / "run", "", EvaluationConfig(), World())
    for stage in ("valid", "test"):
        assert again[stage]["ndcg@50"] == pytest.approx(trained[stage]["ndcg@50"], abs=5e-3)
        assert trained[stage]["ndcg@50"] > 0


@pytest.mark.parametrize("history", ["encoder", "mean", "none"])
def test_a_ranking_model_is_trained(history, data, tmp_path):
    words = ["train", "dlrm", "--data.path", str(data / "clicks"), "--output", str(tmp_path), "--name", "run"]
    words += ["--model.history", history, "--training.epochs", "1", "--training.warmup-steps", "1"]
    assert main(words) == 0
    assert 0 < result_of(tmp_path / "run")["test"]["auc"] < 1


def test_the_same_is_recommended_on_either_device(data, tmp_path):
    words = ["train", "tim4rec", "--data.path", str(data / "histories"), "--output", str(tmp_path), "--name", "run"]
    assert main([*words, *QUICK]) == 0
    users = tmp_path / "users.csv"
    users.write_text("user_id\n" + "\n".join(map(str, range(50))) + "\n")
    best = []
    for world in (World(device=DEVICE), World()):
        table = tmp_path / f"{world.device.type}.parquet"
        recommend(tmp_path / "run", users, table, RecommendConfig(k=5), world)
        best.append([items[0].as_py() for items in pq.read_table(table)["item"]])
    same = sum(a == b for a, b in zip(*best, strict=True))
    assert same >= len(best[0]) - 2  # of equal scores roundings decide


@pytest.mark.parametrize("sharding", ["row_wise", "column_wise"])
def test_a_split_run_goes_on_from_its_checkpoint(sharding, data, tmp_path, monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    words = ["train", "tim4rec", "--data.path", str(data / "histories"), "--output", str(tmp_path)]
    words += ["--sharding.sharding", sharding, *QUICK]
    for name, epochs, more in (("whole", "2", []), ("half", "1", []), ("half", "2", ["--training.resume", "auto"])):
        monkeypatch.setenv("MASTER_PORT", str(free_port()))
        assert main([*words, "--name", name, *more, "--training.epochs", epochs]) == 0
    whole, resumed = result_of(tmp_path / "whole"), result_of(tmp_path / "half")
    assert resumed["valid"]["ndcg@10"] == pytest.approx(whole["valid"]["ndcg@10"], abs=0.02)


@pytest.mark.parametrize("optimizer", ["adam", "adagrad", "rowwise_adagrad"])
def test_an_evicted_row_starts_anew(optimizer, one_gpu):
    split = ShardingConfig(sharding="row_wise", optimizer=optimizer, learning_rate=0.05)
    assert torch.equal(managed.full_table(one_gpu, split, 4), torch.full((3, 4), 7.0))


@pytest.mark.parametrize("sharding", [managed.SPLIT, managed.WHOLE], ids=["split", "whole"])
def test_managed_ids_have_the_rows_that_they_have_on_the_cpu(sharding, one_gpu, tmp_path):
    saved = managed.saved_and_loaded(one_gpu, tmp_path, sharding)
    assert torch.equal(*saved["at_once"])
    assert saved["maps"][0] == saved["maps"][1]
    run = managed.trainable(World(), managed.WHOLE)
    for n in range(9):
        managed.step(run, World(), n)
    assert managed.map_of(run)._mch_remapped_ids_mapping.tolist() == saved["maps"][0]


@pytest.mark.parametrize("pipeline", managed.PIPELINES)
def test_a_plugged_dlrm_learns_from_raw_ids(pipeline, one_gpu):
    losses = managed.train(one_gpu, pipeline)["losses"]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
