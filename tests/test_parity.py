"""`python -m benchmarks.parity`: over the published numbers, and over a folder with a number that is wrong."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.parity.__main__ import OUTPUTS, judge, main
from tests.golden import FOLDER, golden_cases

save_file = pytest.importorskip("safetensors.torch", reason="cases are safetensors").save_file


@pytest.mark.parametrize("case", golden_cases(""))
@pytest.mark.parametrize("dtype", OUTPUTS, ids=str)
def test_ours_are_the_published_numbers(dtype, case):
    verdict = judge(FOLDER, case, dtype)
    assert verdict.holds, str(verdict)
    has_gradients = any(name.startswith("grad.") for name in load_names(case))
    assert ("gradients" in verdict.worst) == has_gradients


def load_names(case: dict[str, Any]) -> list[str]:
    content = (FOLDER / case["file"]).read_bytes()
    return [*json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])]


def conv_case() -> dict[str, Tensor]:
    """Two rows of one channel under a kernel of two taps, written out."""
    x, weight, bias = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[0.5, 2.0]]), torch.tensor([1.0])
    given = {"x": x, "weight": weight, "bias": bias, "offsets": torch.tensor([0, 2, 3]), "grad_y": torch.ones(3, 1)}
    expected = {"expected.y": [[3.0], [5.5], [9.0]], "grad.x": [[2.5], [2.0], [2.0]]}
    expected |= {"grad.weight": [[1.0, 7.0]], "grad.bias": [3.0]}
    return {f"input.{n}": t for n, t in given.items()} | {n: torch.tensor(v).double() for n, v in expected.items()}


def norm_case() -> dict[str, Tensor]:
    y, z, weight = (torch.randn(3, 4, generator=torch.Generator().manual_seed(s)) for s in range(3))
    u = y.double() * F.silu(z.double())
    out = u / (u.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight[0].double()
    return {"input.y": y, "input.z": z, "input.weight": weight[0].clone(), "expected.out": out} | {
        "input.grad_out": torch.zeros(3, 4),
        "grad.y": torch.zeros(3, 4).double(),
    }


CASES: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
    "conv": ({"model": "op:causal_conv", "config": {"activation": "none"}, "mode": "op"}, conv_case()),
    "norm": ({"model": "op:gated_rmsnorm", "config": {"eps": 1e-3, "groups": 1}, "mode": "op"}, norm_case()),
}


def folder(at: Path, changes: dict[str, Tensor] | None = None, **entry: Any) -> Path:
    """A folder of the cases above, with changes to the first."""
    index = []
    for name, (fields, tensors) in CASES.items():
        is_first = name == "conv"
        save_file(tensors | (changes or {} if is_first else {}), at / f"{name}.safetensors")
        digest = hashlib.sha256((at / f"{name}.safetensors").read_bytes()).hexdigest()
        noise = {"file": f"{name}.safetensors", "fp32_noise": {"y": 1e-7}, "sha256": digest}
        index.append({"case": name} | fields | noise | (entry if is_first else {}))
    (at / "index.json").write_text(json.dumps(index))
    return at


def test_right_numbers_pass_in_both_dtypes(tmp_path, capsys):
    assert main([str(folder(tmp_path))]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[:3] for line in printed.splitlines()[:4]] == [
        ["ok", case, dtype] for case in CASES for dtype in ("float64", "float32")
    ]
    assert "2 cases, 4 runs, 0 failed" in printed


WRONG = {
    "output": ({"expected.y": torch.tensor([[3.0], [5.5], [9.001]]).double()}, "expected.y is off"),
    "gradient": ({"grad.weight": torch.tensor([[1.0, 7.01]]).double()}, "grad.weight is off"),
    "not-a-number": ({"expected.y": torch.full((3, 1), torch.nan).double()}, "expected.y is off"),
    "shape": ({"expected.y": torch.zeros(3, 2).double()}, "expected.y must be (3, 2), got (3, 1)"),
    "more-than-we-have": ({"expected.state": torch.zeros(1).double()}, "KeyError: 'state'"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_number_fails_and_the_next_case_is_judged_all_the_same(tmp_path, capsys, changes, message):
    assert main([str(folder(tmp_path, changes))]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["FAIL", "FAIL", "ok", "ok"]
    assert message in lines[0]
    assert "2 failed" in lines[-1]


def test_fp64_is_held_to_more_than_fp32(tmp_path, capsys):
    nearly = torch.tensor([[3.0], [5.5], [9.0 + 1e-6]]).double()
    assert main([str(folder(tmp_path, {"expected.y": nearly}))]) == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:2]] == ["FAIL", "ok"]


UNUSABLE = {
    "unknown-model": ({"model": "GRU4Rec"}, "model 'GRU4Rec' is none of TiM4Rec, "),
    "another-file": ({"sha256": "0" * 64}, "conv.safetensors must have the sha256 of the index"),
}


@pytest.mark.parametrize(("entry", "message"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_case_that_cannot_be_judged_fails(tmp_path, capsys, entry, message):
    assert main([str(folder(tmp_path, **entry))]) == 1
    assert message in capsys.readouterr().out


def test_a_folder_without_the_cases_that_were_asked_for_fails(tmp_path, capsys):
    assert main([str(folder(tmp_path)), "--cases", "A"]) == 1
    assert "0 cases" in capsys.readouterr().out


def test_what_is_no_folder_of_cases_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path)])
    assert stopped.value.code == 2
    assert "must hold an index.json" in capsys.readouterr().err
