"""An answer of the planner held against TorchRec's own numbers."""

from collections.abc import Callable

import pytest

from ssd_torchrec.distributed import fit
from ssd_torchrec.distributed.fit import Fit
from ssd_torchrec.distributed.plan import plan_offline


def assert_as_torchrec_says(plan: Callable[[], Fit], monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []
    monkeypatch.setattr(fit, "plan_offline", lambda *a, **k: plans.append(plan_offline(*a, **k)) or plans[-1])
    answer = plan()
    shards = [shard for option in plans[-1] for shard in option.shards]
    for rank in answer.per_rank:
        mine = [shard for shard in shards if shard.rank == rank.rank]
        assert rank.tables_bytes == pytest.approx(sum(shard.storage.hbm for shard in mine), rel=1e-3, abs=8)
        assert rank.host_bytes == pytest.approx(sum(shard.storage.ddr for shard in mine), rel=1e-3, abs=8)
        assert (rank.step_ms or 0.0) == pytest.approx(sum(shard.perf.total for shard in mine))
    assert answer.step_ms == max(rank.step_ms for rank in answer.per_rank if rank.step_ms is not None) > 0
