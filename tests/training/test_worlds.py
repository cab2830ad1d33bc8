"""One process and two train and evaluate alike, from the command line, also where a rank often gets no row at all."""

import pytest

from ssd_torchrec.__main__ import main
from ssd_torchrec.data.generate import generate
from ssd_torchrec.data.synthetic import SyntheticConfig
from tests.training.jobs import finish, logged, result, start

LONE_ROWS = 25  # events of a batch: most histories are longer, and so a batch of their own
OPTIONS = f"""--encoder.width 16 --encoder.head-width 8 --encoder.state 8 --encoder.dropout 0 --encoder.time-dropout 0
    --data.tokens-per-batch {LONE_ROWS} --training.epochs 2 --training.log-every 1 --sharding.optimizer rowwise_adagrad
    """.split()


DRAWN = "--objective.loss sampled_softmax --objective.negatives log_uniform --objective.num-negatives 100"
LOSSES = {  # of one process and of two
    "softmax": ([], ["--objective.scored", "looked_up"]),
    "in-place": ([], ["--objective.scored", "in_place"]),
    "drawn": (DRAWN.split(), DRAWN.split()),
}


@pytest.mark.slow
@pytest.mark.parametrize("losses", LOSSES.values(), ids=LOSSES)
def test_two_processes_end_where_one_does(losses, tmp_path, capsys):
    data = tmp_path / "data"
    generate(SyntheticConfig(num_users=30), data)
    jobs = {n: start(n, data, tmp_path, f"world-{n}", [*OPTIONS, *loss]) for n, loss in enumerate(losses, 1)}
    for job in jobs.values():
        finish(job)
    one, two = (logged(tmp_path / f"world-{number}") for number in jobs)
    losses = [[line["loss_nats"] for line in lines if line["kind"] == "step"] for lines in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for stage in ("valid", "test"):
        alone, shared = (result(tmp_path / f"world-{number}") for number in jobs)
        assert alone[stage] == pytest.approx(shared[stage], abs=1e-12)
    assert main(["evaluate", str(tmp_path / "world-2")]) == 0  # by one process, whose tables are whole
    assert f"{shared['test']['ndcg@10']:.4f}" in capsys.readouterr().out
    assert (alone["world_size"], shared["world_size"]) == (1, 2)
    assert shared["sharding"]["item"].startswith("row_wise")
